"""Characters that are not seen where a text is shown: made visible, so that they do not act on the reader."""

from __future__ import annotations

import re

_UNSEEN = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb\ud800-\udfff]"
)
"""Control characters but for tab and new line, marks of direction, and what has no width or no meaning."""


def visible(text: str) -> str:
    """Return a text whose control characters a terminal shows and does not obey, as \\u001b; so does JSON."""
    return _UNSEEN.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
