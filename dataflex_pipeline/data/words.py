"""The terms of a text, for methods that compare texts by the words that they share.

A text is normalised (Unicode NFKC) and put in lower case. Then

- in scripts that put no spaces between words (Chinese, Japanese, Thai, Lao, Khmer, Myanmar) every character
  is a term, and so is every pair of neighbours: 北京话 gives 北, 京, 话, 北京, 京话;
- elsewhere a term is a run of letters, marks, digits and underscores: of code the identifiers and numbers. An
  identifier of several words (snake_case, camelCase, letters beside digits) also gives each of them:
  ``parseUrl2`` gives parseurl2, parse, url, 2;
- of code, every run of operators, brackets aside (``+=``, ``==``, ``->``), is a term, too; what prose has,
  such as ``...`` or ``?!``, is none.

No word is left out and none is cut to its stem: rare terms weigh more anyway, and stems are one language's.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator

_UNSPACED = (
    r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    r"\U00020000-\U0003ffff"
)
"""Thai and Lao, Myanmar, Khmer, kana, Han with its extensions."""
_TERM = re.compile(
    rf"(?P<unspaced>[{_UNSPACED}]+)"
    rf"|(?P<word>(?:(?![{_UNSPACED}])\w)+)"
    r"|(?P<operator>[-+*/%=<>!&|^~?:.@#$\\]{2,})"
)
_PUNCTUATION = ".?!-"
"""What prose has runs of, too: no operators where there is nothing else."""
_PART = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[^\W\dA-Z_]+|\d+")


def terms(text: str) -> list[str]:
    """Return the terms of a text, in order, each as often as it occurs."""
    return [term for match in _TERM.finditer(unicodedata.normalize("NFKC", text)) for term in _of(match)]


def _of(match: re.Match[str]) -> Iterator[str]:
    found = match[0]
    if match["unspaced"]:
        yield from found
        yield from (found[place : place + 2] for place in range(len(found) - 1))
        return
    if match["operator"] and not set(found) - set(_PUNCTUATION):
        return
    yield found.lower()
    if match["word"]:
        parts = _PART.findall(found)
        if len(parts) > 1:
            yield from (part.lower() for part in parts)
