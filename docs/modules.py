"""Fills the page that says where things are from the docstrings of the modules.

A page holds ``<!-- modules: dataflex_pipeline -->`` or the name of another folder of the repository; a table
of the modules in each of its folders takes its place, with the first sentence that a module says of itself.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]
PLACE = re.compile(r"<!-- modules: (\w+) -->")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Return a page's text with its tables in place (called by MkDocs for every page)."""
    return PLACE.sub(lambda place: _folders(REPOSITORY / place[1]), markdown)


def _folders(top: Path) -> str:
    folders = sorted({path.parent for path in top.rglob("*.py")})
    return "\n\n".join(_folder(folder) for folder in folders)


def _folder(folder: Path) -> str:
    lines = [f"## {folder.relative_to(REPOSITORY)}/", ""]
    modules = sorted(folder.glob("*.py"))
    lines += [_said(path) + "\n" for path in modules if path.name == "__init__.py"]
    lines += ["| module | what it holds |", "|---|---|"]
    lines += [
        f"| `{path.name}` | {_said(path).replace('|', chr(92) + '|')} |"
        for path in modules
        if path.name != "__init__.py"
    ]
    return "\n".join(lines)


def _said(path: Path) -> str:
    """Return the first paragraph of a module's docstring, on one line, in Markdown."""
    said = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(said.partition("\n\n")[0].replace("``", "`").split())
