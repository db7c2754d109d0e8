"""Small tables in memory for the sampling tests, read in whatever batches a test wants."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa

from dataflex_pipeline.sampling import DrawSettings, draw
from dataflex_pipeline.schemas import PROBABILITIES, SCORES


class MemoryTable:
    """A BlockTable over an Arrow table; batches of at most ``batch`` rows."""

    def __init__(self, table: pa.Table, batch: int = 65536) -> None:
        self.table = table
        self.n_rows = table.num_rows
        self.schema = table.schema
        self.batch = batch

    def blocks(self, columns: Sequence[str] | None = None, max_rows: int = 65536) -> Iterator[pa.RecordBatch]:
        table = self.table if columns is None else self.table.select(list(columns))
        yield from table.combine_chunks().to_batches(max_chunksize=min(self.batch, max_rows))


def identities(n: int) -> list[str]:
    return [f"{i:032x}" for i in range(n)]


def scores_of(score: Sequence[float | None], valid=None, batch: int = 65536, **columns) -> MemoryTable:
    n = len(score)
    valid = [s is not None for s in score] if valid is None else valid
    table = pa.table(
        {
            "row": np.arange(n),
            "row_id": identities(n),
            "score": pa.array(score, pa.float64()),
            "valid": pa.array(valid, pa.bool_()),
            "reason": pa.nulls(n, pa.string()),
        }
    ).cast(SCORES)
    for name, values in columns.items():
        table = table.append_column(name, pa.array(values, pa.float64()))
    return MemoryTable(table, batch)


def probabilities_of(p: Sequence[float], batch: int = 65536) -> MemoryTable:
    n = len(p)
    table = pa.table({"row": np.arange(n), "row_id": identities(n), "probability": np.asarray(p, float)})
    return MemoryTable(table.cast(PROBABILITIES), batch)


def pool_of(n: int, tokens=None, sources=None, valid=None, batch: int = 65536) -> MemoryTable:
    return MemoryTable(
        pa.table(
            {
                "row": np.arange(n),
                "row_id": identities(n),
                "source": ["all"] * n if sources is None else list(sources),
                "n_tokens": pa.array([1] * n if tokens is None else tokens, pa.int32()),
                "valid": [True] * n if valid is None else list(valid),
            }
        ),
        batch,
    )


def rows_of(drawn) -> list[int]:
    return drawn.index.column("row").to_pylist()


def select(scores, pool=None, p=None, **given_):
    wanted = {"positions": 1000, "shuffle": False} | given_
    pool = pool or pool_of(scores.n_rows)
    probabilities = None if p is None else probabilities_of(p)
    return draw(scores, probabilities, pool, DrawSettings(**wanted))


def selected(drawn):
    return drawn.selected.tolist()
