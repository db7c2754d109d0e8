"""Reading and writing YAML: numbers as people write them, no duplicate keys, the line of every key.

Four things differ from PyYAML's ``safe_load``: ``1e-4`` is a number (YAML 1.2), dates and clock times
(``1:30`` would be 90) stay text, keys are text as they are written (``null``, ``true``, ``1.0``), and a key
given twice is an error instead of the last one winning.
"""

from __future__ import annotations

import copy
import functools
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dataflex_pipeline.errors import ConfigError

_FLOAT = re.compile(
    r"""^(?:[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?
        |[-+]?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?
        |[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+
        |[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$""",
    re.VERBOSE,
)
_BOOL = re.compile(r"^(?:yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF)$")
_INT = re.compile(r"^(?:[-+]?(?:0|[1-9][0-9_]*)|0x[0-9a-fA-F]+)$")
_NULL = re.compile(r"^(?:~|null|Null|NULL|)$")
_ODD_BREAKS = re.compile("[\r\x85\u2028\u2029]")
# kind, pattern, characters that such a scalar may start with
_RESOLVERS: tuple[tuple[str, re.Pattern[str], list[str]], ...] = (
    ("bool", _BOOL, list("yYnNtTfFoO")),
    ("int", _INT, list("-+0123456789")),
    ("float", _FLOAT, list("-+.0123456789")),
    ("null", _NULL, ["~", "n", "N", ""]),
    ("merge", re.compile(r"^<<$"), ["<"]),
)


