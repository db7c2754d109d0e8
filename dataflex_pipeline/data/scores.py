"""Scores made elsewhere: one number per line of a file, joined to the rows of the pool.

A Parquet, CSV (``.tsv``: tabs) or JSONL file names its columns; an ``.npy`` file holds one array. Lines are
joined by ``row_id`` (content hash), by ``row`` (position in the pool), or as they stand: line i for row i.
Every key is there once; lines of one ``row_id``, which rows of the same content share, may repeat the same
score. Nothing is ever unpickled. Numbers may be written as text.

In memory are 9 bytes per line, and for its key 8 (``row``) or 32 (``row_id``) more; twice that while the keys
are sorted. The file itself is read in pieces.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dataflex_pipeline.errors import DataError, did_you_mean

By = Literal["row_id", "row", "line"]
SUFFIXES = (".parquet", ".csv", ".tsv", ".jsonl", ".npy")
SCORE = "score"
"""The column of a file where none is named."""
READ_ROWS = 1 << 16
"""Lines in memory at a time as they are in the file."""
LARGEST_ROW = 1 << 53
"""Whole numbers below are exact as floats."""
ID_WIDTH = 32
"""Characters of a row_id."""
FOUND, MISSING, ODD, INFINITE, ABSENT = range(5)
"""What there is for a row: a finite number; nothing; no number; one that is not finite; no line at all."""
_NUMBER = r"^([+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?)$"
_INFINITE = r"^(?i)[+-]?(nan|inf|infinity)$"
_AROUND = ' \t\r\n"'
"""What may stand around a number written as text."""


def reasons(kind: np.ndarray, place: str) -> np.ndarray:
    """Return why rows have no score, None where they have one. [n] object

    Args:
        kind: what there is for each row. [n] uint8
        place: words for the column or the file.
    """
    words = np.array([None, "is empty", "is no number", "is not finite", "has no line for this row"], object)
    words[1:] = f"{place} " + words[1:]
    found: np.ndarray = words[kind]
    return found


def numbers_of(column: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Return the numbers of a column of whatever type.

    Args:
        column: numbers, or text that holds numbers; anything else is none (booleans too).

    Returns:
        The numbers, NaN where there is none or it is not finite. [n] float64
        What there is: FOUND, MISSING, ODD or INFINITE. [n] uint8
    """
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        return _numbers_in_text(column)
    kind = np.where(column.is_valid().to_numpy(zero_copy_only=False), FOUND, MISSING).astype(np.uint8)
    plain = (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal)
    if not any(is_plain(column.type) for is_plain in plain):
        kind[kind == FOUND] = ODD
        return np.full(len(column), np.nan), kind
    return _finite(column.cast(pa.float64(), safe=False), kind)


