"""Readers of JSON, JSON Lines, CSV, Parquet and Arrow files, row by row, never holding a whole file.

Whatever is wrong with a file is a DataError that names the file and, for text, the line.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from dataflex_pipeline.data.settings import NumberedRow, Row
from dataflex_pipeline.data.sources.columns import absent_nulls, exact_row, is_json
from dataflex_pipeline.data.sources.compressed import (
    COMPRESSIONS,
    NOTHING_WRITTEN,
    data_suffix,
    empty_file,
    not_utf8,
    open_data,
)
from dataflex_pipeline.data.sources.json_bounds import LARGEST_ROW, bounded_lines
from dataflex_pipeline.data.sources.json_files import read_json, read_jsonl
from dataflex_pipeline.errors import DataError
from dataflex_pipeline.store.fingerprint import file_state

BATCH_ROWS = 1024


def read_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of one file in order.

    Raises:
        DataError: unknown kind of file, not UTF-8, malformed, a row that is not an object, or empty.
    """
    return (row for _, row in read_numbered(path))


def read_numbered(path: Path) -> Iterator[NumberedRow]:
    """Yield the rows of one file in order, each with the line, element or row that it is, from 1.

    Raises:
        DataError: as for `read_rows`.
    """
    reader = READERS.get(data_suffix(path))
    if not is_data(path) or reader is None:
        raise DataError(
            f"{path} has the extension '{path.suffix}'.",
            f"Data is read from {', '.join(READERS)}; text files also compressed: {', '.join(COMPRESSIONS)}.",
            "Convert the file, or give another one.",
        )
    if path.stat().st_size == 0:
        raise empty_file(path)
    yield from reader(path)


def read_csv(path: Path) -> Iterator[NumberedRow]:
    """Yield the rows of a comma-separated file whose first line names the columns; all values are text.

    A row of several lines has the number of its first.
    """
    csv.field_size_limit(LARGEST_ROW)
    with io.TextIOWrapper(open_data(path), encoding="utf-8-sig", newline="") as stream:
        lines = csv.reader(bounded_lines(stream, path), strict=True)
        try:
            header = next(lines, [])
            _check_header(path, header)
            begin = lines.line_num + 1
            for values in lines:
                if values:
                    yield begin, _csv_row(path, lines.line_num, header, values)
                begin = lines.line_num + 1
        except UnicodeDecodeError as error:
            raise not_utf8(path, _undecodable_line(path)) from error
        except csv.Error as error:
            raise DataError(
                f"{path}, line {lines.line_num}: not valid CSV ({error}).",
                "Fields are separated by commas and quoted with double quotes.",
                f"Repair that line. {NOTHING_WRITTEN}",
            ) from error


def _check_header(path: Path, header: list[str]) -> None:
    bad = sorted({name for name in header if not name or header.count(name) > 1})
    if bad or not header:
        raise DataError(
            f"{path}, line 1: the column names are {header}.",
            "The first line of a CSV file has to name every column, each with a name of its own.",
            f"Repair the first line. {NOTHING_WRITTEN}",
        )


def _csv_row(path: Path, line: int, header: list[str], values: list[str]) -> Row:
    if len(values) != len(header):
        raise DataError(
            f"{path}, line {line}: {len(values)} fields where the first line names {len(header)} columns.",
            "Every row needs one field per column; an unquoted comma or a missing quote shifts them.",
            f"Repair that line. {NOTHING_WRITTEN}",
        )
    return dict(zip(header, values, strict=True))


