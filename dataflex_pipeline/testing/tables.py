"""Made-up tables for the contracts: prepared rows, and features by nothing but their schema."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dataflex_pipeline.schemas import GROUP, IGNORED, PREPARED
from dataflex_pipeline.store.parts import PartedTable, PartsWriter

VOCABULARY = 60
"""Token ids of made-up rows are below."""
GROUPS = ("even", "odd")
WHOLE = 1 << 20
"""Rows per block, where a table is read in one."""


class MemoryTable:
    """A table in memory, read in blocks of at most ``cut`` rows.

    Args:
        table: its rows.
        cut: rows per block, at most.
    """

    def __init__(self, table: pa.Table, cut: int = WHOLE) -> None:
        self.table = table.combine_chunks()
        self.n_rows: int = table.num_rows
        self.schema: pa.Schema = table.schema
        self.cut = cut

    def blocks(self, columns: Sequence[str] | None = None, max_rows: int = WHOLE) -> Iterator[pa.RecordBatch]:
        """Yield record batches in row order."""
        table = self.table if columns is None else self.table.select(list(columns))
        yield from table.to_batches(max_chunksize=min(max_rows, self.cut))


def random_numbers(*what: Any) -> np.random.Generator:
    """Return a stream of random numbers of its own for whatever is named, the same each time."""
    return np.random.default_rng(zlib.crc32(repr(what).encode()))


def valid_rows(n_rows: int, *what: Any, share: float = 0.1) -> np.ndarray:
    """Return which rows of a made-up table are valid: most, but not all. [n_rows] bool"""
    valid: np.ndarray = random_numbers("valid", *what).random(n_rows) >= share
    valid[n_rows // 2] = False
    valid[0] = True
    return valid


def prepared_rows(n_rows: int, split: str) -> pa.Table:
    """Return prepared rows of random tokens; some are not valid. A target has groups.

    Args:
        n_rows: how many.
        split: pool, target or test; each has rows of its own.
    """
    rng = random_numbers("prepared", split)
    schema = PREPARED if split == "pool" else PREPARED.append(GROUP)
    valid = valid_rows(n_rows, split)
    ids = [rng.integers(3, VOCABULARY, rng.integers(4, 20)).tolist() for _ in range(n_rows)]
    prompts = [int(rng.integers(1, len(each))) for each in ids]
    responses = [len(each) - prompt for each, prompt in zip(ids, prompts, strict=True)]
    turns = [
        [
            {"role": "user", "content": f"{split} {row}?"},
            {"role": "assistant", "content": "w" * (row % 7 + 1)},
        ]
        for row in range(n_rows)
    ]
    columns: dict[str, Any] = {
        "row": np.arange(n_rows),
        "row_id": [f"{zlib.crc32(split.encode()):016x}{row:016x}" for row in range(n_rows)],
        "source": ["made up"] * n_rows,
        "messages": turns,
        "input_ids": ids,
        "labels": [[IGNORED] * p + each[p:] for each, p in zip(ids, prompts, strict=True)],
        "n_tokens": [len(each) for each in ids],
        "n_response_tokens": responses,
        "valid": valid,
        "reason": [None if fine else "made up to be invalid" for fine in valid],
        "note": [None] * n_rows,
        "group": [GROUPS[row % 2] for row in range(n_rows)],
    }
    return pa.table(
        {field.name: pa.array(columns[field.name], field.type) for field in schema}, schema=schema
    )


def written(folder: Path, table: pa.Table, rows_per_part: int) -> PartedTable:
    """Write a table as parts and return it."""
    writer = PartsWriter(folder, table.schema, {"made up": folder.name, "rows": table.num_rows})
    starts = range(0, table.num_rows, rows_per_part)
    for number, start in enumerate(starts):
        writer.write(number, table.slice(start, rows_per_part))
    return writer.finish(len(starts), {})


def feature_rows(rows: pa.Table, schema: pa.Schema, *what: Any, width: int = len(GROUPS)) -> pa.Table:
    """Return a feature's table over prepared rows, its values random: vectors of length 1, numbers above 0.

    Args:
        rows: that it is over. Those that are not valid have none, and a few more.
        schema: the feature's columns.
        what: names the table; the same name gives the same values.
        width: numbers in a list whose length the schema does not say.
    """
    rng = random_numbers(*what)
    valid = np.asarray(rows.column("valid")) & valid_rows(rows.num_rows, *what, share=0.05)
    known = {
        "row": rows.column("row").combine_chunks(),
        "row_id": rows.column("row_id").combine_chunks(),
        "valid": pa.array(valid),
        "reason": pa.array([None if fine else "made up to have no value" for fine in valid], pa.string()),
        "group": pa.array([GROUPS[row % 2] for row in range(rows.num_rows)]),
    }
    columns = []
    for field in schema:
        values = known.get(field.name)
        if values is None:
            values = _values(field, rows.num_rows, rng, ~valid if field.nullable else None, width)
        columns.append(values.cast(field.type))
    return pa.table(columns, schema=schema)


def _values(
    field: pa.Field, n_rows: int, rng: np.random.Generator, missing: np.ndarray | None, width: int
) -> pa.Array:
    """Return random values of a column, null where ``missing``. [n_rows]"""
    if pa.types.is_list(field.type) and pa.types.is_floating(field.type.value_type):
        lists = rng.standard_normal((n_rows, width)).tolist()
        kept = [True] * n_rows if missing is None else (~missing).tolist()
        return pa.array([each if k else None for each, k in zip(lists, kept, strict=True)], field.type)
    if pa.types.is_fixed_size_list(field.type):
        vectors = rng.standard_normal((n_rows, field.type.list_size))
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        numbers = field.type.value_type.to_pandas_dtype()
        mask = None if missing is None else pa.array(missing)
        flat = pa.array(vectors.astype(numbers).reshape(-1))
        return pa.FixedSizeListArray.from_arrays(flat, field.type.list_size, mask=mask)
    if pa.types.is_floating(field.type):
        return pa.array(rng.random(n_rows) * 4 + 0.1, mask=missing)
    if pa.types.is_integer(field.type):
        return pa.array(rng.integers(1, 50, n_rows), mask=missing)
    if pa.types.is_boolean(field.type):
        return pa.array(rng.random(n_rows) < 0.5, mask=missing)
    if pa.types.is_string(field.type):
        return pa.array(rng.choice(GROUPS, n_rows), mask=missing)
    raise NotImplementedError(f"{field}: no values are made up for this type; override tables() in your test")
