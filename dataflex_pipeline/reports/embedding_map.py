"""The map of a pool: its embeddings in two dimensions, by principal components.

With E the embeddings of the valid rows [n, D], m their mean and C = (E - m)^T (E - m) / n their covariance,
a row e is put at ((e - m) v1, (e - m) v2), v1 and v2 the unit eigenvectors of the two largest eigenvalues of
C, each with the sign that makes its largest entry positive. m and C are taken over all rows up to `SAMPLE` of
them, else over that many evenly spaced ones.

Why not UMAP: principal components need two passes over the vectors, draw no random numbers, and distances on
the map are projections of those that `near` and `tsds` work with. UMAP shows tighter groups, whose sizes and
distances mean nothing, and needs hours for a million rows on a few cores.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from dataflex_pipeline.api import BlockTable, Progress
from dataflex_pipeline.neighbours.vectors import block_vectors, count_valid, dimension, vector_blocks
from dataflex_pipeline.reports.catalogue import RunTable
from dataflex_pipeline.schemas import ROW, column
from dataflex_pipeline.store.fingerprint import FINGERPRINT_KEY, digest
from dataflex_pipeline.store.parquet import read_footer
from dataflex_pipeline.store.parts import PartedTable
from dataflex_pipeline.store.tables import table_writer

SAMPLE = 200_000
"""Rows that the axes are computed from, at most: more would not move them."""
VERSION = 1
"""Of how the map is computed."""
NAME = "map.parquet"
SCHEMA = pa.schema(
    [
        ROW,
        column("map_x", pa.float32(), "place on the first principal component of the embeddings"),
        column("map_y", pa.float32(), "place on the second principal component of the embeddings"),
    ]
)


def is_embedding(table: RunTable) -> bool:
    """Whether a table holds an embedding for each row."""
    schema = table.schema
    return (
        table.kind == "feature"
        and "embedding" in schema.names
        and pa.types.is_fixed_size_list(schema.field("embedding").type)
    )


def embedding_map(table: RunTable, folder: Path, progress: Progress) -> RunTable:
    """Return the map of a table of embeddings; the one in the folder if it was made from the same.

    Args:
        table: the embeddings of the pool. folder: where the map is kept. progress: told how far it is.
    """
    path = folder / NAME
    vectors = PartedTable.open(table.path)
    ingredients = {"table": "map", "version": VERSION, "embeddings": vectors.fingerprint, "sample": SAMPLE}
    made = digest(ingredients)
    if not path.is_file() or read_footer(path).get(FINGERPRINT_KEY) != made.encode():
        progress.start("map of the embeddings", vectors.n_rows, "rows")
        mean, axes = principal_axes(vectors)
        with table_writer(path, SCHEMA, ingredients) as write:
            for block in _places(vectors, mean, axes):
                write(block)
                progress.advance(block.num_rows)
        progress.finish()
    return RunTable("table", path, (path,), "map")


def principal_axes(table: BlockTable) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean and the two principal axes of a table's vectors.

    Returns:
        Mean [D] and axes [D, 2], float64. Axes are unit vectors whose largest entry is positive; the second
        axis of vectors of one dimension is zero.
    """
    from scipy.linalg import eigh

    size = dimension(table)
    step = max(1, -(-count_valid(table) // SAMPLE))
    total, products, n, seen = np.zeros(size), np.zeros((size, size)), 0, 0
    for _, vectors in vector_blocks(table):
        chosen = vectors[-seen % step :: step].astype(np.float64)  # [n, D]
        seen += len(vectors)
        total += chosen.sum(axis=0)
        products += chosen.T @ chosen
        n += len(chosen)
    mean = total / max(n, 1)
    covariance = products / max(n, 1) - np.outer(mean, mean)
    first = max(0, size - 2)
    values, found = eigh(covariance, subset_by_index=[first, size - 1])
    axes = np.zeros((size, 2))
    for place, each in enumerate(range(len(values) - 1, -1, -1)):
        axis = found[:, each]
        axes[:, place] = axis * np.sign(axis[np.argmax(np.abs(axis))])
    return mean, axes


def _places(table: BlockTable, mean: np.ndarray, axes: np.ndarray) -> Iterator[pa.Table]:
    """Yield the map block by block, all rows in order; a row without an embedding has no place."""
    for block in table.blocks(["row", "embedding", "valid"]):
        invalid = ~block.column("valid").to_numpy(zero_copy_only=False)
        places = (block_vectors(block) - mean) @ axes  # [n, 2]
        x, y = (pa.array(places[:, each].astype(np.float32), mask=invalid) for each in (0, 1))
        yield pa.table([block.column("row"), x, y], schema=SCHEMA)
