"""Row by row out of JSON, JSON Lines, CSV, Parquet and Arrow files, never holding a whole file.

Whatever is wrong with a file is a DataError that names the file and, for text, the line.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import ijson
import pyarrow as pa
import pyarrow.parquet as pq

from dataflex_pipeline.data.settings import Row
from dataflex_pipeline.errors import DataError

BATCH_ROWS = 1024
_BLOCK_BYTES = 65536
_BOM = b"\xef\xbb\xbf"
_OTHER_BOMS = (b"\xff\xfe", b"\xfe\xff")
_NOTHING_WRITTEN = "Nothing was written."


def read_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of one file in order.

    Raises:
        DataError: unknown kind of file, not UTF-8, malformed, a row that is not an object, or empty.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"{path} has the extension '{path.suffix}'.",
            f"Data is read from {', '.join(READERS)}.",
            "Convert the file, or give another one.",
        )
    if path.stat().st_size == 0:
        raise _empty(path)
    yield from reader(path)


def _empty(path: Path) -> DataError:
    return DataError(
        f"{path} is empty.", "A data set needs at least one row.", f"Give another file. {_NOTHING_WRITTEN}"
    )


def _not_utf8(path: Path, line: int | None) -> DataError:
    where = f", line {line}," if line else ""
    return DataError(
        f"{path}{where} is not UTF-8 text.",
        "Text files are read as UTF-8 only: guessing another encoding would garble rows unseen.",
        f"Convert it first, for example: iconv -f <its encoding> -t UTF-8 {path.name}. {_NOTHING_WRITTEN}",
    )


def _not_an_object(path: Path, where: str, value: object) -> DataError:
    return DataError(
        f"{path}, {where}: the row is {kind_name(value)}, not an object.",
        'Every row has to be an object with named columns, such as {"instruction": ..., "output": ...}.',
        f"Repair or delete that row. {_NOTHING_WRITTEN}",
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


def _skip_bom(stream: BinaryIO, path: Path) -> int:
    start = stream.read(3)
    if start.startswith(_OTHER_BOMS):
        raise _not_utf8(path, None)
    offset = 3 if start == _BOM else 0
    stream.seek(offset)
    return offset


def read_json(path: Path) -> Iterator[Row]:
    """Yield the rows of a JSON array of objects; a ``.json`` file of JSON Lines is read as such."""
    with path.open("rb") as stream:
        _skip_bom(stream, path)
        start = stream.read(_BLOCK_BYTES).lstrip()
    if not start:
        raise _empty(path)
    if start.startswith(b"["):
        yield from _read_array(path)
    elif start.startswith(b"{") and _is_object(start.splitlines()[0]):
        yield from read_jsonl(path)
    elif start.startswith(b"{"):
        raise DataError(
            f"{path} holds one JSON object at its top level.",
            "Rows are read from an array of objects ([{...}, {...}]) or from one object per line.",
            "Store the list of rows itself as the file's top level.",
        )
    else:
        raise _malformed(path, *_locate(path), "it starts neither with [ nor with {")


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _read_array(path: Path) -> Iterator[Row]:
    with path.open("rb") as stream:
        _skip_bom(stream, path)
        items = ijson.items(stream, "item", use_float=True, buf_size=_BLOCK_BYTES)
        number = 0
        while True:
            try:
                value = next(items)
            except StopIteration:
                return
            except (ijson.JSONError, UnicodeDecodeError) as error:
                raise _array_error(path, error) from error
            number += 1
            if not isinstance(value, dict):
                raise _not_an_object(path, f"item {number}", value)
            yield value


def _array_error(path: Path, error: Exception) -> DataError:
    line, column = _locate(path)
    text = str(error).strip()
    if isinstance(error, UnicodeDecodeError) or "UTF8" in text:
        return _not_utf8(path, line)
    reason = "the file ends too early" if isinstance(error, ijson.IncompleteJSONError) else "unexpected text"
    return _malformed(path, line, column, reason)


def _malformed(path: Path, line: int, column: int, reason: str) -> DataError:
    return DataError(
        f"{path}, line {line}, column {column}: not valid JSON ({reason}).",
        "The file has to be a JSON array of objects, or one JSON object per line.",
        f"Repair that place. {_NOTHING_WRITTEN}",
    )


def _locate(path: Path) -> tuple[int, int]:
    """Return line and column (from 1, in bytes) where the JSON parser gives up.

    The parser does not say where it is, so the file is fed to it again: by blocks to find the failing
    one, then that one byte by byte.
    """
    failing = _feed(path, _BLOCK_BYTES, until=None)
    if failing is None:
        return _line_and_column(path, path.stat().st_size)
    exact = _feed(path, 1, until=failing)
    return _line_and_column(path, failing if exact is None else exact)


def _feed(path: Path, step: int, until: int | None) -> int | None:
    """Parse by blocks up to byte ``until``, then in steps; return the offset of the failing piece."""
    events = ijson.sendable_list()
    parser = ijson.basic_parse_coro(events)
    with path.open("rb") as stream:
        offset = _skip_bom(stream, path)
        while True:
            blocks = until is not None and offset < until
            piece = stream.read(min(_BLOCK_BYTES, until - offset) if blocks and until else step)
            if not piece:
                return None
            try:
                parser.send(piece)
            except (ijson.JSONError, UnicodeDecodeError):
                return offset
            del events[:]
            offset += len(piece)


def _line_and_column(path: Path, offset: int) -> tuple[int, int]:
    line, last_break, position = 1, -1, 0
    with path.open("rb") as stream:
        while position < offset:
            block = stream.read(min(_BLOCK_BYTES, offset - position))
            if not block:
                break
            if b"\n" in block:
                line += block.count(b"\n")
                last_break = position + block.rindex(b"\n")
            position += len(block)
    return line, offset - last_break


def read_jsonl(path: Path) -> Iterator[Row]:
    """Yield the rows of a file with one JSON object per line; blank lines are allowed."""
    with path.open("rb") as stream:
        _skip_bom(stream, path)
        for number, line in enumerate(stream, 1):
            if line.strip():
                yield _parse_line(path, number, line)


def _parse_line(path: Path, number: int, line: bytes) -> Row:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _not_utf8(path, number) from error
    except json.JSONDecodeError as error:
        raise _malformed(path, number, error.colno, error.msg) from error
    if not isinstance(value, dict):
        raise _not_an_object(path, f"line {number}", value)
    return value


def read_csv(path: Path) -> Iterator[Row]:
    """Yield the rows of a comma-separated file whose first line names the columns; all values are text."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with path.open(encoding="utf-8-sig", newline="") as stream:
        lines = csv.reader(stream, strict=True)
        try:
            header = next(lines, [])
            _check_header(path, header)
            for values in lines:
                if values:
                    yield _csv_row(path, lines.line_num, header, values)
        except UnicodeDecodeError as error:
            raise _not_utf8(path, _undecodable_line(path)) from error
        except csv.Error as error:
            raise DataError(
                f"{path}, line {lines.line_num}: not valid CSV ({error}).",
                "Fields are separated by commas and quoted with double quotes.",
                f"Repair that line. {_NOTHING_WRITTEN}",
            ) from error


