"""The pool, the features over it and the scores of the round before, side by side in blocks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import pyarrow as pa

from dataflex_pipeline import api
from dataflex_pipeline.store.parquet import ROW_GROUP
from dataflex_pipeline.store.parts import PartedTable
from dataflex_pipeline.store.tables import zip_blocks

if TYPE_CHECKING:
    from .score import Scoring

BLOCK_BYTES = 1 << 25
"""Bytes of one feature per block, at most about."""
FEWEST_ROWS = 256


def pool_blocks(
    scoring: Scoring, tables: Mapping[str, PartedTable], max_rows: int | None = None
) -> Iterator[api.Block]:
    """Yield what a method sees of the pool, in row order.

    Args:
        scoring: the round's. tables: every table that the method needs, finished.
        max_rows: rows per block; by default `block_rows`.
    """
    over_pool = _over_pool(scoring, tables)
    columns = ["row", "row_id", "valid", "reason", *scoring.method.pool_columns]
    sources: list[tuple[api.BlockTable, list[str]]] = [(scoring.pool, columns)]
    sources += [(table, table.schema.names) for table in over_pool.values()]
    if scoring.before is not None:
        sources.append((scoring.before, scoring.before.schema.names))
    for pool, *others in zip_blocks(*sources, max_rows=max_rows or block_rows(scoring, tables)):
        features = dict(zip(over_pool, others[: len(over_pool)], strict=True))
        yield api.Block(pool, features, others[-1] if scoring.before is not None else None)


def block_rows(scoring: Scoring, tables: Mapping[str, PartedTable]) -> int:
    """Return the rows of a block, so that wide features (gradients) never fill the memory."""
    widest = max((_row_bytes(table.schema) for table in _over_pool(scoring, tables).values()), default=1)
    return max(FEWEST_ROWS, min(ROW_GROUP, BLOCK_BYTES // widest))


def _over_pool(scoring: Scoring, tables: Mapping[str, PartedTable]) -> dict[str, PartedTable]:
    return {key: tables[key] for key, plan in scoring.needs.items() if plan.need.split == "pool"}


def _row_bytes(schema: pa.Schema) -> int:
    sizes: list[int] = [
        column.type.list_size * column.type.value_type.bit_width // 8
        for column in schema
        if pa.types.is_fixed_size_list(column.type)
    ]
    return sum(sizes) + 64
