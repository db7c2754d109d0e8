"""Rows of a draw, read from several tables side by side, block by block; line n of each table is row n."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dataflex_pipeline.api import BlockTable
from dataflex_pipeline.errors import CorruptError, DataError
from dataflex_pipeline.sampling.uniforms import Floats, Integers
from dataflex_pipeline.store.parquet import ROW_GROUP
from dataflex_pipeline.store.parts import PartedTable
from dataflex_pipeline.store.row_ids import read_row_ids
from dataflex_pipeline.store.tables import TableFile, zip_blocks


def check_order(table: BlockTable) -> None:
    """Check that the lines of a table are in the order of their rows, as far as that costs nothing.

    Of a file, the smallest and largest row of each row group are looked at, which stand in its footer; the
    parts of a parted table are counted by its manifest; other tables are looked at row by row.

    Args:
        table: with the column ``row``.

    Raises:
        CorruptError: they are not.
    """
    if isinstance(table, PartedTable):
        return
    start = 0
    for n_rows, first in _runs(table):
        if first != start:
            raise CorruptError(
                f"{table.path if isinstance(table, TableFile) else 'The table'} does not hold row {start} at "
                f"line {start}.",
                "Line n of a table is row n of the pool; this one was reordered, or belongs to another pool.",
                "Make the scores and probabilities of this round again (--overwrite).",
            )
        start += n_rows


def _runs(table: BlockTable) -> Iterator[tuple[int, int | None]]:
    """Yield the number of lines of each piece and its first row; None where they do not count up from it."""
    if not isinstance(table, TableFile):
        for block in table.blocks(["row"]):
            rows = block.column(0).to_numpy(zero_copy_only=False)
            if len(rows):
                yield len(rows), int(rows[0]) if (np.diff(rows) == 1).all() else None
        return
    metadata = pq.read_metadata(table.path)
    column = metadata.schema.names.index("row")
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        if not group.num_rows:  # of a table without rows
            continue
        seen = group.column(column).statistics
        counts_up = seen is not None and seen.has_min_max and seen.max - seen.min == group.num_rows - 1
        yield group.num_rows, seen.min if counts_up else None


BLOCK_ROWS = 8 * ROW_GROUP
"""Rows per block where nothing else is said. With an eighth of them, a draw takes a third longer."""


@dataclass(frozen=True)
class Block:
    """Consecutive rows of the pool as arrays, each [n].

    Attributes:
        start: row number of the first.
        valid: whether a row may be used.
        probability: of each row; 0 where it is not valid. None where the strategy needs none.
        values: the score columns asked for, NaN where null.
        tokens: ``n_tokens``, where a budget needs it.
        stratum: number of each row's quota, the last one for sources without; None without quotas.
    """

    start: int
    valid: npt.NDArray[np.bool_]
    probability: Floats | None
    values: dict[str, Floats]
    tokens: Integers | None
    stratum: npt.NDArray[np.int32] | None


@dataclass(frozen=True)
class Rows:
    """The tables of a draw, read side by side in blocks.

    Attributes:
        ranked: the table with ``row`` and ``valid`` (scores, or the pool for a warm-up).
        pool: the prepared pool, for ``n_tokens`` and ``source``.
        probabilities: table with ``row`` and ``probability``, or None.
        uniform: the probability of every valid row where there is no table, or None.
        columns: score columns to read.
        sources: names with a quota, in their order.
        with_tokens: whether to read ``n_tokens``.
        block_rows: rows per block; the outcome does not depend on it.
    """

    ranked: BlockTable
    pool: BlockTable
    probabilities: BlockTable | None = None
    uniform: float | None = None
    columns: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    with_tokens: bool = False
    block_rows: int = BLOCK_ROWS

    def __iter__(self) -> Iterator[Block]:
        names = (["n_tokens"] if self.with_tokens else []) + (["source"] if self.sources else [])
        wanted: list[tuple[BlockTable, Sequence[str]]] = [(self.ranked, ["valid", *self.columns])]
        if self.probabilities is not None:
            wanted.append((self.probabilities, ["probability"]))
        if names:
            wanted.append((self.pool, names))
        self._check_lengths([table.n_rows for table, _ in wanted])
        for table, _ in wanted:
            check_order(table)
        start = 0
        for batches in zip_blocks(*wanted, max_rows=self.block_rows, threads=True):
            yield self._block(start, {n: c for b in batches for n, c in zip(b.schema.names, b, strict=True)})
            start += batches[0].num_rows

    def _check_lengths(self, lengths: Sequence[int]) -> None:
        if len(set(lengths)) > 1:
            raise CorruptError(
                f"The tables of this selection have {', '.join(map(str, lengths))} rows.",
                "Scores, probabilities and pool hold one line per row of the pool, in the same order.",
                "Make the scores and probabilities of this round again from this pool (--overwrite).",
            )

    def _block(self, start: int, arrays: dict[str, pa.Array]) -> Block:
        valid = _flags(arrays["valid"])
        probability = None
        if self.probabilities is not None:
            probability = arrays["probability"].to_numpy(zero_copy_only=False)
            self._check_probability(start, valid, probability)
        elif self.uniform is not None:
            probability = np.where(valid, self.uniform, 0.0)
        values = {name: arrays[name].to_numpy(zero_copy_only=False) for name in self.columns}
        values = {name: value.astype(np.float64, copy=False) for name, value in values.items()}
        tokens = arrays["n_tokens"].to_numpy(zero_copy_only=False) if self.with_tokens else None
        return Block(
            start=start,
            valid=valid,
            probability=probability,
            values=values,
            tokens=None if tokens is None else tokens.astype(np.int64),
            stratum=self._stratum(arrays["source"]) if self.sources else None,
        )

    def _check_probability(self, start: int, valid: npt.NDArray[np.bool_], probability: Floats) -> None:
        # min() is NaN when anything is, and a NaN fails the comparison; infinity fails the second.
        if not (probability.min() >= 0 and probability.max() <= 1):
            row = start + int(np.flatnonzero(~((probability >= 0) & (probability <= 1)))[0])
            raise CorruptError(
                f"The probability of row {row} is {probability[row - start]}.",
                "A probability lies between 0 and 1.",
                "Make the probabilities of this round again (--overwrite).",
            )
        if not valid.all() and probability[~valid].any():
            row = start + int(np.flatnonzero(~valid & (probability > 0))[0])
            raise CorruptError(
                f"Row {row} is not valid and has the probability {probability[row - start]}.",
                "A row that cannot be used must never be drawn, so these tables do not belong together.",
                "Make the scores and probabilities of this round again (--overwrite).",
            )

    def _stratum(self, source: pa.Array) -> npt.NDArray[np.int32]:
        found = pc.index_in(source, value_set=pa.array(self.sources, source.type))
        numbers: npt.NDArray[np.int32] = pc.fill_null(found, len(self.sources)).to_numpy(zero_copy_only=False)
        return numbers


def _flags(array: pa.BooleanArray) -> npt.NDArray[np.bool_]:
    """Return a column of flags as one byte each; pyarrow's own way takes twelve times as long. [n]"""
    if array.null_count:
        raise CorruptError(
            f"{array.null_count} rows are neither valid nor not valid.",
            "The column valid says of every row whether it can be used.",
            "Make the scores of this round again (--overwrite).",
        )
    stop = array.offset + len(array)
    bits = np.frombuffer(array.buffers()[1], np.uint8)
    return np.unpackbits(bits, count=stop, bitorder="little")[array.offset :].view(np.bool_)