def _numbers_in_text(column: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    text = pc.fill_null(pc.utf8_trim(column, _AROUND), "")
    written = pc.match_substring_regex(text, _NUMBER)
    kind = np.where(written.to_numpy(zero_copy_only=False), FOUND, ODD).astype(np.uint8)
    kind[pc.match_substring_regex(text, _INFINITE).to_numpy(zero_copy_only=False)] = INFINITE
    kind[pc.equal(text, "").to_numpy(zero_copy_only=False)] = MISSING
    return _finite(pc.if_else(written, text, pa.scalar(None, text.type)).cast(pa.float64()), kind)


def _finite(numbers: pa.Array, kind: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    values = np.array(numbers.to_numpy(zero_copy_only=False), dtype=np.float64)
    infinite = ~np.isfinite(values)
    kind[infinite & (kind == FOUND)] = INFINITE
    values[infinite] = np.nan
    return values, kind


@dataclass(frozen=True)
class Joined:
    """The scores of a file, ready to be looked up.

    Attributes:
        by: what lines are joined by. values: NaN where there is no number. [lines] float64
        kind: what there is for each. [lines] uint8
        keys: rising; row numbers [lines] int64 or ids [lines] S32. None where line i is row i.
    """

    by: By
    values: np.ndarray
    kind: np.ndarray
    keys: np.ndarray | None

    def alike(self, one: np.ndarray, other: np.ndarray) -> np.ndarray:
        """Return whether lines hold the same. one, other: places of lines. [n] each"""
        equal = (self.values[one] == self.values[other]) | (self.kind[one] != FOUND)
        same: np.ndarray = equal & (self.kind[one] == self.kind[other])
        return same

    def of(self, rows: pa.Array, row_ids: pa.Array) -> tuple[np.ndarray, np.ndarray]:
        """Return the scores of some rows and what there is for them, as `numbers_of` does. [n] each"""
        wanted = rows.to_numpy(zero_copy_only=False)
        if self.keys is None:
            return self.values[wanted], self.kind[wanted]
        if self.by == "row_id":
            wanted = _fixed(row_ids)
        place = np.minimum(np.searchsorted(self.keys, wanted), len(self.keys) - 1)
        there = self.keys[place] == wanted
        return np.where(there, self.values[place], np.nan), np.where(there, self.kind[place], ABSENT)


def existing(path: Path) -> Path:
    """Return the path of a file of scores that is there.

    Raises:
        DataError: there is none, or its name tells no format.
    """
    if not path.is_file():
        raise _unusable(path, "There is no such file.", "Correct the path.")
    if path.suffix not in SUFFIXES:
        raise _unusable(
            path, f"Its name ends in '{path.suffix}'.", f"Give a file of one of {', '.join(SUFFIXES)}."
        )
    return path


class ScoreFile:
    """A file of scores, opened; its numbers are read when they are first asked for, once.

    Attributes:
        path: the file. column: that holds the scores; empty for an array. by: what lines are joined by.

    Args:
        path: the file.
        column: that holds the scores; by default "score". An array has none.
        by: what lines are joined by; by default row_id, else row, where the file has a column of that name,
            else line.

    Raises:
        DataError: it is missing, holds something else, or has no such column.
    """

    def __init__(self, path: Path, column: str | None = None, by: By | None = None) -> None:
        self.path = existing(path)
        names = self._names()
        self._alone = len(names) == 1
        self.column = self._chosen(column, names)
        self.by: By = by or _key(names)
        if self.by != "line" and self.by not in names:
            raise self._unusable(
                f"Its lines are to be joined by {self.by}, and it has no column of that name.",
                f"Its columns are {', '.join(names) or 'none'}. Name one '{self.by}', or join by line.",
            )

    @property
    def place(self) -> str:
        """Words for where the scores stand."""
        return f"'{self.column}' of {self.path.name}" if self.column else self.path.name

    @cached_property
    def joined(self) -> Joined:
        """The scores.

        Raises:
            DataError: it cannot be read, no line has a number, or a key is none or is there twice.
        """
        values, kinds, keys = [np.empty(0)], [np.empty(0, np.uint8)], []
        start = 0
        for scores, key in self._columns():
            found, kind = numbers_of(scores)
            values.append(found)
            kinds.append(kind)
            if key is not None:
                keys.append(self._rows(key, start) if self.by == "row" else self._ids(key, start))
            start += len(found)
        whole = Joined(self.by, np.concatenate(values), np.concatenate(kinds), None)
        if not (whole.kind == FOUND).any():
            where = f" in the column '{self.column}'." if self.column else "."
            raise self._unusable(
                f"None of its {start:,} lines has a finite number{where}", "Give a file of scores."
            )
        return self._by_key(whole, np.concatenate(keys)) if keys else whole

    def check_rows(self, n_rows: int) -> None:
        """Check that the file fits the pool, as far as that can be told without its row ids.

        Args:
            n_rows: rows of the pool.

        Raises:
            DataError: it does not, or cannot be used at all.
        """
        found = self.joined
        if self.by == "line" and len(found.values) != n_rows:
            raise self._unusable(
                f"It has {len(found.values):,} lines and the pool has {n_rows:,} rows: one line is one row.",
                "Give one line per row, in their order (same data sets, order and max_samples), or a column "
                "row_id or row to join by.",
            )
        if self.by == "row" and found.keys is not None and found.keys[-1] >= n_rows:
            raise self._unusable(
                f"It has the row {found.keys[-1]}, and the pool has the rows 0 to {n_rows - 1}.",
                "Make the file from this pool (same data sets, order and max_samples), or join by row_id.",
            )

    def _by_key(self, found: Joined, keys: np.ndarray) -> Joined:
        """Return the lines sorted by their keys, each of which is there once."""
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        ordered = Joined(self.by, found.values[order], found.kind[order], keys)
        twice = np.flatnonzero(keys[1:] == keys[:-1])
        if self.by == "row_id":  # rows of the same content may have a line each
            twice = twice[~ordered.alike(twice, twice + 1)]
        if len(twice):
            first, second, same = order[twice[0]], order[twice[0] + 1], keys[twice[0]]
            by_id = self.by == "row_id"
            raise self._unusable(
                f"The {self.by} {same.decode() if by_id else same} is on line {first} and on line {second}, "
                f"counted from 0{', with another score' if by_id else ''}.",
                "Keep one line of each."
                + (" Rows of the same content have one row_id: join those by row." if by_id else ""),
            )
        return ordered

    def _rows(self, column: pa.Array, start: int) -> np.ndarray:
        """Return row numbers, checked. [n] int64"""
        numbers, kind = numbers_of(column)
        wrong = np.flatnonzero(
            (kind != FOUND) | (numbers % 1 != 0) | (numbers < 0) | (numbers >= LARGEST_ROW)
        )
        if len(wrong):
            raise self._unusable(
                f"Line {start + wrong[0]}, counted from 0, has the row {column[int(wrong[0])].as_py()!r}.",
                "A row is a whole number, its position in the pool: correct it, or join by row_id or line.",
            )
        return numbers.astype(np.int64)

    def _ids(self, column: pa.Array, start: int) -> np.ndarray:
        """Return row ids, checked. [n] S32"""
        text = column.cast(pa.string())
        fine = pc.fill_null(pc.match_substring_regex(text, f"^[0-9a-f]{{{ID_WIDTH}}}$"), False)
        wrong = np.flatnonzero(~fine.to_numpy(zero_copy_only=False))
        if len(wrong):
            raise self._unusable(
                f"Line {start + wrong[0]}, counted from 0, has the row_id {text[int(wrong[0])].as_py()!r}.",
                f"A row_id is the {ID_WIDTH} hexadecimal digits that the pool's table has for a row; rows of "
                "your own numbering can be joined by row or line.",
            )
        return _fixed(text)

    # ------------------------------------------------------------ the formats

    def _names(self) -> list[str]:
        """Return the names of its columns; none of an array."""
        if self.path.suffix == ".npy":
            return []
        with self._explained():
            if self.path.suffix == ".parquet":
                return list(pq.read_schema(self.path).names)
            if self.path.suffix == ".jsonl":
                return _json_names(self.path)
            with self._csv() as reader:
                return list(reader.schema.names)

    def _chosen(self, column: str | None, names: Sequence[str]) -> str:
        if self.path.suffix == ".npy":
            if column is not None:
                raise self._unusable(
                    f"Its column '{column}' was asked for, and an array has no columns.",
                    "Leave column out, or give a table.",
                )
            return ""
        wanted = column or SCORE
        if wanted not in names:
            raise self._unusable(
                f"It has no column '{wanted}'.{did_you_mean(wanted, names)}",
                f"Its columns are {', '.join(names) or 'none'}. Set column to the one that holds the scores.",
            )
        return wanted

    def _columns(self) -> Iterator[tuple[pa.Array, pa.Array | None]]:
        """Yield scores and keys piece by piece."""
        if self.path.suffix == ".npy":
            yield from ((piece, None) for piece in self._array())
            return
        names = list(dict.fromkeys([self.column, *([] if self.by == "line" else [self.by])]))
        with self._explained():
            for batch in self._batches(names):
                yield batch.column(self.column), None if self.by == "line" else batch.column(self.by)

    def _batches(self, names: list[str]) -> Iterator[pa.RecordBatch]:
        if self.path.suffix == ".parquet":
            with pq.ParquetFile(self.path, pre_buffer=False) as file:
                yield from file.iter_batches(READ_ROWS, columns=names)
        elif self.path.suffix == ".jsonl":
            yield from _json_batches(self.path, names)
        else:
            # Beside no other column, an empty line is a row without a score.
            with self._csv(names, ignore_empty_lines=not self._alone) as reader:
                yield from reader

    def _csv(self, names: Sequence[str] = (), **more: bool) -> Any:
        """Open it; columns that are named are read as text, and no others."""
        from pyarrow import csv

        tab = self.path.suffix == ".tsv"
        return csv.open_csv(
            self.path,
            parse_options=csv.ParseOptions(delimiter="\t" if tab else ",", newlines_in_values=True, **more),
            convert_options=csv.ConvertOptions(
                include_columns=list(names),
                column_types=dict.fromkeys(names, pa.string()),
                null_values=[""],
                strings_can_be_null=True,
            ),
        )

    def _array(self) -> Iterator[pa.Array]:
        with self._explained():
            array = np.load(self.path, mmap_mode="r", allow_pickle=False)
        if not isinstance(array, np.ndarray) or array.ndim != 1 or array.dtype.kind not in "fiu":
            found = f"{array.dtype}{list(array.shape)}" if isinstance(array, np.ndarray) else "an archive"
            raise self._unusable(
                f"It holds {found}.", "Save a one-dimensional array of numbers with numpy.save."
            )
        for start in range(0, len(array), READ_ROWS):
            yield pa.array(np.asarray(array[start : start + READ_ROWS], dtype=np.float64))

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn what a reader says about the file into an error in three parts."""
        try:
            yield
        except (ValueError, OSError, EOFError) as error:
            kind = self.path.suffix.removeprefix(".").upper()
            raise self._unusable(
                f"It cannot be read: {str(error).splitlines()[0]}", f"Give a whole {kind} file."
            ) from error

    def _unusable(self, found: str, fix: str) -> DataError:
        return _unusable(self.path, found, fix)


def _unusable(path: Path, found: str, fix: str) -> DataError:
    return DataError(f"The file of scores {path} cannot be used.", found, fix)


def _key(names: Sequence[str]) -> By:
    """Return what lines are joined by where nothing is said."""
    if "row_id" in names:
        return "row_id"
    return "row" if "row" in names else "line"


def _fixed(ids: pa.Array) -> np.ndarray:
    """Return row ids as text of one length. [n] S32"""
    padded = pc.ascii_rpad(ids, ID_WIDTH).cast(pa.binary()).cast(pa.binary(ID_WIDTH))
    return np.frombuffer(padded.buffers()[1], f"S{ID_WIDTH}")[padded.offset : padded.offset + len(padded)]


def _json_names(path: Path) -> list[str]:
    """Return the keys of all objects of a JSONL file, in the order of their appearance."""
    sql = "describe from read_json(?, format = 'newline_delimited', sample_size = -1, maximum_depth = 1)"
    with _json_query(sql, path) as answer:
        return [line[0] for line in answer.fetchall()]


def _json_batches(path: Path, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Yield values of a JSONL file's objects as text, null where there is none."""
    columns = ", ".join("'" + name.replace("'", "''") + "': 'VARCHAR'" for name in names)
    with _json_query(
        f"from read_json(?, format = 'newline_delimited', columns = {{{columns}}})", path
    ) as answer:
        # What it is called now, and what it was called in older DuckDB.
        yield from (getattr(answer, "to_arrow_reader", None) or answer.fetch_arrow_reader)(READ_ROWS)


@contextlib.contextmanager
def _json_query(sql: str, path: Path) -> Iterator[Any]:
    """Ask DuckDB about a file.

    Raises:
        ValueError: it cannot be read.
    """
    import duckdb

    try:
        with duckdb.connect(":memory:") as connection:
            connection.execute("set preserve_insertion_order = true")
            yield connection.sql(sql, params=[str(path)])
    except duckdb.Error as error:
        raise ValueError(str(error)) from error
