"""The README against the repository: its tree names every folder, and what it names is there."""

from __future__ import annotations

import re
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def tree_paths():
    """Return every path in the README's tree, from the indentation of its lines."""
    block = README.split("## Where things are")[1].split("```")[1]
    above: list[str] = []
    for line in block.strip("\n").split("\n"):
        depth = (len(line) - len(line.lstrip())) // 2
        for name in re.split(r"\s{2,}", line.strip())[0].split():
            above[depth:] = [name.rstrip("/")]
            yield "/".join(above)


def test_every_path_in_the_tree_exists():
    missing = [path for path in tree_paths() if not (REPOSITORY / path).exists()]
    assert missing == []


def test_every_package_is_in_the_tree():
    packages = {
        f"dataflex_pipeline/{p.parent.name}" for p in REPOSITORY.glob("dataflex_pipeline/*/__init__.py")
    }
    assert len(packages) > 10
    assert packages - set(tree_paths()) == set()


def test_linked_files_exist():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (REPOSITORY / target).exists(), target
