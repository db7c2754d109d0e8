"""Standard output and error: what their encoding has no sign for is written as \\u escapes."""

from __future__ import annotations

import codecs
import io
import sys

ESCAPED = "dataflex-escaped"


def write_anything() -> None:
    """Let both take any text, whatever encoding the terminal or PYTHONIOENCODING asks for."""
    codecs.register_error(ESCAPED, _escaped)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=ESCAPED)


def _escaped(error: UnicodeError) -> tuple[str, int]:
    """Return characters as JSON escapes them too, so that a JSON text stays the same value."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    units = error.object[error.start : error.end].encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[at : at + 4]}" for at in range(0, len(units), 4)), error.end
