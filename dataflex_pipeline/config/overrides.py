"""Overrides on the command line: ``key=value``, ``method.parameter=value``, ``mapping_key.name=value``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dataflex_pipeline.config.fields import Config
from dataflex_pipeline.config.redaction import HIDDEN, is_secret_name, redacted_source
from dataflex_pipeline.config.values import accepted, is_mapping, is_text
from dataflex_pipeline.config.yaml_files import Layer, parse_value
from dataflex_pipeline.errors import ConfigError

COMMAND_LINE = "command line"
SHOWN = 80
"""Characters of a value that a message about it shows, as in `values.show`."""


def override_layers(overrides: Sequence[str]) -> tuple[list[Layer], list[str]]:
    """Parse overrides, one layer each, so that later ones lie over earlier ones.

    Returns:
        The layers, and a notice for every key that is given more than once.

    Raises:
        ConfigError: an override that is not key=value, or whose value is no YAML.
    """
    layers, notices = [], []
    given: set[str] = set()
    for text in overrides:
        name, equals, value = text.partition("=")
        name = name.strip()
        if not equals or not all(name.split(".")):
            raise ConfigError(
                f"'{redacted_source(text)}' on the command line is not understood.",
                "An override is key=value, with no spaces around the equals sign.",
                "Write for example learning_rate=1e-4, loss.focus=low or 'source_quotas={code: 0.5}'.",
            )
        if name in given:
            notices.append(f"{name} is given more than once on the command line: the last one counts")
        given.add(name)
        layers.append(_layer(name, value))
    return layers, notices


def _layer(name: str, text: str) -> Layer:
    path = _path(name)
    value = _value(path, text)
    for part in reversed(path[1:]):
        value = {part: value}
    return Layer(COMMAND_LINE, {path[0]: value}, merge=len(path) > 1)


def _path(name: str) -> tuple[str, ...]:
    """Return where an override goes: a key, an entry of a mapping, or a parameter of a method."""
    head, dot, rest = name.partition(".")
    if not dot:
        return (name,)
    if head == "methods":
        return tuple(name.split("."))
    if head not in Config.model_fields:
        return ("methods", *name.split("."))
    if not is_mapping(head):
        raise ConfigError(
            f"'{name}' on the command line is not understood.",
            f"{head} takes {accepted(head)}; it has no parts.",
            f"Write {head}=VALUE.",
        )
    return (head, rest)  # the names of sources and columns may hold dots themselves


def _value(path: tuple[str, ...], text: str) -> Any:
    stripped = text.strip()
    quoted = len(stripped) > 1 and stripped[0] == stripped[-1] and stripped[0] in "'\""
    if _takes_text(path) and not quoted:
        return None if stripped in ("", "~", "null") else text
    shown = HIDDEN if is_secret_name(path[-1]) else redacted_source(text)
    cut = shown if len(shown) <= SHOWN else f"{shown[:SHOWN]}..."
    return parse_value(text, f"{'.'.join(path)}={cut} on the command line")


def _takes_text(path: tuple[str, ...]) -> bool:
    """Whether the value is text as it stands, so that run_name=2024 needs no quotes within quotes."""
    head = path[0]
    if head not in Config.model_fields:
        return False
    return is_text(head) or (len(path) > 1 and head in ("data_columns", "data_tags"))
