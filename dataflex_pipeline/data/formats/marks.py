"""Marks that other tools write on a turn beside its role and text, and their treatment here.

- ``weight`` (OpenAI, mistral-finetune), ``loss`` and ``loss_scale`` (ms-swift, AgentInstruct), ``train`` and
  ``training`` and ``train_on_turn`` (axolotl), ``trainable``: 0 or false on an assistant turn takes its
  labels away, as ``masked`` (torchtune) does with 1 or true. Nothing between 0 and 1 can be honoured, nor a
  mark to train on another speaker's turn: such rows are refused.
- ``reasoning_content``, ``reasoning``, ``thinking``: an assistant's thoughts, given to the chat template.
- ``name``: who speaks, given to the chat template.
- images, sound and moving pictures in a turn: refused.
- the rest (``tool_plan``, ``citations``, ``prefix``, ``refusal`` beside an answer ...): given to the chat
  template where its text reads it from a message; else passed over, and noted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from dataflex_pipeline.data.conversation import RowError
from dataflex_pipeline.data.sources.columns import is_filled
from dataflex_pipeline.data.sources.compressed import kind_name

MARKS = ("weight", "loss", "train", "trainable", "training", "loss_scale", "train_on_turn", "masked")
_UNTRAINED_IF_TRUE = frozenset({"masked"})
IN_PARTS = ("train_detail", "training_detail")
REASONING = ("reasoning_content", "reasoning", "thinking")
_REASONING_OBJECTS = ("reasoning_details", "thinking_blocks")
_MEDIA = ("audio", "audios", "image", "images", "video", "videos", "input_audio", "image_url")
_READ = frozenset(
    {
        *MARKS,
        *IN_PARTS,
        *REASONING,
        *_REASONING_OBJECTS,
        *_MEDIA,
        "name",
        "tool_calls",
        "function_call",
        "tool_call_id",
    }
)
"""Keys that have a meaning of their own here."""
_YES = {"true": True, "yes": True, "1": True, "1.0": True}
_NO = {"false": False, "no": False, "0": False, "0.0": False}

UNTRAINED = "is not trained on"
"""How a note on a turn without labels ends."""
NOTHING_TRAINED = "every answer is marked as not to be trained on, so there is nothing to learn"


def trained_mark(turn: Mapping[str, Any], role: str, own: Iterable[str]) -> tuple[bool, tuple[str, ...]]:
    """Return whether a turn may carry labels, and what to note of its marks.

    Args:
        turn: as the data has it. role: system, user, assistant or tool.
        own: keys that hold the turn's role and text, and are no marks.

    Raises:
        RowError: a mark that cannot be honoured or understood.
    """
    own = frozenset(own)
    for key in IN_PARTS:
        if turn.get(key) and key not in own:
            raise RowError(
                f"a turn is marked in parts ({key}), and a turn is trained on whole or not at all; split the "
                "row, or remove the mark"
            )
    given = {key: turn[key] for key in MARKS if turn.get(key) is not None and key not in own}
    read = {key: _read_mark(key, value) != (key in _UNTRAINED_IF_TRUE) for key, value in given.items()}
    if role != "assistant":
        wanted = [key for key, trained in read.items() if trained]
        if wanted:
            raise RowError(
                f"a {role} turn is marked to be trained on ({wanted[0]}), and only answers are; remove it"
            )
        return True, ()
    if len(set(read.values())) > 1:
        raise RowError(f"the marks of a turn contradict each other ({' and '.join(read)})")
    if not read or all(read.values()):
        return True, ()
    key, value = next(iter(given.items()))
    shown = str(value).lower() if isinstance(value, (bool, str)) else f"{value:g}"
    return False, (f"a turn marked {key} {shown} {UNTRAINED}",)


def _read_mark(key: str, value: Any) -> bool:
    if isinstance(value, (bool, int, float)) and value in (0, 1):
        return bool(value)
    known = _YES | _NO
    if isinstance(value, str) and value.strip().lower() in known:
        return known[value.strip().lower()]
    if isinstance(value, (int, float)) or (isinstance(value, str) and _is_number(value)):
        raise RowError(
            f"{key} of a turn is neither 0 nor 1, and a turn is trained on whole or not at all; make it one "
            "of the two, or remove it"
        )
    raise RowError(f"{key} of a turn is {kind_name(value)}, not a number or true or false")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def reasoning_of(turn: Mapping[str, Any], role: str, own: Iterable[str]) -> tuple[str, tuple[str, ...]]:
    """Return an assistant's reasoning ("" for none), and what to note of that of others.

    Raises:
        RowError: it is no text, or the data has two different ones.
    """
    own = frozenset(own)
    given = {key: turn[key] for key in REASONING if turn.get(key) and key not in own}
    if role != "assistant":
        return "", tuple(f"{key} of a {role} turn is not used" for key in given)
    for key, value in given.items():
        if not isinstance(value, str):
            raise RowError(f"{key} of a turn is {kind_name(value)}, not text")
    texts = {str(value) for value in given.values() if str(value).strip()}
    if len(texts) > 1:
        raise RowError(f"{' and '.join(given)} of a turn differ; keep one of them")
    for key in _REASONING_OBJECTS:
        if turn.get(key) and not texts:
            raise RowError(f"{key} of a turn is not read; write its text as reasoning_content, or remove it")
    return next(iter(texts), ""), ()


def check_media(turn: Mapping[str, Any], own: Iterable[str]) -> None:
    """Refuse a turn with images, sound or moving pictures.

    Raises:
        RowError: it has some.
    """
    own = frozenset(own)
    for key in _MEDIA:
        if turn.get(key) and key not in own:
            raise RowError(f"a turn holds {key}, and only text is trained on")


def speaker_of(turn: Mapping[str, Any], role: str, own: Iterable[str]) -> str:
    """Return the ``name`` of who speaks; a tool's is that of the function, which its call has."""
    name = turn.get("name")
    return name if isinstance(name, str) and role != "tool" and "name" not in frozenset(own) else ""


def other_keys(turn: Mapping[str, Any], own: Iterable[str]) -> dict[str, Any]:
    """Return what a turn has beside its role and text that only a chat template can use."""
    return {
        str(key): value
        for key, value in turn.items()
        if value is not None and key not in _READ and key not in frozenset(own)
    }


def not_used(keys: Mapping[str, Any]) -> Iterator[str]:
    """Yield a note for each key of a turn that says something and that nothing reads."""
    told = {
        "refusal": "refusal of a turn, beside its content, is not used",
        "prefix": "prefix of a turn has no meaning in training, and is not used",
    }
    for key, value in keys.items():
        if key in told and value:
            yield told[key]
        elif key not in told and is_filled(value):
            shown = key.encode("ascii", "backslashreplace").decode().replace(";", ",")
            yield f"a turn's key '{shown}' is not used"
