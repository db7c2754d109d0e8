"""A sample of the rows of a split, prepared in memory: lengths, and the seconds of preparing."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dataflex_pipeline.api import Split
from dataflex_pipeline.data.chat.labelled import ChatFormat
from dataflex_pipeline.data.prepare import CHUNK_ROWS, PART_ROWS
from dataflex_pipeline.data.rows import RowMaker
from dataflex_pipeline.data.scan import Scan
from dataflex_pipeline.data.settings import DataSettings, PlacedRow
from dataflex_pipeline.errors import DataError
from dataflex_pipeline.estimate.costs import RowCounts
from dataflex_pipeline.seeds import derive_seed
from dataflex_pipeline.store.parts import PartedTable, PartsWriter

SAMPLE_ROWS = PART_ROWS
"""Rows that are looked at; a split that has no more is counted exactly."""


@dataclass(frozen=True)
class Sample:
    """Some rows of a split, as they are or would be prepared.

    Attributes:
        split: pool or target.
        table: the rows, numbered from 0, in a seeded random order. counts: of the whole split.
        read_seconds: for reading all sources once. row_seconds: for preparing one row in one process.
            Both are 0 where the split is prepared already.
        part_bytes: on disk of one part of nothing. row_bytes: on disk of one row, as compressed here.
    """

    split: Split
    table: pa.Table
    counts: RowCounts
    read_seconds: float
    row_seconds: float
    part_bytes: float
    row_bytes: float

    @property
    def disk(self) -> float:
        """Bytes of the whole prepared split."""
        return -(-self.counts.rows // PART_ROWS) * self.part_bytes + self.counts.rows * self.row_bytes

    @property
    def usable(self) -> pa.Table:
        """The rows that can be used, numbered from 0."""
        return numbered(self.table.filter(self.table.column("valid")))


def sample_sources(
    settings: DataSettings, scan: Scan, chat: ChatFormat, split: Split, seed: int, scratch: Path
) -> Sample:
    """Prepare a random sample of rows that were scanned, and time it.

    Args:
        settings, scan, chat, split: as for `dataflex_pipeline.data.prepare.prepare`.
        seed: of the choice. scratch: an empty folder for a part.

    Raises:
        DataError: no row of the sample can be used.
    """
    began = time.perf_counter()
    picked = list(_picked(scan, _positions(scan.n_rows, split, seed)))
    read = time.perf_counter()
    maker = RowMaker(settings, scan, chat, split)
    chunks = [picked[start : start + CHUNK_ROWS] for start in range(0, len(picked), CHUNK_ROWS)]
    table = pa.concat_tables([maker.table(0, chunk) for chunk in chunks]).combine_chunks()
    part, row = disk_of(numbered(table), scratch / f"{split}-rows")
    per_row = (time.perf_counter() - read) / len(picked)
    return Sample(split, *_mixed(table, scan.n_rows, split, seed), read - began, per_row, part, row)


def sample_prepared(prepared: PartedTable, split: Split, seed: int) -> Sample:
    """Take a random sample of a split that is prepared already; see `sample_sources`."""
    positions = _positions(prepared.n_rows, split, seed)
    table = prepared.take(positions, prepared.schema.names).combine_chunks()
    size = sum(path.stat().st_size for path in prepared.files)
    return Sample(split, *_mixed(table, prepared.n_rows, split, seed), 0.0, 0.0, 0.0, size / prepared.n_rows)


def _positions(n_rows: int, split: Split, seed: int) -> np.ndarray:
    if n_rows <= SAMPLE_ROWS:
        return np.arange(n_rows)
    stream = np.random.default_rng(derive_seed(seed, "estimate", split))
    return np.sort(stream.choice(n_rows, SAMPLE_ROWS, replace=False))


def _picked(scan: Scan, positions: np.ndarray) -> Iterator[PlacedRow]:
    wanted = set(positions.tolist())
    return (row for place, row in enumerate(scan.placed_rows()) if place in wanted)


def _mixed(table: pa.Table, n_rows: int, split: Split, seed: int) -> tuple[pa.Table, RowCounts]:
    """Return the rows in random order, so that the first few stand for all, and the counts of the split."""
    counts = RowCounts.of(table)
    if counts.valid == 0:
        raise DataError(
            f"None of the {table.num_rows} rows of the {split} that were looked at can be used "
            f"({table.column('reason')[0].as_py()}).",
            "What cannot be scored or trained on costs nothing that could be estimated.",
            "`dataflex doctor` with the same settings shows a row and what is wrong with it.",
        )
    order = np.random.default_rng(derive_seed(seed, "estimate order", split)).permutation(table.num_rows)
    return numbered(table.take(pa.array(order))), counts.scaled(n_rows)


def numbered(table: pa.Table) -> pa.Table:
    """Return a table with its rows numbered from 0, in one piece."""
    place = table.schema.get_field_index("row")
    numbers = pa.array(np.arange(table.num_rows), pa.int64())
    return table.set_column(place, table.schema.field("row"), numbers).combine_chunks()


def disk_of(table: pa.Table, folder: Path) -> tuple[float, float]:
    """Return the bytes on disk of a part without rows, and of one more row, by writing both."""
    sizes = [
        write_parts(part, folder / name).files[0].stat().st_size
        for name, part in (("none", table.slice(0, 0)), ("all", table))
    ]
    return float(sizes[0]), (sizes[1] - sizes[0]) / max(table.num_rows, 1)


def write_parts(table: pa.Table, folder: Path, **ingredients: Any) -> PartedTable:
    """Write rows as a parted table of one part."""
    writer = PartsWriter(folder, table.schema, {"kind": "estimate", **ingredients})
    writer.write(0, table)
    return writer.finish(1, {})
