r"""Halves of surrogate pairs in JSON text (``\ud83d`` alone), kept for a parser that has none.

Python's own parser keeps such a half, so that the row is refused by name; the stream parser of arrays is
written in C and puts a question mark in its place. So each half is written as a mark and its four digits
before that parser sees it, and is put back in what it makes.
"""

from __future__ import annotations

import re
from typing import Any

_FIRST, _SECOND = rb"[dD][89abAB][0-9a-fA-F]{2}", rb"[dD][c-fC-F][0-9a-fA-F]{2}"
_ESCAPE = re.compile(
    rb"(?<!\\)((?:\\\\)*)\\u(?:" + _FIRST + rb"\\u" + _SECOND + rb"|(" + _FIRST + rb"|" + _SECOND + rb"))"
)
"""A pair, or in group 2 the digits of a half, behind backslashes that escape each other (group 1)."""
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_FIRST_HALF = re.compile(rb"\\u" + _FIRST)
_PAIR = re.compile(rb"\\u" + _FIRST + rb"\\u" + _SECOND)
_LONGEST = 12
"""Bytes of a pair."""
_MARK = "\ufdd0"
"""A number that Unicode gives to no character, for programs to use inside."""
_KEPT = re.compile(_MARK + "([dD][89a-fA-F][0-9a-fA-F]{2})")


class HalfPairs:
    """Marks the halves in JSON text that comes in blocks.

    Attributes:
        found: whether there was one so far.
    """

    def __init__(self) -> None:
        self.found = False
        self._held = b""

    def marked(self, block: bytes) -> bytes:
        """Return the next text for the parser; an empty block is the end. Up to a few bytes are held back."""
        text = self._held + block
        end = _border(text) if block else len(text)
        self._held = text[end:]
        text = text[:end]
        return text if _all_paired(text) else _ESCAPE.sub(self._mark, text)

    def _mark(self, found: re.Match[bytes]) -> bytes:
        if found[2] is None:
            return found[0]
        self.found = True
        return found[1] + b"\\ufdd0" + found[2]


def _all_paired(text: bytes) -> bool:
    """Whether a text surely has no half: quick, and false where a backslash may be meant as itself."""
    count = len(_SURROGATE.findall(text))
    return not count or (rb"\\u" not in text and 2 * len(_PAIR.findall(text)) == count)


def _border(text: bytes) -> int:
    """Return where a text can be cut so that no escape is, nor a pair of them."""
    first = text.find(b"\\", max(0, len(text) - _LONGEST))
    if first < 0:
        return len(text)
    border = first - _backslashes_before(text, first) % 2
    half = border - _LONGEST // 2
    whole = half >= 0 and _FIRST_HALF.match(text, half) and _backslashes_before(text, half) % 2 == 0
    return half if whole else border


def _backslashes_before(text: bytes, at: int) -> int:
    before = text[:at]
    return len(before) - len(before.rstrip(b"\\"))


def put_back(value: Any) -> Any:
    """Return a parsed value with the halves that were marked."""
    if isinstance(value, str):
        return _KEPT.sub(lambda found: chr(int(found[1], 16)), value) if _MARK in value else value
    if isinstance(value, list):
        return [put_back(each) for each in value]
    if isinstance(value, dict):
        return {put_back(key): put_back(each) for key, each in value.items()}
    return value
