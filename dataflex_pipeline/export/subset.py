"""The selected rows as a data set of their own, in the format that they came in.

One line per row and round, in the order of training: the columns of the source as they were, and beside them

- ``row_id``, ``round``; ``score``: null for the warm-up, which draws uniformly;
- ``weight``: mean loss weight over the row's positions in the round; ``times``: how many it has there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dataflex_pipeline.data.columns import PREFIX
from dataflex_pipeline.store.parts import PartedTable
from dataflex_pipeline.store.run import RunFolder
from dataflex_pipeline.store.tables import TableFile

ADDED = ("row_id", "round", "score", "weight", "times")
CHUNK = 4096
"""Rows that are turned into text at once."""


def selected_rows(run: RunFolder, rounds: Sequence[int]) -> pa.Table:
    """Return which rows rounds trained on: row, row_id, round, score, weight, times.

    Args:
        run: the run. rounds: with an index each.
    """
    return pa.concat_tables([_of_round(run, number) for number in rounds])


def _of_round(run: RunFolder, number: int) -> pa.Table:
    index = TableFile(run.round(number).index)
    table = pa.Table.from_batches(list(index.blocks(["position", "row", "row_id", "weight", "score"])))
    measures = [
        ("position", "min"),
        ("row_id", "min"),
        ("score", "min"),
        ("weight", "mean"),
        ("row", "count"),
    ]
    grouped = table.group_by("row").aggregate(measures).sort_by("position_min")
    return pa.table(
        {
            "row": grouped.column("row"),
            "row_id": grouped.column("row_id_min"),
            "round": pa.array([number] * grouped.num_rows, pa.int32()),
            "score": grouped.column("score_min").cast(pa.float64()),
            "weight": grouped.column("weight_mean"),
            "times": grouped.column("row_count"),
        }
    )


def write_subset(
    pool: PartedTable, selected: pa.Table, folder: Path, say: Callable[[str], None]
) -> dict[str, int]:
    """Write ``selected.jsonl`` and ``selected.parquet``.

    Args:
        pool: the prepared pool. selected: from `selected_rows`. folder: where to; it exists.
        say: is told about columns that had to be named or typed otherwise.

    Returns:
        Rows (lines) and different rows written.
    """
    originals = [name for name in pool.schema.names if name.startswith(PREFIX)]
    json_columns = {
        name for name in originals if (pool.schema.field(name).metadata or {}).get(b"encoding") == b"json"
    }
    rows = pool.take(selected.column("row").to_numpy(), originals)
    names = {name: name.removeprefix(PREFIX) for name in originals}
    added = {name: f"selected_{name}" if name in names.values() else name for name in ADDED}
    renamed = [f"{name} -> {new}" for name, new in added.items() if new != name]
    if renamed:
        say(f"the data has columns of the same names, so ours are called otherwise: {', '.join(renamed)}")
    with (folder / "selected.jsonl").open("w", encoding="utf-8") as stream:
        for line in _lines(rows, names, json_columns, selected, added):
            stream.write(json.dumps(line, ensure_ascii=False) + "\n")
    columns = {
        names[name]: _typed(rows.column(name), name in json_columns, names[name], say) for name in originals
    }
    columns |= {new: selected.column(name) for name, new in added.items()}
    pq.write_table(pa.table(columns), folder / "selected.parquet", compression="zstd")
    distinct = len(selected.column("row").unique())
    return {"rows": selected.num_rows, "different_rows": distinct}


def _lines(
    rows: pa.Table,
    names: Mapping[str, str],
    json_columns: set[str],
    selected: pa.Table,
    added: Mapping[str, str],
) -> Iterator[dict[str, Any]]:
    """Yield the lines of the JSONL file; a source's missing columns are left out, as they were there."""
    for start in range(0, rows.num_rows, CHUNK):
        own = selected.slice(start, CHUNK).to_pylist()
        for line, ours in zip(rows.slice(start, CHUNK).to_pylist(), own, strict=True):
            originals = {
                names[name]: json.loads(value) if name in json_columns else value
                for name, value in line.items()
                if value is not None
            }
            yield originals | {new: ours[name] for name, new in added.items()}


def _typed(values: pa.ChunkedArray, is_json: bool, name: str, say: Callable[[str], None]) -> pa.ChunkedArray:
    """Return a column for Parquet: JSON text as the lists and structs that it stands for, where it can."""
    if not is_json:
        return values
    parsed = [None if text is None else json.loads(text) for text in values.to_pylist()]
    try:
        array = pa.array(parsed)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        say(f"column {name} holds values of several kinds: in selected.parquet it is JSON text")
        return values
    if pa.types.is_null(array.type):
        return values
    return pa.chunked_array([array])
