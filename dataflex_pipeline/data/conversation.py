"""A conversation in one form, whatever format it came in, and its content hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ROLES = ("system", "user", "assistant", "tool")


class RowError(Exception):
    """Why one row cannot be used; the text becomes the row's ``reason``."""


@dataclass(frozen=True)
class Message:
    """One turn.

    Attributes:
        role: system, user, assistant or tool.
        content: its text; for a turn that calls tools also the calls, as JSON text.
        calls: the calls as ``{"name": ..., "arguments": {...}}``; empty for other turns.
        words: what a calling turn says besides the calls.
    """

    role: str
    content: str
    calls: tuple[Mapping[str, Any], ...] = ()
    words: str = ""


@dataclass(frozen=True)
class Conversation:
    """Turns in order, and the definitions of the tools that may be called.

    Attributes:
        messages: an optional system turn, then user and assistant turns, tools' answers between.
        tools: one mapping per tool, ``{"type": "function", "function": {...}}``; empty for none.
    """

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()

    @property
    def row_id(self) -> str:
        """Content hash: blake2b-128 (hex) of roles, contents and tools, and of nothing else."""
        turns = [[message.role, message.content] for message in self.messages]
        return content_hash([turns, list(self.tools)])

    def with_system(self, text: str | None) -> Conversation:
        """Return the conversation with a system turn, unless it has one or there is no text."""
        if not text or self.messages[0].role == "system":
            return self
        return Conversation((Message("system", text), *self.messages), self.tools)


def content_hash(value: Any) -> str:
    """Return the blake2b-128 hash (hex) of a plain value's canonical JSON text."""
    return hashlib.blake2b(canonical_json(value).encode("ascii"), digest_size=16).hexdigest()


def canonical_json(value: Any) -> str:
    """Return JSON text with sorted keys and ASCII only, so that any string has one."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=json_text_of)


def json_text_of(value: Any) -> Any:
    """Turn what Parquet and Arrow hold beyond JSON (dates, decimals, bytes) into text."""
    if isinstance(value, bytes):
        return value.hex()
    return str(value)


def check_conversation(messages: Sequence[Message]) -> None:
    """Check the order of roles, and that every turn says something in valid Unicode.

    The order is an optional system turn, then user, assistant, user, assistant ...; after an assistant
    turn, tools may answer (several in a row), and then the assistant goes on. The last turn is the
    assistant's.

    Raises:
        RowError: what is wrong.
    """
    if not any(message.role == "assistant" for message in messages):
        raise RowError("no assistant turn, so there is nothing to learn")
    before = "start"
    for message in messages:
        if before not in _MAY_FOLLOW[message.role]:
            raise RowError(f"wrong order of roles: {message.role} after {before}")
        _check_text(message)
        before = message.role
    if before != "assistant":
        raise RowError(f"the last turn is the {before}'s, so it has no response")


_MAY_FOLLOW = {
    "system": ("start",),
    "user": ("start", "system", "assistant"),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}


def _check_text(message: Message) -> None:
    if not message.content.strip() and message.role in ("user", "assistant"):
        raise RowError("empty response" if message.role == "assistant" else "empty prompt")
    try:
        message.content.encode()
    except UnicodeEncodeError:
        raise RowError("a text is not valid Unicode (it holds half of a surrogate pair)") from None


def parse_tools(value: Any) -> tuple[Mapping[str, Any], ...]:
    """Read tool definitions: a list of mappings, or its JSON text; bare functions are wrapped.

    Raises:
        RowError: not a list of named functions.
    """
    if isinstance(value, str):
        value = _from_json(value, "tools") if value.strip() else []
    if value is None:
        return ()
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise RowError("tools is not a list of objects")
    return tuple(_wrapped(_without_nulls(tool)) for tool in value)


def _wrapped(tool: dict[str, Any]) -> dict[str, Any]:
    whole = tool if isinstance(tool.get("function"), dict) else {"type": "function", "function": tool}
    function: Any = whole["function"]
    if not isinstance(function.get("name"), str):
        raise RowError("tools holds a function without a name")
    return whole


def _without_nulls(value: Any) -> Any:
    """Drop null members: columnar files fill every object with the keys of all the others."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def parse_calls(value: Any, where: str) -> tuple[Mapping[str, Any], ...]:
    """Read tool calls: JSON text, one mapping or several, plain or as OpenAI's ``tool_calls``.

    Args:
        value: what the data holds. where: name of the field, for reasons.

    Returns:
        ``{"name": ..., "arguments": {...}}`` per call, arguments parsed.

    Raises:
        RowError: not calls of named functions with an object of arguments.
    """
    value = _from_json(value, where) if isinstance(value, str) else _without_nulls(value)
    calls = value if isinstance(value, list) else [value]
    if not calls:
        raise RowError(f"{where} holds no call")
    return tuple(_parse_call(call, where) for call in calls)


def _parse_call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowError(f"{where} is not a call with a name")
    arguments = function.get("arguments", function.get("parameters"))
    if isinstance(arguments, str):
        arguments = _from_json(arguments, f"arguments in {where}") if arguments.strip() else {}
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, dict):
        raise RowError(f"arguments in {where} are not an object")
    return {"name": function["name"], "arguments": arguments}


def calls_text(calls: Sequence[Mapping[str, Any]]) -> str:
    """Return calls as JSON text: one object for one call, an array for several."""
    value = calls[0] if len(calls) == 1 else list(calls)
    return json.dumps(value, ensure_ascii=False)


def _from_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise RowError(f"{where} is not valid JSON") from None
