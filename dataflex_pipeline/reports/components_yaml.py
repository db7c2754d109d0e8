"""The shipped components.yaml as text: every method's parameters, defaults and meanings, from its Params.

``python -m dataflex_pipeline.reports.components_yaml`` (or ``make configs``) writes the file anew.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from dataflex_pipeline.config.shipped import shipped_configs
from dataflex_pipeline.methods import method_class, shipped_methods

NAME = "components.yaml"
COLUMN = 30
"""Where comments begin, if what they are about ends before."""
WIDTH = 110
HEADER = """\
# Every method with all of its parameters and their defaults. Made by `make configs` from the methods' Params.
#
# A file of your own (components_cfg_file) needs only what differs, and may add methods:
#   my_method:
#     name: my_method
#     file: my_method.py      # a Python file beside that YAML file, or `module:` for an installed one
#     params: {threshold: 0.5}
# On the command line: loss.focus=low
# Every method also takes save_interval (rows per part) and seed (a random stream of its own for
# scores; rows are drawn by the seed of the run).
"""
_PLAIN = re.compile(r"[A-Za-z](?:[\w./:\-]*[\w./\-])?")
_WORDS = ("true", "false", "null", "yes", "no", "on", "off", "y", "n")


def components_yaml() -> str:
    """Return the text of the shipped components.yaml."""
    return HEADER + "".join("\n" + _method(name) for name in shipped_methods())


def write_components_yaml() -> None:
    """Write the shipped components.yaml."""
    (shipped_configs() / NAME).write_text(components_yaml(), encoding="utf-8")


def _method(name: str) -> str:
    kind = method_class(name)
    lines = [*_commented(f"{name}:", kind.summary), f"  name: {name}", "  params:"]
    for parameter, info in kind.Params.model_fields.items():
        default = to_jsonable_python(info.get_default(call_default_factory=True))
        inner = info.json_schema_extra if isinstance(info.json_schema_extra, Mapping) else {}
        lines += _parameter(parameter, default, {"": _meaning(info), **inner}, "", 4)
    return "\n".join(lines) + "\n"


def _meaning(info: FieldInfo) -> str:
    """Return what a parameter means, with the values to choose from where the text leaves some out."""
    text, choices = info.description or "", _choices(info.annotation)
    named = all(re.search(rf"\b{re.escape(choice)}\b", text) for choice in choices)
    return text if named else f"{text} ({', '.join(choices)})"


def _choices(annotation: Any) -> list[str]:
    """Return the words that a type allows, where it lists them."""
    if get_origin(annotation) is Literal:
        return [str(choice) for choice in get_args(annotation)]
    return [choice for inner in get_args(annotation) for choice in _choices(inner)]


def _parameter(
    name: str, default: Any, meanings: Mapping[str, Any], place: str, indent: int
) -> Iterator[str]:
    """Yield the lines of a parameter, or of each of its settings where it is a mapping of them.

    Args:
        name: of the parameter or setting.
        default: its default, as plain data.
        meanings: what the whole ("") and each setting (a path with dots) mean.
        place: of the setting inside the parameter, "" for the whole.
        indent: blanks before it.
    """
    start, meaning = " " * indent + f"{name}:", str(meanings.get(place) or "")
    if not isinstance(default, Mapping) or not default:
        yield from _commented(f"{start} {_value(default)}", meaning)
        return
    yield from _commented(start, meaning)
    for key, value in default.items():
        yield from _parameter(key, value, meanings, f"{place}.{key}" if place else key, indent + 2)


def _value(value: Any) -> str:
    """Return a value in YAML on one line: JSON, but for the quotes that plain words do without."""
    if isinstance(value, str) and _PLAIN.fullmatch(value) and value.lower() not in _WORDS:
        return value
    return json.dumps(value, ensure_ascii=False)


def _commented(line: str, meaning: str) -> list[str]:
    """Return a line with its meaning beside it, and below where that is longer than a line."""
    if not meaning:
        return [line]
    column = max(COLUMN, len(line) + 2)
    first, *more = textwrap.wrap(meaning, WIDTH - column - 2, break_long_words=False, break_on_hyphens=False)
    return [f"{line:<{column}}# {first}", *(" " * column + f"# {each}" for each in more)]


if __name__ == "__main__":
    write_components_yaml()
