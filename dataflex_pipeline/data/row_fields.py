"""Columns of a row beside its conversation that other tools give a meaning to, and what becomes of them here.

- ``label`` (unpaired preference, TRL and ms-swift) and ``kto_tag``: an answer that is labelled bad is not
  trained on: the row is refused.
- ``rejected``, ``rejected_response``, ``rejected_messages``: the worse half of a pair is not trained on.
- ``images``, ``videos``, ``audios`` and their singulars: rows with any are refused.
- ``chat_template_kwargs`` and ``documents``: given to the chat template.
- the rest is passed over, and noted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dataflex_pipeline.data.calls import without_nulls
from dataflex_pipeline.data.columns import is_filled
from dataflex_pipeline.data.conversation import Message, RowError
from dataflex_pipeline.data.layout import Layout, json_or_self
from dataflex_pipeline.data.settings import Row
from dataflex_pipeline.data.text_files import kind_name

VARIABLES = "chat_template_kwargs"
OURS = frozenset(
    {
        "messages",
        "conversation",
        "tools",
        "chat_template",
        "add_generation_prompt",
        "continue_final_message",
        "tokenize",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
        "tokenizer_kwargs",
        "strftime_now",
        "raise_exception",
        "bos_token",
        "eos_token",
        "pad_token",
        "unk_token",
    }
)
"""Variables of a template that the pipeline itself sets."""
_MEDIA = ("images", "videos", "audios")
_ONE_MEDIUM = ("image", "video", "audio")
_PLACEHOLDERS = ("<image>", "<video>", "<audio>")
_REJECTED = ("rejected", "rejected_response", "rejected_messages")
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
_TOKENISED = ("input_ids", "labels", "completion_mask", "assistant_masks", "loss_mask")
_NOT_USED = {
    "add_generation_prompt": "every row ends with an answer",
    "chat_template": "rows are written with the configured template, or the tokenizer's own",
    "train_on_inputs": "only answers are trained on",
    "tool_choice": "it has no meaning in training",
}
_TRUTHS = {"true": True, "false": False}


def refuse_by_columns(row: Row, layout: Layout, messages: Sequence[Message]) -> None:
    """Refuse a row that its columns mark as not to be trained on, or as more than text.

    Raises:
        RowError: a bad answer by its label, or images, sound or moving pictures.
    """
    beside = _beside(row, layout)
    for key in ("kto_tag", "label"):
        if key in beside and not _is_good(key, beside[key], layout):
            raise RowError(
                f"{key} is false: the answer is marked as a bad one, and would be trained on like a good "
                "one; leave such rows out, or rename the column if it means something else"
            )
    for key in _MEDIA:
        if _filled(beside.get(key)):
            raise RowError(f"the row has {key}, and only text is trained on")
    marked = any(holder in message.content for message in messages for holder in _PLACEHOLDERS)
    for key in _ONE_MEDIUM:
        value = beside.get(key)
        if _filled(value) and (marked or not isinstance(value, str)):
            raise RowError(f"the row has {key}, and only text is trained on")


def notes_on_columns(row: Row, layout: Layout) -> Iterator[str]:
    """Yield a note for each column that is passed over although other tools give it a meaning."""
    beside = _beside(row, layout)
    preference = layout.kind != "alpaca"
    if beside.get("kto_tag") is not None or (preference and _truth(beside.get("label")) is not None):
        key = "kto_tag" if beside.get("kto_tag") is not None else "label"
        yield f"{key} is not used further: the answer is trained on as it is"
    elif layout.kind == "alpaca" and _truth(beside.get("label")) is False:
        yield "label is false and is not used: the answer is trained on like any other"
    for key in _REJECTED:
        if _filled(beside.get(key)):
            yield f"{key}, the worse answer of a preference pair, is not used"
    for key in _ONE_MEDIUM:
        if isinstance(beside.get(key), str) and beside[key]:
            yield f"column {key} is not used: only text is trained on"
    if layout.kind != "conversation":
        for key in _THOUGHTS:
            if isinstance(beside.get(key), str) and beside[key]:
                yield f"column {key} is not used: only the answer is trained on"
    for key in _TOKENISED:
        if isinstance(beside.get(key), list):
            yield f"column {key} is not used: rows are tokenised and labelled here"
    mask = beside.get("mask")
    if layout.kind == "conversation" and isinstance(mask, str) and mask.lower() not in ("", "user", "human"):
        yield "column mask is not used: answers are what is trained on"
    if beside.get("weight") is not None and str(beside["weight"]) not in ("1", "1.0"):
        yield "column weight is not used: what a row weighs is up to the method"
    if beside.get("parallel_tool_calls") is not None:
        yield "parallel_tool_calls is not used: it has no meaning in training"
    for key, reason in _NOT_USED.items():
        if is_filled(beside.get(key)):
            yield f"column {key} is not used: {reason}"


def template_variables(row: Row, layout: Layout, columnar: bool) -> dict[str, Any]:
    """Return what a row gives its chat template beside turns and tools.

    Raises:
        RowError: it is no object, or holds something that the pipeline itself sets.
    """
    beside = _beside(row, layout)
    given = beside.get(VARIABLES)
    value = json_or_self(given)
    if value is None:
        value = {}
    if not isinstance(value, dict):
        raise RowError(f"{VARIABLES} is {kind_name(value)}, not an object")
    if columnar and not isinstance(given, str):
        value = without_nulls(value)
    clashing = sorted(OURS & value.keys())
    if clashing:
        raise RowError(f"{VARIABLES} holds {clashing[0]}, which the pipeline sets itself; remove it there")
    documents = beside.get("documents")
    if "documents" not in value and documents and _are_objects(documents):
        value = {**value, "documents": without_nulls(documents) if columnar else documents}
    return dict(value)


def _are_objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, dict) for each in value)


def _beside(row: Row, layout: Layout) -> Mapping[str, Any]:
    """Return the columns that are no part of the conversation."""
    used = set(layout.columns.values())
    beside = {key: value for key, value in row.items() if key not in used}
    return beside | {role: row.get(name) for role, name in layout.beside.items()}


def _truth(value: Any) -> bool | None:
    if isinstance(value, bool):
        return value
    return _TRUTHS.get(value.strip().lower()) if isinstance(value, str) else None


def _is_good(key: str, value: Any, layout: Layout) -> bool:
    """Whether a label lets an answer be trained on; whole numbers are labels only where nothing else is."""
    if key == "label" and layout.kind == "alpaca":
        return True
    if _truth(value) is not None:
        return bool(_truth(value))
    numbers = key == "kto_tag" or layout.kind == "prompt_completion"
    return not (numbers and value in (0, "0"))


def _filled(value: Any) -> bool:
    """Whether a column holds something: a text, bytes, or a list or object that does."""
    value = json_or_self(value)
    if isinstance(value, dict):
        return any(_filled(item) for item in value.values())
    if isinstance(value, (list, tuple)):
        return any(_filled(item) for item in value)
    return isinstance(value, (str, bytes)) and len(value) > 0
