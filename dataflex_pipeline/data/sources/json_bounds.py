"""Bounds of JSON text: levels of nesting, digits of a number and bytes of a row, told before it is parsed.

Beyond them a parser crashes: nesting exhausts memory or the stack, an integer of thousands of digits is
refused or worse, and a row without end exhausts memory. The text is therefore looked through first, by what
stands outside of its strings.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, AnyStr

import numpy as np

from dataflex_pipeline.data.sources.compressed import NOTHING_WRITTEN
from dataflex_pipeline.errors import DataError

DEEPEST = 200
"""Levels of lists and objects within a row; half the room that Python has for calls in calls."""
LONGEST_NUMBER = 1000
"""Digits of a number; Python reads an integer of 4,300 at most."""
LARGEST_ROW = 1 << 28
"""Bytes of a row's text: 256 MiB."""

_BACKSLASH, _QUOTE = b"\\", ord('"')
_ESCAPED = re.compile(rb"\\.", re.DOTALL)
_STRUCTURE = b'"[]{}'
_NOT_STRUCTURE = bytes(set(range(256)) - set(_STRUCTURE))
_STEPS = np.zeros(256, np.int64)
_STEPS[list(b"[{")], _STEPS[list(b"]}")] = 1, -1
_DIGITS = re.compile(rb"[0-9]{%d,}" % (LONGEST_NUMBER + 1))
_LAST_DIGITS = re.compile(rb"[0-9]*\Z")


class BoundsError(ValueError):
    """A bound that JSON text is beyond, as the end of a sentence: "nests deeper than 200 levels"."""


class JsonBounds:
    """Looks JSON text through block by block.

    Args:
        outside: levels that are around the rows, which count for none: 1 for the list of an array's rows.
    """

    def __init__(self, outside: int = 0) -> None:
        self._outside, self._deepest = outside, outside + DEEPEST
        self._depth = self._size = 0
        self._in_text = False
        self._before = b""
        """What the last block ended with: a backslash without what it escapes, or digits."""

    def see(self, block: bytes) -> None:
        """Look at the next block.

        Raises:
            BoundsError: the text is beyond a bound.
        """
        whole = self._before + block
        text = _ESCAPED.sub(b"", whole) if _BACKSLASH in whole else whole
        cut = text.endswith(_BACKSLASH)
        text = text[:-1] if cut else text
        self._see_numbers(text)
        self._see_levels(text, len(block))
        if cut:
            self._before = _BACKSLASH
        else:
            digits = b"" if self._in_text else _LAST_DIGITS.search(text)[0]  # type: ignore[index]
            self._before = digits

    def _see_levels(self, text: bytes, size: int) -> None:
        marks = np.frombuffer(text.translate(None, _NOT_STRUCTURE), np.uint8)
        is_quote = marks == _QUOTE
        in_text = (np.cumsum(is_quote) + self._in_text) % 2 == 1
        depths = self._depth + np.cumsum(np.where(in_text, 0, _STEPS[marks]))
        if len(marks):
            if depths.max() > self._deepest:
                raise BoundsError(f"it nests deeper than {DEEPEST} levels")
            self._depth, self._in_text = int(depths[-1]), bool(in_text[-1])
        between = self._depth <= self._outside or bool(len(marks) and depths.min() <= self._outside)
        self._size = 0 if between else self._size + size
        if self._size > LARGEST_ROW:
            raise BoundsError(f"it is larger than {LARGEST_ROW >> 20} MiB")

    def _see_numbers(self, text: bytes) -> None:
        for found in _DIGITS.finditer(text):
            if (text.count(b'"', 0, found.start()) + self._in_text) % 2 == 0:
                raise BoundsError(f"it holds a number of more than {LONGEST_NUMBER:,} digits")


def check_bounds(text: bytes) -> None:
    """Look a single JSON text through; most have too few brackets and digits to need it.

    Raises:
        BoundsError: it is beyond a bound.
    """
    if text.count(b"[") + text.count(b"{") > DEEPEST or _DIGITS.search(text):
        JsonBounds().see(text)


def parsed(text: str) -> Any:
    """Parse the JSON text that a value of a row is (how CSV holds lists).

    Raises:
        ValueError: it is no JSON, or beyond a bound.
    """
    if text.count("[") + text.count("{") > DEEPEST:
        check_bounds(text.encode("utf-8", "replace"))
    return json.loads(text)


def bounded_lines(stream: IO[AnyStr], path: Path) -> Iterator[AnyStr]:
    """Yield the lines of a file, none of which is larger than a row may be.

    Raises:
        DataError: one is.
    """
    number = 0
    while line := stream.readline(LARGEST_ROW + 1):
        number += 1
        if len(line) > LARGEST_ROW:
            raise beyond(path, f", line {number}", BoundsError(f"it is larger than {LARGEST_ROW >> 20} MiB"))
        yield line


def beyond(path: Path, where: str, error: BoundsError) -> DataError:
    """Return the error for a row beyond a bound; ``where`` is its place in the file: ", line 3"."""
    return DataError(
        f"{path}{where}: a row cannot be read: {error}.",
        f"A row may nest {DEEPEST} levels, have numbers of {LONGEST_NUMBER:,} digits and "
        f"{LARGEST_ROW >> 20} MiB of text; no row to learn from comes near.",
        f"Write such a value as text in quotes, or leave the row out. {NOTHING_WRITTEN}",
    )
