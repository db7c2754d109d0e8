"""Tools, the calls of them, and which result answers which call.

Null members: JSON says what it says, so ``{"hotel": null}`` stays. Columnar files (Parquet, Arrow, hub data
sets) fill every object with the keys of all the others, so there a null member is padding and is left out;
calls and tools that such a file holds as JSON text keep theirs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dataflex_pipeline.data.conversation import Message, RowError

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
        return json.loads(text)
    except ValueError:
        raise RowError(f"{where} is not valid JSON") from None
