"""Rows of every format as conversations.

An alpaca prompt is instruction and input joined by a line break. Texts in prompt/completion become one
user and one assistant turn. A function_call turn (sharegpt) or an assistant's tool_calls (OpenAI)
becomes an assistant turn whose content is the call's JSON text; observation becomes a turn of role
tool.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dataflex_pipeline.data.conversation import (
    Conversation,
    Message,
    RowError,
    calls_text,
    check_conversation,
    parse_calls,
    parse_tools,
)
from dataflex_pipeline.data.layout import Layout, json_or_self
from dataflex_pipeline.data.settings import Row
from dataflex_pipeline.data.text_files import kind_name


def to_conversation(row: Row, layout: Layout) -> Conversation:
    """Return a row as a conversation that has been checked.

    Raises:
        RowError: why the row cannot be used.
    """
    read = {"alpaca": _alpaca, "conversation": _turns, "prompt_completion": _prompt_completion}
    messages = read[layout.kind](row, layout)
    check_conversation(messages)
    tools = parse_tools(row.get(layout.columns["tools"])) if "tools" in layout.columns else ()
    return Conversation(tuple(messages), tools)


def _alpaca(row: Row, layout: Layout) -> list[Message]:
    prompt = "\n".join(part for part in (_field(row, layout, "prompt"), _field(row, layout, "query")) if part)
    response = _field(row, layout, "response", required=True)
    messages = _system(row, layout)
    for user, assistant in _history(row, layout):
        messages += [Message("user", user), Message("assistant", assistant)]
    return [*messages, Message("user", prompt), Message("assistant", response)]


def _field(row: Row, layout: Layout, role: str, required: bool = False) -> str:
    name = layout.columns.get(role)
    if name is None:
        return ""
    value = row.get(name)
    if value is None and not required:
        return ""
    if not isinstance(value, str):
        state = "missing" if name not in row else kind_name(value)
        raise RowError(f"{name} is {state}, not text" if value is not None else f"{name} is {state}")
    return value


def _system(row: Row, layout: Layout) -> list[Message]:
    text = _field(row, layout, "system")
    return [Message("system", text)] if text else []


def _history(row: Row, layout: Layout) -> list[tuple[str, str]]:
    pairs = json_or_self(row.get(layout.columns.get("history", "")))
    if not pairs:
        return []
    good = isinstance(pairs, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)
        for pair in pairs
    )
    if not good:
        raise RowError("history is not a list of [prompt, response] pairs of texts")
    return [(user, assistant) for user, assistant in pairs]


def _turns(row: Row, layout: Layout) -> list[Message]:
    name = layout.columns["messages"]
    messages = _messages(row.get(name), name, layout.tags)
    if messages[0].role == "system":
        return messages
    return [*_system(row, layout), *messages]


def _messages(value: Any, name: str, tags: Mapping[str, str]) -> list[Message]:
    turns = json_or_self(value)
    if not isinstance(turns, list):
        raise RowError(f"{name} is {kind_name(turns)}, not a list of turns")
    if not turns:
        raise RowError(f"{name} has no turns")
    return [message for turn in turns if (message := _message(turn, tags)) is not None]


def _message(turn: Any, tags: Mapping[str, str]) -> Message:
    if not isinstance(turn, dict):
        raise RowError(f"a turn is {kind_name(turn)}, not an object")
    if turn.get(tags["role_tag"]) is None:
        raise RowError(f"a turn has no '{tags['role_tag']}'")
    role = _role(str(turn[tags["role_tag"]]), tags)
    content = _content(turn.get(tags["content_tag"]), tags["content_tag"])
    if role == "function":
        if content is None:
            raise RowError("a function_call turn is empty")
        calls = parse_calls(content, "a function_call turn")
        return Message("assistant", content, calls)
    if role == "assistant" and turn.get("tool_calls"):
        calls = parse_calls(turn["tool_calls"], "tool_calls")
        text = calls_text(calls)
        return Message("assistant", f"{content}\n{text}" if content else text, calls, content or "")
    if content is None:
        raise RowError(f"a turn of role {role} has no '{tags['content_tag']}'")
    return Message(role, content)


def _role(given: str, tags: Mapping[str, str]) -> str:
    roles = {
        tags["system_tag"]: "system",
        tags["user_tag"]: "user",
        tags["assistant_tag"]: "assistant",
        tags["observation_tag"]: "tool",
        tags["function_tag"]: "function",
    }
    if given not in roles:
        raise RowError(f"unknown role '{given}' (known: {', '.join(roles)})")
    return roles[given]


def _content(value: Any, tag: str) -> str | None:
    """Return a turn's text; OpenAI's lists of text parts are joined."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(part, dict) for part in value):
        kinds = sorted({str(part.get("type", "text")) for part in value} - {"text"})
        if kinds:
            raise RowError(f"a turn holds {kinds[0]}, and only text is trained on")
        texts = [part.get("text") for part in value]
        if all(isinstance(text, str) for text in texts):
            return "".join(str(text) for text in texts)
    raise RowError(f"{tag} of a turn is {kind_name(value)}, not text")


def _prompt_completion(row: Row, layout: Layout) -> list[Message]:
    messages = [] if _starts_with_system(row, layout) else _system(row, layout)
    for role, speaker in (("prompt", "user"), ("response", "assistant")):
        name = layout.columns[role]
        value = row.get(name)
        if isinstance(value, list):
            messages += _messages(value, name, layout.tags)
        else:
            messages.append(Message(speaker, _field(row, layout, role, required=True)))
    return messages


def _starts_with_system(row: Row, layout: Layout) -> bool:
    prompt = row.get(layout.columns["prompt"])
    first = prompt[0] if isinstance(prompt, list) and prompt else None
    return isinstance(first, dict) and first.get(layout.tags["role_tag"]) == layout.tags["system_tag"]
