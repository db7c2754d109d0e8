"""Fields of a row beside the text of its conversation: tool calls, and columns other tools give a meaning to.

- ``label`` (unpaired preference, TRL and ms-swift) and ``kto_tag``: an answer that is labelled bad is not
  trained on: the row is refused.
- ``rejected``, ``rejected_response``, ``rejected_messages``: the worse half of a pair is not trained on.
- ``images``, ``videos``, ``audios`` and their singulars: rows with any are refused.
- ``chat_template_kwargs`` and ``documents``: given to the chat template.
- the rest is passed over, and noted.

Null members: JSON says what it says, so ``{"hotel": null}`` stays. Columnar files (Parquet, Arrow, hub data
sets) fill every object with the keys of all the others, so there a null member is padding and is left out;
calls and tools that such a file holds as JSON text keep theirs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dataflex_pipeline.data.conversation import Message, RowError
from dataflex_pipeline.data.formats.layout import Layout, json_or_self
from dataflex_pipeline.data.settings import Row
from dataflex_pipeline.data.sources.columns import is_filled
from dataflex_pipeline.data.sources.compressed import kind_name
from dataflex_pipeline.data.sources.json_bounds import parsed

NULL_ARGUMENT = "a null argument of a tool call is read as the padding of a columnar file, and left out"


@dataclass(frozen=True)
class Turn:
    """A turn as it was read, before results are paired with their calls.

    Attributes:
        message: the turn.
        ids: of a calling turn the id of each call; of a tool's turn the id of the call that it answers; None
            where the data has none.
        notes: what of the turn was passed over or read otherwise.
    """

    message: Message
    ids: tuple[str | None, ...] = ()
    notes: tuple[str, ...] = ()


def parse_tools(value: Any, columnar: bool = False) -> tuple[Mapping[str, Any], ...]:
    """Read tool definitions: a list of mappings, or its JSON text; bare functions are wrapped.

    Args:
        value: what the data holds. columnar: whether null members are padding.

    Raises:
        RowError: not a list of named functions.
    """
    if isinstance(value, str):
        columnar = False
        value = _from_json(value, "tools") if value.strip() else []
    if value is None:
        return ()
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise RowError("tools is not a list of objects")
    return tuple(_wrapped(without_nulls(tool) if columnar else tool) for tool in value)


def _wrapped(tool: dict[str, Any]) -> dict[str, Any]:
    whole = tool if isinstance(tool.get("function"), dict) else {"type": "function", "function": tool}
    function: Any = whole["function"]
    if not isinstance(function.get("name"), str):
        raise RowError("tools holds a function without a name")
    return whole


def without_nulls(value: Any) -> Any:
    """Drop null members of objects, at any depth."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def calls_turn(value: Any, where: str, words: str, columnar: bool = False) -> Turn:
    """Read tool calls: JSON text, one mapping or several, plain or as OpenAI's ``tool_calls``.

    Args:
        value: what the data holds. where: name of the field, for reasons. words: said besides the calls.
        columnar: whether null members are padding.

    Raises:
        RowError: not calls of named functions with an object of arguments.
    """
    given = _from_json(value, where) if isinstance(value, str) else value
    columnar = columnar and not isinstance(value, str)
    listed = given if isinstance(given, list) else [given]
    if not listed:
        raise RowError(f"{where} holds no call")
    calls = tuple(_parse_call(call, where, columnar) for call in listed)
    notes = () if all(call == kept for call, kept in calls) else (NULL_ARGUMENT,)
    ids = tuple(_id_of(call.get("id")) for call in listed)
    kept_calls = tuple(kept for _, kept in calls)
    text = calls_text(kept_calls)
    content = f"{words}\n{text}" if words else text
    return Turn(Message("assistant", content, kept_calls, words), ids, notes)


def _id_of(value: Any) -> str | None:
    return None if value is None or value == "" else str(value)


def _parse_call(call: Any, where: str, columnar: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a call as the data has it, and without the padding of a columnar file."""
    function = call.get("function") if isinstance(call, dict) else None
    function = call if function is None else function
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowError(f"{where} is not a call with a name")
    arguments = function.get("arguments")
    arguments = function.get("parameters") if arguments is None else arguments
    if isinstance(arguments, str):
        columnar = False
        arguments = _from_json(arguments, f"arguments in {where}") if arguments.strip() else {}
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, dict):
        raise RowError(f"arguments in {where} are not an object")
    kept = without_nulls(arguments) if columnar else arguments
    return {"name": function["name"], "arguments": arguments}, {"name": function["name"], "arguments": kept}


def calls_text(calls: Sequence[Mapping[str, Any]]) -> str:
    """Return calls as JSON text: one object for one call, an array for several."""
    value = calls[0] if len(calls) == 1 else list(calls)
    return json.dumps(value, ensure_ascii=False)


def paired(turns: Sequence[Turn]) -> list[Message]:
    """Pair the results of tools with the calls of the turn before them, by id.

    A result without an id, or after calls that have none, answers the next call that has no answer yet.

    Returns:
        The turns; where results come in another order than the calls, each says which call it answers.

    Raises:
        RowError: a result has an id that no call before it has, or that was answered already.
    """
    messages = [turn.message for turn in turns]
    count = 0
    for place, turn in enumerate(turns):
        if not turn.message.calls:
            continue
        stop = next(
            (later for later in range(place + 1, len(turns)) if messages[later].role != "tool"), len(turns)
        )
        numbers = _numbers(turn.ids, [result.ids[0] for result in turns[place + 1 : stop]])
        if numbers != sorted(numbers):
            for later, number in zip(range(place + 1, stop), numbers, strict=True):
                messages[later] = replace(messages[later], answers=count + number)
        count += len(turn.message.calls)
    return messages


def _numbers(calls: Sequence[str | None], results: Sequence[str | None]) -> list[int]:
    """Return which call (from 0) each result answers; numbers beyond the calls answer none."""
    waiting = list(range(len(calls)))
    numbers = []
    for result in results:
        if result is None or not any(calls):
            number = waiting[0] if waiting else len(calls)
        else:
            number = next((each for each in waiting if calls[each] == result), -1)
        if number < 0:
            told = "was answered before" if result in calls else "no call before it has"
            raise RowError(f"a tool's result has a tool_call_id that {told}")
        numbers.append(number)
        if number in waiting:
            waiting.remove(number)
    return numbers


def _from_json(text: str, where: str) -> Any:
    try:
        return parsed(text)
    except ValueError:
        raise RowError(f"{where} is not valid JSON") from None


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
