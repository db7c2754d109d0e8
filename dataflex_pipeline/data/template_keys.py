"""The keys that a chat template's text reads from a message: ``m.key``, ``m['key']``, ``m.get('key')``.

A name stands for a message, or for a list of them, if it is ``messages``, is set to such a thing (a part of
the list, a filtered one, an item), runs over it in a loop, or is the parameter of a macro that gets it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from jinja2 import TemplateSyntaxError, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

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
    except TemplateSyntaxError:
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
