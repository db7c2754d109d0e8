"""Fills the pages' tables from the code: parameters of methods, columns of tables. Nothing is written twice.

A page holds ``<!-- parameters: less -->``, ``<!-- columns: SCORES -->`` (of schemas.py), ``<!-- columns: loss
-->`` (of a method) or ``<!-- columns: package.module:NAME -->``; the table takes its place.
"""

from __future__ import annotations

import importlib
import re
from typing import Any

import yaml

from dataflex_pipeline import schemas
from dataflex_pipeline.methods import method_class

PLACE = re.compile(r"<!-- (parameters|columns): ([\w.:]+) -->")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Return a page's text with its tables in place (called by MkDocs for every page)."""
    return PLACE.sub(_table, markdown)


def _table(place: re.Match[str]) -> str:
    return {"parameters": _parameters, "columns": _columns}[place[1]](place[2])


def _parameters(method: str) -> str:
    lines = ["| parameter | default | meaning |", "|---|---|---|"]
    for name, info in method_class(method).Params.model_fields.items():
        default = info.get_default(call_default_factory=True)
        plain = list(default) if isinstance(default, tuple) else default
        shown = yaml.safe_dump(plain, default_flow_style=True).splitlines()[0]
        lines.append(f"| `{method}.{name}` | `{shown}` | {_cell(info.description or '')} |")
    return "\n".join(lines)


def _columns(table: str) -> str:
    module, colon, name = table.partition(":")
    if colon:
        fields = getattr(importlib.import_module(f"dataflex_pipeline.{module}"), name)
    else:
        fields = schemas.__dict__[table] if table in schemas.__dict__ else method_class(table).columns
    lines = ["| column | type | meaning |", "|---|---|---|"]
    for field in fields:
        meaning = (field.metadata or {}).get(b"description", b"").decode()
        lines.append(f"| `{field.name}` | {_cell(str(field.type))} | {_cell(meaning)} |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    """Return text that cannot break out of a table's cell."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
