"""Turns as a chat template takes them: what its text reads, tools and calls in the form that it knows."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dataflex_pipeline.data.conversation import Message
from dataflex_pipeline.data.marks import REASONING
from dataflex_pipeline.data.template_keys import message_keys


@dataclass(frozen=True)
class Reads:
    """What a template's text mentions, and so can write.

    Attributes:
        tools: definitions of tools. calls: calls in a form of its own. ids: the ids of calls and results.
        reasoning: the names under which it takes an assistant's reasoning.
        keys: what it reads from a message.
    """

    text: str
    tools: bool
    calls: bool
    ids: bool
    reasoning: tuple[str, ...]
    keys: frozenset[str]

    @classmethod
    def of(cls, text: str) -> Reads:
        """Look a template's text through."""
        names = tuple(name for name in REASONING if _mentions(text, name))
        return cls(
            text,
            _mentions(text, "tools"),
            "tool_calls" in text,
            "tool_call_id" in text,
            names,
            message_keys(text) - {"role", "content"},
        )

    def variable(self, name: str) -> bool:
        """Whether the template mentions a variable."""
        return _mentions(self.text, name)


def _mentions(text: str, name: str) -> bool:
    return re.search(rf"\b{re.escape(name)}\b", text) is not None


def tools_text(tools: Sequence[Mapping[str, Any]]) -> str:
    """Return tool definitions in plain text, for templates that have no form of their own."""
    lines = [json.dumps(tool["function"], ensure_ascii=False) for tool in tools]
    return (
        "You can call these tools, each described by a JSON object:\n"
        + "\n".join(lines)
        + '\nTo call one, answer with {"name": <name of the tool>, "arguments": {<its arguments>}} '
        "and nothing else."
    )


def with_tools_text(
    messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], default_system: str
) -> list[Message]:
    """Return turns whose system prompt ends with the definitions of the tools."""
    turns = list(messages)
    system = turns.pop(0) if turns[0].role == "system" else Message("system", default_system)
    return [replace(system, content=f"{system.content}\n\n{tools_text(tools)}".lstrip("\n")), *turns]


def reordered(messages: Sequence[Message], reads: Reads) -> bool:
    """Whether results of tools are written in another order than they have in the data."""
    return not reads.ids and any(message.answers is not None for message in messages)


def as_dicts(messages: Sequence[Message], reads: Reads) -> list[dict[str, Any]]:
    """Return turns as chat templates take them; a tool's result carries the id of its call.

    A template that does not write ids gets results in the order of their calls: nothing else would tell
    which answers which.
    """
    made: list[dict[str, Any]] = []
    waiting: dict[int, str] = {}
    count = 0
    for message in _by_calls(messages) if reordered(messages, reads) else messages:
        turn: dict[str, Any] = {**message.others, "role": message.role, "content": message.content}
        if message.calls:
            waiting = {count + place: str(call["name"]) for place, call in enumerate(message.calls)}
            if reads.calls:
                turn |= {"content": message.words, "tool_calls": _numbered(message.calls, count)}
            count += len(message.calls)
        elif message.role == "tool":
            number = message.answers if message.answers is not None else next(iter(waiting), count)
            function = waiting.pop(number, "")
            turn |= {"tool_call_id": _id(number)} | ({"name": function} if function else {})
        if message.reasoning:
            turn |= dict.fromkeys(reads.reasoning, message.reasoning)
        made.append(turn | ({"name": message.speaker} if message.speaker else {}))
    return made


def _id(number: int) -> str:
    return f"call{number:05d}"


def _numbered(calls: Sequence[Mapping[str, Any]], first: int) -> list[dict[str, Any]]:
    return [
        {"id": _id(first + place), "type": "function", "function": dict(call)}
        for place, call in enumerate(calls)
    ]


def _by_calls(messages: Sequence[Message]) -> list[Message]:
    """Return turns with each run of tool results in the order of the calls."""
    ordered: list[Message] = []
    run: list[Message] = []
    for message in messages:
        if message.role == "tool":
            run.append(message)
            continue
        ordered += [*_sorted_run(run), message]
        run = []
    return [*ordered, *_sorted_run(run)]


def _sorted_run(run: Sequence[Message]) -> list[Message]:
    if any(message.answers is None for message in run):
        return list(run)
    return [
        replace(message, answers=None) for message in sorted(run, key=lambda message: message.answers or 0)
    ]
