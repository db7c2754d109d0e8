"""A table as one Parquet file (scores, probabilities, index), written and read as a stream of blocks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dataflex_pipeline.ahead import ahead
from dataflex_pipeline.api import BlockTable
from dataflex_pipeline.store.atomic import atomic_file
from dataflex_pipeline.store.fingerprint import FINGERPRINT_KEY
from dataflex_pipeline.store.parquet import ROW_GROUP, encoding, footer, read_blocks, read_footer


class TableFile:
    """A finished single-file table.

    Attributes:
        path: the file. schema: its columns. n_rows: its rows. metadata: the ``dataflex.*`` notes of its
            footer. fingerprint: of what it was made from.

    Raises:
        CorruptError: the file is truncated or not Parquet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        raw = read_footer(path)
        self.schema: pa.Schema = pq.read_schema(path)
        self.n_rows: int = pq.read_metadata(path).num_rows
        self.fingerprint = raw.get(FINGERPRINT_KEY, b"").decode(errors="replace")
        prefix = b"dataflex."
        self.metadata = {
            key.removeprefix(prefix).decode(errors="replace"): value.decode(errors="replace")
            for key, value in raw.items()
            if key.startswith(prefix)
        }

    def blocks(
        self, columns: Sequence[str] | None = None, max_rows: int = ROW_GROUP
    ) -> Iterator[pa.RecordBatch]:
        """Yield record batches of at most ``max_rows`` rows, in row order; no more of it is in memory."""
        yield from read_blocks(self.path, columns, max_rows)


@contextlib.contextmanager
def table_writer(
    final: Path, schema: pa.Schema, ingredients: Mapping[str, Any], notes: Mapping[str, str] | None = None
) -> Iterator[Callable[[pa.RecordBatch | pa.Table], None]]:
    """Yield a function that appends blocks; the file appears under its name only when all went well.

    Args:
        final: where the table will be.
        schema: its columns; blocks are cast to it.
        ingredients: what it is made from; digest and text go into the footer.
        notes: further footer entries, each stored under ``dataflex.<key>``. The mapping is read at the
            end, so that counts found while writing can be put into it.
    """
    described = schema.with_metadata(footer(ingredients))
    with atomic_file(final) as temporary, contextlib.ExitStack() as stack:
        held: list[pa.Table] = []
        writers: list[pq.ParquetWriter] = []

        def write(block: pa.RecordBatch | pa.Table) -> None:
            table = pa.Table.from_batches([block]) if isinstance(block, pa.RecordBatch) else block
            held.append(table.select(schema.names).cast(schema))
            if sum(table.num_rows for table in held) >= ROW_GROUP:
                flush()

        def flush() -> None:
            whole = pa.concat_tables(held) if held else schema.empty_table()
            if not writers:  # how columns are stored depends on the first rows
                options = encoding(whole)
                writers.append(stack.enter_context(pq.ParquetWriter(temporary, described, **options)))
            writers[0].write_table(whole.replace_schema_metadata(described.metadata), ROW_GROUP)
            held.clear()

        yield write
        if held or not writers:
            flush()
        writers[0].add_key_value_metadata({f"dataflex.{key}": value for key, value in (notes or {}).items()})


def zip_blocks(
    *sources: tuple[BlockTable, Sequence[str]], max_rows: int = ROW_GROUP, threads: bool = False
) -> Iterator[tuple[pa.RecordBatch, ...]]:
    """Read several tables over the same rows side by side.

    Args:
        sources: pairs of a table and the columns wanted of it; all tables have the same number of rows,
            in the same order, whatever the sizes of their parts.
        max_rows: rows per block; every block but the last has exactly that many.
        threads: read each table ahead in a thread of its own; two more blocks of it are in memory then.

    Yields:
        One record batch per source, all over the same rows.

    Raises:
        ValueError: the tables differ in their number of rows.
    """
    counts = {table.n_rows for table, _ in sources}
    if len(counts) > 1:
        raise ValueError(f"tables of different lengths cannot be read side by side: {sorted(counts)}")
    streams = [_rechunk(table.blocks(columns, max_rows), max_rows) for table, columns in sources]
    yield from zip(*(ahead(each) if threads else each for each in streams), strict=True)


def _rechunk(batches: Iterator[pa.RecordBatch], rows: int) -> Iterator[pa.RecordBatch]:
    held: list[pa.RecordBatch] = []
    n_held = 0
    for batch in batches:
        while n_held + batch.num_rows >= rows:
            need = rows - n_held
            held.append(batch.slice(0, need))
            yield _joined(held)
            batch = batch.slice(need)
            held, n_held = [], 0
        if batch.num_rows:
            held.append(batch)
            n_held += batch.num_rows
    if held:
        yield _joined(held)


def _joined(batches: list[pa.RecordBatch]) -> pa.RecordBatch:
    """Return batches as one; one alone is not copied."""
    return batches[0] if len(batches) == 1 else pa.concat_batches(batches)
