"""What text files of data have in common: encoding, place of an error, and its message."""

from __future__ import annotations

import io
from pathlib import Path

from dataflex_pipeline.errors import DataError

NOTHING_WRITTEN = "Nothing was written."
_BOM = b"\xef\xbb\xbf"
_OTHER_BOMS = (b"\xff\xfe", b"\xfe\xff")


def empty_file(path: Path) -> DataError:
    """Return the error for a file without any content."""
    return DataError(
        f"{path} is empty.", "A data set needs at least one row.", f"Give another file. {NOTHING_WRITTEN}"
    )


def not_utf8(path: Path, line: int | None) -> DataError:
    """Return the error for a file that is not UTF-8, with the line where that is known."""
    where = f", line {line}," if line else ""
    return DataError(
        f"{path}{where} is not UTF-8 text.",
        "Text files are read as UTF-8 only: guessing another encoding would garble rows unseen.",
        f"Convert it first, for example: iconv -f <its encoding> -t UTF-8 {path.name}. {NOTHING_WRITTEN}",
    )


def key_twice(path: Path, where: str, key: str) -> DataError:
    """Return the error for an object that has one key twice."""
    return DataError(
        f"{path}{where}: an object has the key '{key}' twice.",
        "Readers of JSON do not agree on which of the two counts, so the row is not what it seems.",
        f"Keep one of them. {NOTHING_WRITTEN}",
    )


def not_an_object(path: Path, where: str, value: object) -> DataError:
    """Return the error for a row that is not an object."""
    return DataError(
        f"{path}, {where}: the row is {kind_name(value)}, not an object.",
        'Every row has to be an object with named columns, such as {"instruction": ..., "output": ...}.',
        f"Repair or delete that row. {NOTHING_WRITTEN}",
    )


def kind_name(value: object) -> str:
    """Return what a plain value is, in words: 'text', 'a number', 'null', 'a list', 'an object' ..."""
    if value is None:
        return "null"
    for kind, name in ((bool, "true or false"), (str, "text"), (int, "a number"), (float, "a number")):
        if isinstance(value, kind):
            return name
    if isinstance(value, list):
        return "a list"
    return "an object" if isinstance(value, dict) else f"a {type(value).__name__}"


def skip_bom(stream: io.BufferedReader, path: Path) -> int:
    """Move a stream behind a UTF-8 byte order mark; return the offset of the text.

    Raises:
        DataError: the file begins with the mark of another encoding.
    """
    start = stream.peek(3)[:3]
    if start.startswith(_OTHER_BOMS):
        raise not_utf8(path, None)
    return len(stream.read(3)) if start == _BOM else 0