_MERGE = "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    """SafeLoader with the resolvers of this module; it builds plain data only, never objects."""


class _Dumper(yaml.SafeDumper):
    """SafeDumper that also quotes text which only this module would read as a number."""

    def ignore_aliases(self, data: Any) -> bool:
        """Write repeated values out in full: aliases are hard to read and to edit."""
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    """Write line breaks other than newline as escapes: PyYAML would read them back as something else."""
    style = '"' if _ODD_BREAKS.search(text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)
_Loader.yaml_implicit_resolvers = {}
for _kind, _pattern, _starts in _RESOLVERS:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", _pattern, _starts)
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


LARGEST_FILE = 1 << 24
"""Bytes of a file of settings at most."""
MOST_VALUES = 1_000_000
"""Values and characters that a text may stand for with every alias written out; a few lines of aliases can
stand for more than any memory holds."""


@dataclass(frozen=True)
class Layer:
    """Keys and values from one place: a file, the command line or an earlier run.

    Attributes:
        label: what the place is called in messages.
        values: the keys as they stand there.
        lines: path of keys -> line number, counted from 1; empty where there are no lines.
        merge: dictionaries are merged into those of lower layers instead of replacing them.
    """

    label: str
    values: dict[str, Any]
    lines: Mapping[tuple[str, ...], int] = field(default_factory=dict)
    merge: bool = False

    def place(self, *path: str) -> str:
        """Return where a key stands: "configs/a.yaml, line 3" or only the label."""
        line = self.lines.get(path)
        return self.label if line is None else f"{self.label}, line {line}"


def read_yaml(path: Path, label: str | None = None) -> Layer:
    """Read a YAML file that holds a mapping.

    Raises:
        ConfigError: there is no such file, or it is no YAML, no UTF-8, no mapping, or names a key twice.
    """
    label = label or str(path)
    layer = _parsed(_read_text(path, label), label)
    return Layer(label, copy.deepcopy(layer.values), dict(layer.lines))


@functools.lru_cache(maxsize=16)
def _parsed(text: str, label: str) -> Layer:
    """Parse a file's text. A command asks for the methods' parameters again and again, at 40 ms each time."""
    root = _compose(text, label)
    if root is None or (isinstance(root, yaml.ScalarNode) and not root.value):
        return Layer(label, {})
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(
            f"{label} holds {_NODE_NAMES[type(root)]}.",
            "A configuration is a mapping of keys to values.",
            "Write one 'key: value' per line.",
        )
    lines = _checked(root, label)
    return Layer(label, {str(k): v for k, v in _construct(root, label).items()}, lines)


def parse_value(text: str, label: str) -> Any:
    """Parse one value as YAML: a scalar, ``[a, b]`` or ``{a: 1}``; ``label`` names it in errors."""
    root = _compose(text, label)
    if root is None:
        return None
    _checked(root, label)
    return _construct(root, label)


def dump_yaml(values: Mapping[str, Any]) -> str:
    """Write a mapping as YAML that this module and plain PyYAML read back to the same values."""
    return yaml.dump(dict(values), Dumper=_Dumper, allow_unicode=True, sort_keys=False, width=10_000)


_NODE_NAMES = {yaml.ScalarNode: "a single value", yaml.SequenceNode: "a list", yaml.MappingNode: "a mapping"}


def _read_text(path: Path, label: str) -> str:
    what = f"{label} was given as a configuration file."
    try:
        if not stat.S_ISREG(path.stat().st_mode) and not path.is_dir():
            why = "It is a pipe or a device, and a configuration is read more than once."
            raise ConfigError(what, why, "Write it to a file, and give that.")
        with path.open("rb") as stream:
            content = stream.read(LARGEST_FILE + 1)
        if len(content) > LARGEST_FILE:
            why = f"It is larger than {LARGEST_FILE >> 20} MiB, so it is something else."
            raise ConfigError(what, why, "Give a YAML file of settings.")
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        why = f"It is not UTF-8 text (byte {error.start})."
        raise ConfigError(what, why, "Save it as UTF-8.") from error
    except FileNotFoundError as error:
        raise ConfigError(what, "There is no such file.", "Check the path.") from error
    except IsADirectoryError as error:
        raise ConfigError(what, "It is a folder.", "Give a YAML file.") from error
    except OSError as error:
        why = f"It cannot be read: {error.strerror}."
        raise ConfigError(what, why, "Check the path and its permissions.") from error


def _compose(text: str, label: str) -> yaml.Node | None:
    try:
        return yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise _syntax_error(error, label) from error
    except RecursionError as error:
        raise _too_deep(label) from error


def _construct(node: yaml.Node, label: str) -> Any:
    try:
        return _Loader("").construct_document(node)
    except yaml.YAMLError as error:
        raise _syntax_error(error, label) from error
    except RecursionError as error:
        raise _too_deep(label) from error
    except (ValueError, KeyError, AttributeError, TypeError) as error:  # a tag such as !!int on other text
        found = str(error).partition(":")[0] if "integer string conversion" in str(error) else str(error)
        raise ConfigError(
            f"{label} holds a value that does not fit its type: {found[:200]}.",
            "A value with a tag (such as !!int), or a number of thousands of digits, cannot be read so.",
            "Write plain values.",
        ) from error


def _syntax_error(error: yaml.YAMLError, label: str) -> ConfigError:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    where = f"{label}, line {mark.line + 1}, column {mark.column + 1}" if mark else label
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    return ConfigError(
        f"{where}: this is not valid YAML.",
        f"The parser says: {problem}.",
        "Check indentation, colons and quotes there; indent with spaces, and quote text that holds ': '.",
    )


def _too_deep(label: str) -> ConfigError:
    return ConfigError(
        f"{label} is nested too deeply.", "It cannot be read.", "Write at most a few levels of nesting."
    )


def _checked(root: yaml.Node, label: str) -> dict[tuple[str, ...], int]:
    """Return the line of every key; refuse what cannot be meant: see `_walk` and `MOST_VALUES`."""
    lines: dict[tuple[str, ...], int] = {}
    try:
        _walk(root, (), lines, label, active=set(), done=set())
        size = _size(root, {})
    except RecursionError as error:
        raise _too_deep(label) from error
    if size > MOST_VALUES:
        raise ConfigError(
            f"{label} stands for more than {MOST_VALUES:,} values once its aliases (*name) are written out.",
            "It would fill any memory, and no configuration is as large.",
            "Drop the aliases, or write out what is meant.",
        )
    return lines


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """Return how many values and characters a node stands for, every alias counted as what it stands for."""
    if isinstance(node, yaml.ScalarNode):
        return 1 + len(node.value)
    if id(node) not in known:
        pairs = node.value if isinstance(node, yaml.MappingNode) else ()
        parts = [each for pair in pairs for each in pair] if pairs else node.value
        known[id(node)] = 1 + sum(_size(each, known) for each in parts)
    return known[id(node)]


def _walk(
    node: yaml.Node,
    path: tuple[str, ...],
    lines: dict[tuple[str, ...], int],
    label: str,
    active: set[int],
    done: set[int],
) -> None:
    """Note the line of every key; refuse a key that is given twice and a value that holds itself.

    Keys are text from here on.
    """
    if id(node) in active:
        line = node.start_mark.line + 1
        raise ConfigError(
            f"{label}, line {line}: a value holds itself.", "That never ends.", "Drop the alias."
        )
    if id(node) in done or isinstance(node, yaml.ScalarNode):
        return
    active.add(id(node))
    if isinstance(node, yaml.MappingNode):
        _check_duplicates(node, path, lines, label)
        for name, value in node.value:
            if isinstance(name, yaml.ScalarNode) and name.tag != _MERGE:
                name.tag = "tag:yaml.org,2002:str"
            _walk(value, (*path, str(name.value)), lines, label, active, done)
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            _walk(value, (*path, str(i)), lines, label, active, done)
    active.discard(id(node))
    done.add(id(node))


def _check_duplicates(
    node: yaml.MappingNode, path: tuple[str, ...], lines: dict[tuple[str, ...], int], label: str
) -> None:
    seen: dict[str, int] = {}
    for name, _ in node.value:
        text, line = str(name.value), name.start_mark.line + 1
        if text in seen and name.tag != _MERGE:
            full = ".".join((*path, text))
            raise ConfigError(
                f"{label}, line {line}: {full} is given twice, first in line {seen[text]}.",
                "Only one of the two could count.",
                "Delete one of them.",
            )
        seen[text] = line
        lines[(*path, text)] = line
