"""What stands in the pages: commands, Python and files, in their order."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = [*sorted(REPOSITORY.glob("README*.md")), *sorted((REPOSITORY / "docs").rglob("*.md"))]
BLOCK = re.compile(r"(?:^`(?P<file>[\w.-]+)`\n\n)?^```(?P<language>\w+)\n(?P<text>.*?)^```", re.M | re.S)


@dataclass(frozen=True)
class Item:
    """One thing to do with a page.

    Attributes:
        kind: command, python, or file (a block below a line that is nothing but a file's name).
        text: the command on one line without its comment, the code, or the file's content.
        name: of the file.
    """

    kind: str
    text: str
    name: str = ""

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text)


def items(page: Path) -> Iterator[Item]:
    """Yield all items of a page; blocks in other languages (settings, listings) are none."""
    for block in BLOCK.finditer(page.read_text(encoding="utf-8")):
        if block["file"]:
            yield Item("file", block["text"], block["file"])
        elif block["language"] == "python":
            yield Item("python", block["text"])
        elif block["language"] == "bash":
            for line in block["text"].replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words:
                    yield Item("command", shlex.join(words))


def pages() -> dict[str, list[Item]]:
    """Return the items of every page that has any, by the page's path."""
    found = {page.relative_to(REPOSITORY).as_posix(): list(items(page)) for page in PAGES}
    return {page: held for page, held in found.items() if held}