def _undecodable_line(path: Path) -> int | None:
    with open_data(path) as stream:
        for number, line in enumerate(stream, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return number
    return None


def read_parquet(path: Path) -> Iterator[NumberedRow]:
    """Yield the rows of a Parquet file, by batches; of one that `dataflex export` wrote, as they were."""
    yield from enumerate(_parquet_rows(path), 1)


def _parquet_rows(path: Path) -> Iterator[Row]:
    with _explained(path, "Parquet"), pq.ParquetFile(path) as table:
        schema = table.schema_arrow
        exact, texts = absent_nulls(schema), frozenset(each.name for each in schema if is_json(each))
        for batch in table.iter_batches(BATCH_ROWS):
            rows = plain_rows(path, batch)
            yield from (exact_row(row, texts) for row in rows) if exact else rows


def read_arrow(path: Path) -> Iterator[NumberedRow]:
    """Yield the rows of an Arrow IPC file, in the file or the stream form, by batches."""
    yield from enumerate(_arrow_rows(path), 1)


def _arrow_rows(path: Path) -> Iterator[Row]:
    # Not mapped into memory: a file that is cut off or shrinks would end the process.
    with _explained(path, "Arrow"), pa.OSFile(str(path)) as stream:
        for batch in _record_batches(stream):
            batch.validate(full=True)  # a changed byte may send an offset anywhere
            for start in range(0, batch.num_rows, BATCH_ROWS):
                yield from plain_rows(path, batch.slice(start, BATCH_ROWS))


def _record_batches(stream: pa.NativeFile) -> Iterator[pa.RecordBatch]:
    magic = stream.read(6)
    stream.seek(0)
    if magic == b"ARROW1":
        table = pa.ipc.open_file(stream)
        yield from (table.get_batch(number) for number in range(table.num_record_batches))
    else:
        yield from pa.ipc.open_stream(stream)


@contextmanager
def _explained(path: Path, kind: str) -> Iterator[None]:
    """Turn what the reader of a columnar file raises into an error that names the file."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, MemoryError, RecursionError) as error:
        found = str(error).splitlines() or [type(error).__name__]
        raise DataError(
            f"{path} cannot be read as {kind} ({found[0]}).",
            "It is truncated or damaged, or something else under that extension.",
            f"Copy or write it again. {NOTHING_WRITTEN}",
        ) from error


def plain_rows(where: Path | str, batch: pa.RecordBatch | pa.Table) -> list[Row]:
    """Return the rows of a batch as plain values.

    Args:
        where: the file or data set, for messages. batch: a few rows.

    Raises:
        DataError: two columns have one name, or a column holds what Python has no value for.
    """
    _check_names(where, batch.schema.names)
    try:
        rows: list[Row] = batch.to_pylist()
    except (OverflowError, LookupError) as error:  # a date or duration, a time zone
        raise _no_value(where, batch, error) from error
    return rows


def _check_names(where: Path | str, names: list[str]) -> None:
    """Refuse two columns of one name: of a row only one of them would be read, unseen."""
    if len(set(names)) < len(names):
        name = next(each for each in names if names.count(each) > 1)
        raise DataError(
            f"{where}: the column names are {names}.",
            f"There are {names.count(name)} columns '{name}', and which of them counts nothing says.",
            f"Rename or drop all but one. {NOTHING_WRITTEN}",
        )


def _no_value(where: Path | str, batch: pa.RecordBatch | pa.Table, error: Exception) -> DataError:
    """Return the error for the first column of a batch that cannot be read."""
    for field, column in zip(batch.schema, batch.columns, strict=True):
        try:
            column.to_pylist()
        except (OverflowError, LookupError) as found:
            name, error = f"column '{field.name}' ({field.type})", found
            break
    else:
        name = "a column"
    return DataError(
        f"{where}: {name} holds a value that cannot be read ({type(error).__name__}: {error}).",
        "Dates are read from year 1 to 9999, durations up to 999,999,999 days, and times in zones that this "
        "system knows.",
        f"Turn the column into text or numbers, or leave it out. {NOTHING_WRITTEN}",
    )


READERS: dict[str, Callable[[Path], Iterator[NumberedRow]]] = {
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
_COLUMNAR = frozenset({read_parquet, read_arrow})


def is_columnar(path: Path) -> bool:
    """Whether a file holds its rows as columns, so that an object there has the keys of all the others.

    Rows that `dataflex export` wrote as Parquet are read without these keys.
    """
    if not _holds_columns(path):
        return False
    return data_suffix(path) != ".parquet" or not _is_exact(path, *file_state(path))


def _holds_columns(path: Path) -> bool:
    return READERS.get(data_suffix(path)) in _COLUMNAR


@lru_cache(maxsize=4096)
def _is_exact(path: Path, *_state: int) -> bool:
    try:
        return absent_nulls(pq.read_schema(path))
    except (pa.ArrowException, OSError):
        return False  # the reader says what is wrong with it


def is_data(path: Path) -> bool:
    """Whether a name is that of a file that is read: a known extension, for text also compressed."""
    known = data_suffix(path) in READERS
    return known and not (_holds_columns(path) and path.suffix.lower() in COMPRESSIONS)


def count_rows(path: Path) -> int:
    """Return how many rows a file has, by its metadata where it has such, else by reading it.

    Raises:
        DataError: as for `read_rows`.
    """
    return _counted(path, *file_state(path))


@lru_cache(maxsize=4096)
def _counted(path: Path, *_state: int) -> int:
    if data_suffix(path) == ".parquet":
        with _explained(path, "Parquet"):
            return int(pq.read_metadata(path).num_rows)
    return sum(1 for _ in read_rows(path))
