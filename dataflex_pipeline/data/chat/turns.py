"""Turns in the form that a chat template takes: the keys that it reads, tools and calls as it knows them.

The keys are those that its text reads from a message: ``m.key``, ``m['key']``, ``m.get('key')``. A name
stands for a message, or for a list of them, if it is ``messages``, is set to such a thing (a part of the
list, a filtered one, an item), runs over it in a loop, or is the parameter of a macro that gets it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jinja2 import TemplateSyntaxError, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dataflex_pipeline.data.conversation import Message
from dataflex_pipeline.data.formats.marks import REASONING

_GENERATION = re.compile(r"\{%[-+]?\s*(end)?generation\s*[-+]?%\}")
"""A tag that transformers adds; it changes nothing in what is read."""
_OF_LISTS = frozenset(
    {
        "list",
        "first",
        "last",
        "reverse",
        "sort",
        "select",
        "reject",
        "selectattr",
        "rejectattr",
        "default",
        "d",
    }
)
"""Filters whose result is made of messages, if they get such."""
_BY_KEY = frozenset({"selectattr", "rejectattr", "map", "sort", "groupby"})
"""Filters that look at a key of each message."""


def message_keys(text: str) -> frozenset[str]:
    """Return the keys that a template reads from any message; none of a text that is no template."""
    parser = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    try:
        tree = parser.parse(_GENERATION.sub("", text))
    except (TemplateSyntaxError, RecursionError):
        return frozenset()
    names = {"messages"}
    while new := set(_more_names(tree, names)) - names:
        names |= new
    return frozenset(_keys(tree, names))


def _more_names(tree: nodes.Template, names: set[str]) -> Iterator[str]:
    """Yield the names that get a message, or a list of them."""
    given: list[tuple[nodes.Node, nodes.Node]] = []
    given += [(loop.target, loop.iter) for loop in tree.find_all(nodes.For)]
    given += [(each.target, each.node) for each in tree.find_all(nodes.Assign)]
    macros = {macro.name: macro.args for macro in tree.find_all(nodes.Macro)}
    for call in tree.find_all(nodes.Call):
        if isinstance(call.node, nodes.Name):
            given += zip(macros.get(call.node.name, ()), call.args, strict=False)
    for target, value in given:
        if not _is_message(value, names):
            continue
        if isinstance(target, nodes.Name):
            yield target.name
        elif isinstance(target, nodes.NSRef):
            yield f"{target.name}.{target.attr}"


def _is_message(node: nodes.Node | None, names: set[str]) -> bool:
    """Whether an expression is a message, or a list of them."""
    if isinstance(node, nodes.Name):
        return node.name in names
    if isinstance(node, nodes.Getattr):
        named = isinstance(node.node, nodes.Name) and f"{node.node.name}.{node.attr}" in names
        return named or node.attr in ("previtem", "nextitem")
    if isinstance(node, nodes.Getitem):
        return _text(node.arg) is None and _is_message(node.node, names)
    if isinstance(node, nodes.Filter):
        return node.name in _OF_LISTS and _is_message(node.node, names)
    if isinstance(node, nodes.CondExpr):
        return _is_message(node.expr1, names) or _is_message(node.expr2, names)
    if isinstance(node, nodes.BinExpr):
        return _is_message(node.left, names) or _is_message(node.right, names)
    return isinstance(node, nodes.List) and any(_is_message(item, names) for item in node.items)


def _keys(tree: nodes.Template, names: set[str]) -> Iterator[str]:
    for read in tree.find_all(nodes.Getattr):
        if _is_message(read.node, names):
            yield read.attr
    for item in tree.find_all(nodes.Getitem):
        if _is_message(item.node, names):
            yield from _texts([item.arg])
    for test in tree.find_all(nodes.Compare):
        if any(_is_message(each.expr, names) for each in test.ops):
            yield from _texts([test.expr])
    for sieve in tree.find_all(nodes.Filter):
        if sieve.name in _BY_KEY and _is_message(sieve.node, names):
            yield from _texts([*sieve.args[:1], *(each.value for each in sieve.kwargs)])
    for call in tree.find_all(nodes.Call):
        got = call.node
        if isinstance(got, nodes.Getattr) and got.attr == "get" and _is_message(got.node, names):
            yield from _texts(call.args[:1])


def _text(node: nodes.Node) -> str | None:
    return node.value if isinstance(node, nodes.Const) and isinstance(node.value, str) else None


def _texts(found: list[nodes.Expr]) -> Iterator[str]:
    yield from (text for node in found if (text := _text(node)) is not None)


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
