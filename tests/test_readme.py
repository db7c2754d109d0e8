"""The README against the repository: its tree names every file, and what it names is there."""

from __future__ import annotations

import re
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
CODE = ("dataflex_pipeline", "stages", "benchmarks")


def tree_paths():
    """Return every path in the README's tree, from the indentation of its lines."""
    block = README.split("## Where things are")[1].split("```")[1]
    parents: list[str] = []
    for line in block.strip("\n").split("\n"):
        depth = (len(line) - len(line.lstrip())) // 2
        for name in re.split(r"\s{2,}", line.strip())[0].split("  "):
            parents[depth:] = [name.rstrip("/")]
            yield "/".join(parents)
        if depth == 0 and line.startswith("README.md"):
            yield from line.split()


def test_every_path_in_the_tree_exists():
    missing = [path for path in tree_paths() if not (REPOSITORY / path).exists()]
    assert missing == []


def test_every_module_is_in_the_tree():
    named = set(tree_paths())
    files = {
        path.relative_to(REPOSITORY).as_posix()
        for folder in CODE
        for path in (REPOSITORY / folder).rglob("*.py")
        if path.name != "__init__.py"
    }
    assert files - named == set()


def test_linked_files_exist():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (REPOSITORY / target).exists(), target
