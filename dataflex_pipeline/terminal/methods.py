"""The methods and their parameters, and the chat templates, drawn as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from dataflex_pipeline.terminal import console


def draw_methods(described: Sequence[Mapping[str, Any]]) -> None:
    """Print each method with its summary, source and parameters."""
    for each in described:
        console.line(f"{each['method']}: {each['summary']}", style="bold")
        console.line(f"  source: {each['source']}; selects by {each['strategy']} unless strategy= is set")
        rows = [
            [line["parameter"], _text(line["value"]), _text(line["default"]), line["meaning"]]
            for line in each["parameters"]
        ]
        if rows:
            console.print_table("", ["parameter", "value", "default", "meaning"], rows, wraps="meaning")
        console.line("")


def _text(value: Any) -> str:
    """Return a value as it is written in YAML and on the command line."""
    plain = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(plain, default_flow_style=True).splitlines()[0]


def draw_templates(found: Mapping[str, str]) -> None:
    """Print the chat templates by name, each with its format."""
    rows = [[name, summary] for name, summary in found.items()]
    console.print_table("Chat templates (template: NAME)", ["name", "format"], rows, wraps="format")
