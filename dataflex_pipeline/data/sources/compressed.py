"""Text files of data, plain or compressed: encoding, and the place and message of an error.

A damaged file, or one that ends too early, is an error and never a short read.
"""

from __future__ import annotations

import datetime
import io
import lzma
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import pyarrow as pa

from dataflex_pipeline.errors import DataError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer


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


_KINDS: tuple[tuple[type | tuple[type, ...], str], ...] = (
    (bool, "true or false"),
    (str, "text"),
    ((int, float, Decimal), "a number"),
    (list, "a list"),
    (dict, "an object"),
    (bytes, "a binary value"),
    (datetime.date, "a date"),
    (datetime.time, "a time of day"),
    (datetime.timedelta, "a duration"),
)


def kind_name(value: object) -> str:
    """Return what a value is, in words: 'text', 'a number', 'null', 'a list', 'an object' ..."""
    if value is None:
        return "null"
    return next((name for kind, name in _KINDS if isinstance(value, kind)), f"a {type(value).__name__}")


def skip_bom(stream: io.BufferedReader, path: Path) -> int:
    """Move a stream behind a UTF-8 byte order mark; return the offset of the text.

    Raises:
        DataError: the file begins with the mark of another encoding.
    """
    start = stream.peek(3)[:3]
    if start.startswith(_OTHER_BOMS):
        raise not_utf8(path, None)
    return len(stream.read(3)) if start == _BOM else 0


_CODECS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".lz4": "lz4"}
COMPRESSIONS = (*_CODECS, ".xz")
"""Extensions that may follow that of a text file, as in ``rows.jsonl.gz``."""
_BLOCK_BYTES = 65536


def data_suffix(path: Path) -> str:
    """Return the extension that tells the kind of a file, without that of its compression: '.jsonl'."""
    ending = path.suffix.lower()
    return Path(path.stem).suffix.lower() if ending in COMPRESSIONS else ending


def open_data(path: Path) -> io.BufferedReader:
    """Open a file to read its bytes, decompressed where its name says that it is compressed.

    Raises:
        DataError: on opening or on any later read: it is damaged, or ends too early.
        OSError: it cannot be opened.
    """
    stream = path.open("rb")
    ending = path.suffix.lower()
    if ending not in COMPRESSIONS:
        return stream
    raw = _Decompressed(path, stream, _XZ(stream) if ending == ".xz" else _arrow_stream(stream, ending))
    return io.BufferedReader(raw, _BLOCK_BYTES)


def _arrow_stream(stream: BinaryIO, ending: str) -> pa.CompressedInputStream:
    return pa.CompressedInputStream(pa.PythonFile(stream, mode="r"), _CODECS[ending])


class _XZ:
    """Decompresses .xz; unlike the standard library's file it refuses what follows the last stream."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self._decoder = stream, lzma.LZMADecompressor()

    def read(self, size: int) -> bytes:
        """Return at most so many bytes; none only at the end of the file."""
        while True:
            block = b""
            if self._decoder.eof:
                block = self._next_stream()
                if not block:
                    return b""
                self._decoder = lzma.LZMADecompressor()
            elif self._decoder.needs_input:
                block = self._stream.read(_BLOCK_BYTES)
                if not block:
                    raise EOFError("Truncated compressed stream")
            made = self._decoder.decompress(block, size)
            if made:
                return made

    def _next_stream(self) -> bytes:
        """Return the beginning of what follows a finished stream and the zero bytes that may pad it."""
        block = self._decoder.unused_data
        while not block.lstrip(b"\0"):
            block = self._stream.read(_BLOCK_BYTES)
            if not block:
                return b""
        return block.lstrip(b"\0")


class _Decompressed(io.RawIOBase):
    """The decompressed bytes of a file, with errors that name it."""

    def __init__(self, path: Path, stream: BinaryIO, source: _XZ | pa.CompressedInputStream) -> None:
        self._path, self._stream, self._source = path, stream, source

    def readable(self) -> bool:
        """Whether it can be read: always."""
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        """Fill a buffer from its start; return how many bytes there were."""
        view = memoryview(buffer).cast("B")
        try:
            block = self._source.read(len(view))
        except (OSError, EOFError, lzma.LZMAError) as error:
            raise DataError(
                f"{self._path} cannot be decompressed ({error}).",
                "It is cut off or damaged, or something else under that extension.",
                f"Copy or write it again. {NOTHING_WRITTEN}",
            ) from error
        view[: len(block)] = block
        return len(block)

    def close(self) -> None:
        """Close the file."""
        self._stream.close()
        super().close()
