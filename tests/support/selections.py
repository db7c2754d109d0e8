"""Selections of rows, made by hand: as lines of an export, and as the table of a round."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from dataflex_pipeline.export.selected import LINES
from dataflex_pipeline.schemas import SELECTION
from dataflex_pipeline.store.parts import PartedTable
from dataflex_pipeline.store.tables import table_writer


def row_ids(table: PartedTable) -> list[str]:
    """Return the row_ids of a prepared table, in order."""
    return [row_id for block in table.blocks(["row_id"]) for row_id in block.column("row_id").to_pylist()]


def selected_lines(
    pool: PartedTable, rows: Sequence[int], weights: Sequence[float] | None = None, number: int = 1
) -> pa.Table:
    """Return rows of a pool as the lines of one round, ranked as they are given; scores fall from 0."""
    ids = row_ids(pool)
    return pa.table(
        {
            "row": rows,
            "row_id": [ids[row] for row in rows],
            "rank": list(range(1, len(rows) + 1)),
            "round": [number] * len(rows),
            "score": [-float(rank) for rank in range(len(rows))],
            "weight": list(weights) if weights is not None else [1.0] * len(rows),
        }
    ).cast(LINES)


def write_selection(
    path: Path, pool: PartedTable, rows: Sequence[int], weights: Sequence[float] | None = None
) -> None:
    """Write the table of a selection, as `select` writes it."""
    lines = selected_lines(pool, rows, weights)
    table = pa.table(
        {
            "rank": lines.column("rank"),
            "row": lines.column("row"),
            "row_id": lines.column("row_id"),
            "source": pool.take(lines.column("row").to_numpy(), ["source"]).column("source"),
            "score": lines.column("score"),
            "probability": [1 / pool.n_rows] * len(rows),
            "weight": lines.column("weight"),
        }
    )
    made_from = {
        "table": "selection of a test",
        "method": "loss",
        "draw": {"strategy": "top_k"},
        "rows": list(rows),
    }
    with table_writer(path, SELECTION, made_from) as write:
        write(table)
