"""`dataflex methods` and `dataflex init`: what there is to choose from, and a file to begin with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from dataflex_pipeline.config.components import known_methods, method_parameters
from dataflex_pipeline.config.load import load_config
from dataflex_pipeline.config.render import commented_yaml
from dataflex_pipeline.errors import ConfigError, UserError, did_you_mean
from dataflex_pipeline.methods import method_class, shipped_methods
from dataflex_pipeline.store.atomic import write_text

from . import console


def methods(name: str | None, config: Path | None) -> None:
    """Print the methods with their summary and source, and the parameters of each."""
    loaded = load_config(config, [])
    folder = config.parent if config is not None else None
    known = known_methods(loaded.config, folder)
    names = [name for name in known if method_exists(loaded.config, name, folder)]
    if name is not None and name not in names:
        raise ConfigError(
            f"The method '{name}' is not known.{did_you_mean(name, names)}",
            f"There are: {', '.join(names)}.",
            "Choose one of them, or add your own to components.yaml.",
        )
    for shown in [name] if name is not None else names:
        _show_method(loaded.config, shown, folder)


def method_exists(config: Any, name: str, folder: Path | None) -> bool:
    """Whether an entry of the components file has an implementation: shipped, or a file or module."""
    entry = method_parameters(config, name, folder)
    return entry.kind in shipped_methods() or entry.file is not None or entry.module is not None


def _show_method(config: Any, name: str, folder: Path | None) -> None:
    entry = method_parameters(config, name, folder)
    kind = method_class(entry.kind, Path(entry.file) if entry.file else None, entry.module)
    console.line(f"{name}: {kind.summary}", style="bold")
    console.line(f"  source: {kind.source}; selects by {kind.default_strategy} unless strategy= is set")
    rows = []
    for parameter, info in kind.Params.model_fields.items():
        default = info.get_default(call_default_factory=True)
        value = entry.params.get(parameter, default)
        inner = info.json_schema_extra
        meanings = {"": info.description, **(inner if isinstance(inner, Mapping) else {})}
        rows += _parameter_rows(f"{name}.{parameter}", value, default, meanings)
    if rows:
        console.print_table("", ["parameter", "value", "default", "meaning"], rows, wraps="meaning")
    console.line("")


def _parameter_rows(
    parameter: str, value: Any, default: Any, meanings: Mapping[str, Any], place: str = ""
) -> list[list[str]]:
    """Return the line of a parameter, or one for each of its settings where it is a mapping of them.

    Args:
        parameter: its name. value, default: of it. place: of the settings inside, "" for the whole.
        meanings: what the whole ("") and each setting (a path with dots) mean.
    """
    if not isinstance(default, Mapping) or not default:
        return [[parameter, _text(value), _text(default), meanings.get(place) or ""]]
    given = value if isinstance(value, Mapping) else {}
    keys = [*default, *(key for key in given if key not in default)]
    return [
        line
        for key in keys
        for line in _parameter_rows(
            f"{parameter}.{key}",
            given.get(key, default.get(key)),
            default.get(key),
            meanings,
            f"{place}.{key}" if place else key,
        )
    ]


def _text(value: Any) -> str:
    """Return a value as it is written in YAML and on the command line."""
    plain = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(plain, default_flow_style=True).splitlines()[0]


def templates() -> None:
    """Print the chat templates that base models can be given by name."""
    from dataflex_pipeline.data.templates import TEMPLATES

    rows = [[name, template.summary] for name, template in sorted(TEMPLATES.items())]
    console.print_table("Chat templates (template: NAME)", ["name", "format"], rows, wraps="format")


def init(path: Path) -> None:
    """Write a commented configuration.

    Raises:
        UserError: something is there already.
    """
    if path.exists():
        raise UserError(
            f"{path} exists.",
            "A file of yours is never overwritten.",
            "Choose another name, or move the old file away.",
        )
    write_text(path, commented_yaml())
    console.line(f"Wrote {path}: every key with its default and meaning.")
    console.line("Next:")
    console.line("  set model_name_or_path, dataset and (for early stopping or targets) eval_dataset in it")
    console.line(f"  dataflex round 1 --config {path}")
