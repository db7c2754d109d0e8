"""A number that all processes which compute one table use, whichever of them was the first to need it.

It is a file in the table's folder while the table is unfinished, so that a restart goes on with the same
number; the finished table keeps it in its manifest.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dataflex_pipeline.errors import CorruptError
from dataflex_pipeline.store.atomic import first_wins

BATCH_TOKENS = "batch_tokens"
"""Padded tokens per batch of a table whose batches were sized by the memory."""


def agreed_file(folder: Path, name: str) -> Path:
    """Return where the number is; readers of folders pass over names that begin with an underscore."""
    return folder / f"_{name}"


def agreed(folder: Path, name: str) -> int | None:
    """Return the number; None where there is none yet.

    Raises:
        CorruptError: the file is not one that this program wrote.
    """
    path = agreed_file(folder, name)
    try:
        text = path.read_text("utf-8").strip()
    except FileNotFoundError:
        return None
    if not text.isdecimal():
        raise CorruptError(
            f"{path} does not hold a number.",
            "It was written whole by this program, so something else changed it.",
            "Delete it, and run the same command again.",
        )
    return int(text)


def agree(folder: Path, name: str, find: Callable[[], int]) -> int:
    """Return the number, which ``find`` finds where no process has found one before."""
    there = agreed(folder, name)
    if there is None:
        own = find()
        first_wins(agreed_file(folder, name), f"{own}\n")
        there = agreed(folder, name)
        return own if there is None else there  # a server may still remember that there was none
    return there
