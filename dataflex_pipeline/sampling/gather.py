"""Reading a few rows of a large table: only the row groups that hold them, a few at a time.

That line n is row n is read off the statistics in the footer, which cost nothing; decoding the ``row``
column for it would take a quarter of the time of reading ``row_id``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dataflex_pipeline.api import BlockTable
from dataflex_pipeline.errors import CorruptError
from dataflex_pipeline.sampling.uniforms import Integers
from dataflex_pipeline.store.parquet import corrupt
from dataflex_pipeline.store.parts import PartedTable
from dataflex_pipeline.store.tables import TableFile

RUN = 16
"""Row groups that are read with one opening of their file."""


@dataclass(frozen=True)
class _Group:
    """One row group of a file, and the places of the wanted rows in it."""

    number: int
    places: Integers


@dataclass(frozen=True)
class _Run:
    """Row groups of one file that one thread reads: to open a file takes as long as to decode two columns."""

    path: Path
    metadata: pq.FileMetaData
    groups: tuple[_Group, ...]
    columns: list[str]

    def read(self) -> pa.Table:
        try:
            # Read ahead of time, whole columns would stay in memory.
            with pq.ParquetFile(
                self.path, metadata=self.metadata, pre_buffer=False, page_checksum_verification=True
            ) as parquet:
                return pa.concat_tables([self._take(parquet, group) for group in self.groups])
        except (pa.ArrowInvalid, OSError) as error:
            raise corrupt(self.path, str(error).splitlines()[0]) from error

    def _take(self, parquet: pq.ParquetFile, group: _Group) -> pa.Table:
        whole = parquet.read_row_group(group.number, self.columns, use_threads=False)
        return whole.take(pa.array(group.places)).combine_chunks()


def gather(table: BlockTable, rows: Integers, columns: Sequence[str]) -> pa.Table:
    """Read rows by number, in the order given, repeats allowed.

    Args:
        table: with the column ``row``.
        rows: row numbers. [n] int64
        columns: columns to read.

    Returns:
        A table of n rows.

    Raises:
        CorruptError: the lines of the table are not in the order of their rows, or cannot be read.
    """
    wanted, back = np.unique(rows, return_inverse=True)
    found = pa.concat_tables(_pieces(table, wanted, list(columns)))
    return found.take(pa.array(back)).combine_chunks()


def _pieces(table: BlockTable, wanted: Integers, names: list[str]) -> list[pa.Table]:
    if isinstance(table, TableFile):
        return _read(_runs(table.path, 0, wanted, names))
    if isinstance(table, PartedTable):
        starts = zip(table.files, table.starts[:-1], table.starts[1:], strict=True)
        return _read(
            run
            for path, start, stop in starts
            for run in _runs(path, start, _between(wanted, start, stop), names)
        )
    pieces, start = [], 0
    for block in table.blocks(["row", *names]):
        if block.column("row")[0].as_py() != start:
            raise _reordered("The table", start)
        places = _between(wanted, start, start + block.num_rows) - start
        pieces.append(pa.Table.from_batches([block]).select(names).take(pa.array(places)))
        start += block.num_rows
    return pieces


def _runs(path: Path, start: int, wanted: Integers, names: list[str]) -> Iterator[_Run]:
    """Yield the row groups of a file, whose first row is ``start``, that hold wanted rows."""
    if not len(wanted):
        return
    metadata = pq.read_metadata(path)
    groups = list(_groups(path, metadata, start, wanted))
    for first in range(0, len(groups), RUN):
        yield _Run(path, metadata, tuple(groups[first : first + RUN]), names)


def _groups(path: Path, metadata: pq.FileMetaData, start: int, wanted: Integers) -> Iterator[_Group]:
    row = metadata.schema.names.index("row")
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        stop = start + group.num_rows
        seen = group.column(row).statistics
        if seen is None or not seen.has_min_max or (seen.min, seen.max) != (start, stop - 1):
            raise _reordered(str(path), start)
        places = _between(wanted, start, stop) - start
        if len(places):
            yield _Group(number, places)
        start = stop


def _reordered(what: str, start: int) -> CorruptError:
    return CorruptError(
        f"{what} does not hold row {start} at line {start}.",
        "Line n of a table is row n of the pool; this one was reordered, or belongs to another pool.",
        "Make the scores and probabilities of this round again (--overwrite).",
    )


def _read(runs: Iterator[_Run]) -> list[pa.Table]:
    with ThreadPoolExecutor(pa.cpu_count()) as threads:
        return list(threads.map(_Run.read, runs))


def _between(wanted: Integers, start: int, stop: int) -> Integers:
    return wanted[np.searchsorted(wanted, start) : np.searchsorted(wanted, stop)]
