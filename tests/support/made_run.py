"""A run folder made of tables alone: a pool of any conversations, scores, selections and embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dataflex_pipeline.schemas import PREPARED, REASON, ROW, ROW_ID, SCORES, SELECTION, VALID, column
from dataflex_pipeline.store.parts import PartsWriter
from dataflex_pipeline.store.run import RunFolder
from dataflex_pipeline.store.tables import table_writer

Turns = Sequence[tuple[str, str]]


def make_run(
    folder: Path, conversations: Sequence[Turns], own: Mapping[str, Sequence[Any]] = {}
) -> RunFolder:
    """Make a run with a pool of two parts. own: columns of the data's own, without their prefix."""
    run = RunFolder(folder)
    folder.mkdir(parents=True)
    run.write({"component_name": "made"}, {"created": "now"})
    n = len(conversations)
    kinds = [pa.field(f"original_{name}", pa.array(values).type) for name, values in own.items()]
    columns: dict[str, Any] = {
        "row": list(range(n)),
        "row_id": [f"{row:032x}" for row in range(n)],
        "source": [("alpaca", "code")[row % 2] for row in range(n)],
        "messages": [
            [dict(zip(("role", "content"), turn, strict=True)) for turn in turns] for turns in conversations
        ],
        "input_ids": [[1, 2]] * n,
        "labels": [[-100, 2]] * n,
        "n_tokens": [2 + row for row in range(n)],
        "n_response_tokens": [1] * n,
        "valid": [True] * n,
        "reason": [None] * n,
        "note": [None] * n,
        **{f"original_{name}": list(values) for name, values in own.items()},
    }
    schema = pa.schema([*PREPARED, *kinds])
    table = pa.table({name: pa.array(columns[name], schema.field(name).type) for name in schema.names})
    writer = PartsWriter(run.pool, schema, {"table": "pool", "rows": n})
    half = n // 2
    writer.write(0, table.slice(0, half))
    writer.write(1, table.slice(half))
    writer.finish(2, {})
    return run


def add_scores(run: RunFolder, number: int, method: str, scores: Sequence[float | None]) -> None:
    """Write a score table; rows without a score are invalid."""
    n = len(scores)
    missing = [score is None for score in scores]
    columns = {
        "row": list(range(n)),
        "row_id": [f"{row:032x}" for row in range(n)],
        "score": list(scores),
        "valid": [not each for each in missing],
        "reason": ["no score" if each else None for each in missing],
    }
    with table_writer(
        run.round(number).scores(method),
        SCORES,
        {"table": "scores", "method": method, "round": number, "scores": list(scores)},
    ) as write:
        write(pa.table(columns, schema=SCORES))


def add_selection(run: RunFolder, number: int, rows: Sequence[int], name: str | None = None) -> None:
    """Write a selection of rows, best first; rows may repeat."""
    where = run.round(number)
    path = where.selection if name is None else where.selection_named(name)
    n = len(rows)
    columns = {
        "rank": list(range(1, n + 1)),
        "row": list(rows),
        "row_id": [f"{row:032x}" for row in rows],
        "source": ["alpaca"] * n,
        "score": [0.5] * n,
        "probability": [1 / n] * n,
        "weight": [1.0] * n,
    }
    with table_writer(
        path, SELECTION, {"table": "selection", "round": number, "rows": list(rows), "name": name}
    ) as write:
        write(pa.table(columns, schema=SELECTION))


def add_embeddings(run: RunFolder, vectors: np.ndarray, invalid: Sequence[int] = ()) -> None:
    """Write the embeddings of the pool [n, D]; the invalid rows have none."""
    n, size = vectors.shape
    kept = np.ones(n, bool)
    kept[list(invalid)] = False
    kind = pa.list_(pa.float32(), size)
    schema = pa.schema([ROW, ROW_ID, column("embedding", kind, "vector"), VALID, REASON])
    flat = pa.array(vectors.astype(np.float32).reshape(-1))
    table = pa.table(
        [
            list(range(n)),
            [f"{row:032x}" for row in range(n)],
            pa.FixedSizeListArray.from_arrays(flat, size, mask=pa.array(~kept)),
            kept.tolist(),
            [None if each else "no text" for each in kept],
        ],
        schema=schema,
    )
    ingredients = {"feature": "embeddings", "split": "pool", "sum": float(vectors.sum())}
    writer = PartsWriter(run.features / "embeddings-pool-0123456789abcdef", schema, ingredients)
    writer.write(0, table)
    writer.finish(1, {})