class ScoreTable(TableFile):
    """A score table as a draw sees it: a row without a score (no candidate of its method) is not valid.

    Attributes:
        whole: the table as it is.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.whole = TableFile(path)

    def blocks(
        self, columns: Sequence[str] | None = None, max_rows: int = ROW_GROUP
    ) -> Iterator[pa.RecordBatch]:
        """Yield record batches of at most ``max_rows`` rows, in row order."""
        names = list(self.schema.names if columns is None else columns)
        if "candidates" not in self.metadata or "valid" not in names:
            yield from super().blocks(names, max_rows)
            return
        for block in super().blocks([*names, *(["score"] if "score" not in names else [])], max_rows):
            drawable = pc.and_(block.column("valid"), block.column("score").is_valid())
            place = block.schema.get_field_index("valid")
            yield block.set_column(place, block.schema.field(place), drawable).select(names)


def count_valid(table: BlockTable) -> int:
    """Return how many rows of a table are valid.

    Raises:
        DataError: none is.
    """
    count = sum(int(pc.sum(block.column("valid")).as_py() or 0) for block in table.blocks(["valid"]))
    if not count:
        raise DataError(
            f"None of the {table.n_rows} rows is valid.",
            "Only valid rows can be selected.",
            "Look at the reason column of the table; the data, the template or the model has to change.",
        )
    return count


def count_by_source(ranked: BlockTable, pool: BlockTable) -> dict[str, int]:
    """Return how many valid rows each source has; sources without any are left out.

    Args:
        ranked: with ``valid``. pool: with ``source``, of the same rows.

    Raises:
        DataError: no row is valid.
    """
    count_valid(ranked)
    found: Counter[str] = Counter()
    for valid, source in zip_blocks((ranked, ["valid"]), (pool, ["source"])):
        for each in pc.value_counts(source.column("source").filter(valid.column("valid"))).to_pylist():
            found[each["values"]] += each["counts"]
    return dict(found)


def source_names(pool: BlockTable) -> list[str]:
    """Return the names of the pool's sources, in order of appearance."""
    names: dict[str, None] = {}
    for block in pool.blocks(["source"]):
        names.update(dict.fromkeys(pc.unique(block.column("source")).to_pylist()))
    return list(names)


def gather(table: BlockTable, rows: Integers, column: str) -> pa.ChunkedArray:
    """Return a column's values of some rows, in one pass over that column.

    Args:
        table: line n is row n.
        rows: row numbers, in any order, repeats allowed. [n]
        column: its name.

    Returns:
        The values in the order of ``rows``. [n]
    """
    wanted, back = np.unique(rows, return_inverse=True)
    pieces, start = [], 0
    for block in table.blocks([column]):
        stop = start + block.num_rows
        places = wanted[np.searchsorted(wanted, start) : np.searchsorted(wanted, stop)] - start
        pieces.append(block.column(0).take(pa.array(places)))
        start = stop
    return pa.chunked_array(pieces).take(pa.array(back))


def gather_row_ids(pool: BlockTable, rows: Integers) -> pa.ChunkedArray:
    """Return the row ids of some rows: of a prepared pool from the file that it has for that.

    Args:
        pool: with the column ``row_id``. rows: as for ``gather``.

    Raises:
        CorruptError: that file is not the pool's.
    """
    return read_row_ids(pool, rows) if isinstance(pool, PartedTable) else gather(pool, rows, "row_id")
