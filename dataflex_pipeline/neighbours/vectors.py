"""Unit vectors of a table of embeddings, block by block.

Such a table has the columns ``row``, ``embedding`` (fixed-size list of float32, length 1) and ``valid``; rows
that are not valid have no vector and are passed over.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dataflex_pipeline.api import BlockTable
from dataflex_pipeline.store.tables import zip_blocks

BLOCK_BYTES = 1 << 27
"""Bytes of vectors in memory at a time: 87,381 rows of 384 dimensions."""


def dimension(table: BlockTable) -> int:
    """Return the length of a table's vectors."""
    return int(table.schema.field("embedding").type.list_size)


def block_vectors(batch: pa.RecordBatch) -> np.ndarray:
    """Return the vectors of a block; rows that are not valid hold anything. [rows, D] float32"""
    array = batch.column("embedding")
    size = array.type.list_size
    flat = array.values.slice(array.offset * size, len(array) * size)
    vectors: np.ndarray = flat.to_numpy(zero_copy_only=False).reshape(len(array), size)
    return vectors


def count_valid(table: BlockTable) -> int:
    """Return how many rows have a vector."""
    return sum(pc.sum(block.column("valid")).as_py() or 0 for block in table.blocks(["valid"]))


def vector_blocks(table: BlockTable, max_rows: int | None = None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (row numbers [n] int64, vectors [n, D] float32) of the valid rows, in row order.

    Args:
        table: embeddings, of parts of any size.
        max_rows: rows read at a time, by default ``BLOCK_BYTES`` of them.
    """
    rows = max_rows or max(1024, BLOCK_BYTES // (4 * dimension(table)))
    for (block,) in zip_blocks((table, ["row", "embedding", "valid"]), max_rows=rows):
        valid = block.column("valid").to_numpy(zero_copy_only=False)
        numbers, vectors = block.column("row").to_numpy(), block_vectors(block)
        if not valid.all():
            numbers, vectors = numbers[valid], vectors[valid]
        if len(numbers):
            yield numbers, np.ascontiguousarray(vectors, dtype=np.float32)


def gather_vectors(table: BlockTable, rows: np.ndarray) -> np.ndarray:
    """Return the vectors of some rows, one block in memory beside them. [n, D] float32

    Args:
        table: embeddings.
        rows: valid rows, rising, none twice. [n] int64
    """
    found = np.empty((len(rows), dimension(table)), dtype=np.float32)
    done = 0
    for numbers, vectors in vector_blocks(table):
        end = int(np.searchsorted(rows, numbers[-1], side="right"))
        places = np.searchsorted(numbers, rows[done:end])
        if not np.array_equal(numbers[places], rows[done:end]):
            raise ValueError("a row without a vector was asked for")
        found[done:end] = vectors[places]
        done = end
    if done < len(rows):
        raise ValueError("a row beyond the table was asked for")
    return found
