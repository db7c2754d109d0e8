"""Vectors made elsewhere, one per row of a split: an ``.npy`` array or a Parquet table.

A Parquet table holds one list column of numbers, called ``embedding`` where there are several; where it also
has a column ``row_id``, the ids have to be those of the split.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dataflex_pipeline.errors import DataError
from dataflex_pipeline.store.fingerprint import file_digest

COLUMN = "embedding"
SUFFIXES = (".npy", ".parquet")
READ_ROWS = 8192
"""Rows of a Parquet file in memory at a time, whatever its row groups are."""


class VectorFile:
    """A file of vectors, opened and not read; nothing in it is ever unpickled.

    Attributes:
        path: the file. n_rows: vectors in it. dimension: length of each.

    Args:
        path: the file.

    Raises:
        DataError: it is missing or holds something else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.suffix not in SUFFIXES or not path.is_file():
            found = "There is no such file." if not path.is_file() else f"It ends in '{path.suffix}'."
            raise self._unusable(found, f"Give the path of a file that ends in {' or '.join(SUFFIXES)}.")
        self._batches: Iterator[pa.RecordBatch] | None = None
        self._at = 0
        self._array = self._open_array() if path.suffix == ".npy" else None
        self._column = "" if self._array is not None else self._find_column()
        self.n_rows, self.dimension = self._shape()

    @functools.cached_property
    def digest(self) -> str:
        """Digest of the file's bytes."""
        return file_digest(self.path)

    def check_rows(self, n_rows: int) -> None:
        """Check that there is one vector per row.

        Raises:
            DataError: another number.
        """
        if self.n_rows != n_rows:
            raise self._unusable(
                f"It has {self.n_rows} vectors, for {n_rows} rows.",
                "Give one vector per row, in the order of the rows: same data sets, same order, same "
                "max_samples; rows that cannot be used have one too (it is not read).",
            )

    def rows(self, start: int, row_ids: pa.ChunkedArray) -> np.ndarray:
        """Read the vectors of consecutive rows.

        Args:
            start: the first row. row_ids: content hashes of the rows. [n]

        Returns:
            The vectors as they are in the file. [n, dimension] float32

        Raises:
            DataError: the file says other row ids, or a list of it has another length.
        """
        n = len(row_ids)
        if self._array is not None:
            return np.asarray(self._array[start : start + n], dtype=np.float32)
        table = self._read(start, n)
        if "row_id" in table.schema.names:
            self._check_ids(start, table.column("row_id"), row_ids)
        return self._matrix(start, table.column(self._column))

    def _read(self, start: int, n: int) -> pa.Table:
        """Read n rows from ``start``. Parts are asked for in rising order, so the file is read once."""
        if self._batches is None or start < self._at:
            names = [self._column] + (["row_id"] if "row_id" in pq.read_schema(self.path).names else [])
            self._batches, self._at = self._stream(names), 0
            self._rest: pa.RecordBatch | None = None
        pieces: list[pa.RecordBatch] = []
        while self._at < start + n:
            batch = next(self._batches) if self._rest is None else self._rest
            first, last = max(start - self._at, 0), min(start + n - self._at, batch.num_rows)
            pieces.append(batch.slice(min(first, last), max(last - first, 0)))
            self._rest = batch.slice(last) if last < batch.num_rows else None
            self._at += last
        return pa.Table.from_batches(pieces)

    def _stream(self, names: list[str]) -> Iterator[pa.RecordBatch]:
        try:
            with pq.ParquetFile(self.path, pre_buffer=False) as file:
                yield from file.iter_batches(READ_ROWS, columns=names)
        except (pa.ArrowInvalid, OSError) as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> DataError:
        return self._unusable(
            f"It cannot be read: {str(error).splitlines()[0]}", "Give a whole Parquet file."
        )

    def _matrix(self, start: int, column: pa.ChunkedArray) -> np.ndarray:
        lists = column.combine_chunks()
        if lists.null_count:
            lists = pa.array(
                [[np.nan] * self.dimension if value is None else value for value in lists.to_pylist()]
            )
        flat = lists.flatten().to_numpy(zero_copy_only=False).astype(np.float32)
        lengths = np.full(len(lists), self.dimension)
        if not pa.types.is_fixed_size_list(lists.type):
            lengths = np.diff(lists.offsets.to_numpy())
        wrong = np.flatnonzero(lengths != self.dimension)
        if len(wrong):
            raise self._unusable(
                f"The vector of row {start + wrong[0]} has {lengths[wrong[0]]} numbers and that of row 0 "
                f"has {self.dimension}.",
                "Give vectors of one length.",
            )
        matrix: np.ndarray = flat.reshape(len(lists), self.dimension)
        return matrix

    def _check_ids(self, start: int, found: pa.ChunkedArray, expected: pa.ChunkedArray) -> None:
        pairs = zip(found.to_pylist(), expected.to_pylist(), strict=True)
        for offset, (own, wanted) in enumerate(pairs):
            if own != wanted:
                raise self._unusable(
                    f"Its row_id in line {start + offset} is {own}, and that of row {start + offset} is "
                    f"{wanted}.",
                    "Make the vectors from these very rows, in their order.",
                )

    def _open_array(self) -> np.ndarray:
        try:
            array = np.load(self.path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise self._unusable(
                f"It cannot be read: {str(error).splitlines()[0]}",
                "Write it with numpy.save, as a plain array of numbers.",
            ) from error
        if not isinstance(array, np.ndarray) or array.ndim != 2 or array.dtype.kind != "f":
            shape = f"{array.dtype}{list(array.shape)}" if isinstance(array, np.ndarray) else "an archive"
            raise self._unusable(
                f"It holds {shape}.", "Save one array of floating-point numbers, one row per vector."
            )
        return array

    def _find_column(self) -> str:
        try:
            schema = pq.read_schema(self.path)
        except (pa.ArrowInvalid, OSError) as error:
            raise self._unreadable(error) from error
        lists = [field.name for field in schema if _holds_vectors(field.type)]
        if COLUMN in lists or len(lists) == 1:
            return COLUMN if COLUMN in lists else lists[0]
        raise self._unusable(
            f"{len(lists)} of its columns hold lists of floating-point numbers"
            + (f" ({', '.join(lists[:4])})." if lists else "."),
            f"Call the column of the vectors '{COLUMN}'.",
        )

    def _shape(self) -> tuple[int, int]:
        if self._array is not None:
            return int(self._array.shape[0]), int(self._array.shape[1])
        n_rows = int(pq.read_metadata(self.path).num_rows)
        kind = pq.read_schema(self.path).field(self._column).type
        if pa.types.is_fixed_size_list(kind):
            return n_rows, int(kind.list_size)
        first = self._read(0, 1).column(self._column)[0].as_py() if n_rows else None
        return n_rows, len(first or [])

    def _unusable(self, found: str, fix: str) -> DataError:
        return DataError(f"The file of embeddings {self.path} cannot be used.", found, fix)


def _holds_vectors(kind: pa.DataType) -> bool:
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return bool(lists and pa.types.is_floating(kind.value_type))


def unit_vectors(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[str | None]]:
    """Scale vectors to length 1.

    Args:
        vectors: as the model gave them. [n, D] float32

    Returns:
        The unit vectors, 0 where there is none [n, D] float32; the lengths before [n] float64; and per
        vector why it has no direction, or None.
    """
    exact = vectors.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        lengths = np.linalg.norm(exact, axis=1)
    finite = np.isfinite(lengths)
    usable = finite & (lengths > 0)
    unit = np.where(usable[:, None], exact, 0.0) / np.where(usable, lengths, 1.0)[:, None]
    reasons: list[str | None] = [
        None if good else "the embedding is zero" if known else "the embedding is not finite"
        for good, known in zip(usable, finite, strict=True)
    ]
    return unit.astype(np.float32), lengths, reasons