def _check_header(path: Path, header: list[str]) -> None:
    bad = sorted({name for name in header if not name or header.count(name) > 1})
    if bad or not header:
        raise DataError(
            f"{path}, line 1: the column names are {header}.",
            "The first line of a CSV file has to name every column, each with a name of its own.",
            f"Repair the first line. {_NOTHING_WRITTEN}",
        )


def _csv_row(path: Path, line: int, header: list[str], values: list[str]) -> Row:
    if len(values) != len(header):
        raise DataError(
            f"{path}, line {line}: {len(values)} fields where the first line names {len(header)} columns.",
            "Every row needs one field per column; an unquoted comma or a missing quote shifts them.",
            f"Repair that line. {_NOTHING_WRITTEN}",
        )
    return dict(zip(header, values, strict=True))


def _undecodable_line(path: Path) -> int | None:
    with path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return number
    return None


def read_parquet(path: Path) -> Iterator[Row]:
    """Yield the rows of a Parquet file, by batches."""
    try:
        with pq.ParquetFile(path) as table:
            for batch in table.iter_batches(BATCH_ROWS):
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, "Parquet", error) from error


def read_arrow(path: Path) -> Iterator[Row]:
    """Yield the rows of an Arrow IPC file, in the file or the stream form, by batches."""
    try:
        with pa.memory_map(str(path)) as stream:
            for batch in _record_batches(stream):
                for start in range(0, batch.num_rows, BATCH_ROWS):
                    yield from batch.slice(start, BATCH_ROWS).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, "Arrow", error) from error


def _record_batches(stream: pa.NativeFile) -> Iterator[pa.RecordBatch]:
    magic = stream.read(6)
    stream.seek(0)
    if magic == b"ARROW1":
        table = pa.ipc.open_file(stream)
        yield from (table.get_batch(number) for number in range(table.num_record_batches))
    else:
        yield from pa.ipc.open_stream(stream)


def _unreadable(path: Path, kind: str, error: Exception) -> DataError:
    return DataError(
        f"{path} cannot be read as {kind} ({str(error).splitlines()[0]}).",
        "It is truncated, or something else under that extension.",
        f"Copy or write it again. {_NOTHING_WRITTEN}",
    )


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".json": read_json,
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".csv": read_csv,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
    ".feather": read_arrow,
    ".ipc": read_arrow,
}
"""Reader of each file extension."""
