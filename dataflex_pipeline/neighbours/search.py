"""The nearest vectors of a table to some targets, exactly or through cells, one block of the table in memory.

Each block is searched by faiss on its own and its k best are merged into the k best so far, so memory is
one block and the answer. Through cells every block uses the same centroids: together the blocks are one
inverted file that is never held. The distances of what was found are then taken anew as |a - b|, in a
second pass: the expanded form |a|^2 + |b|^2 - 2ab that a matrix product gives is off by 3e-4 near 0, and
ranks are by distance, ties by row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dataflex_pipeline.api import BlockTable
from dataflex_pipeline.neighbours.cells import Cells, Layout, sample_places, train_cells
from dataflex_pipeline.neighbours.vectors import dimension, vector_blocks

if TYPE_CHECKING:
    import faiss


SPARE = 64
"""Neighbours kept beyond k where products on an accelerator choose them."""

Hits = Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]
"""Per block: its row numbers, and the k best squared distances [m, k] and places in it (-1: none) [m, k]."""


@dataclass(frozen=True)
class Found:
    """Nearest neighbours, nearest first, ties by row.

    Attributes:
        rows: of the table; -1 where there are fewer than k. [m, k] int64
        distances: Euclidean; infinity where there is no row. [m, k] float64
    """

    rows: np.ndarray
    distances: np.ndarray

    @property
    def counts(self) -> np.ndarray:
        """Neighbours of each target. [m] int64"""
        counts: np.ndarray = np.count_nonzero(self.rows >= 0, axis=1)
        return counts


def table_cells(table: BlockTable, n_valid: int, layout: Layout) -> Cells:
    """Train cells on an even sample of a table's vectors.

    Args:
        table: embeddings. n_valid: its valid rows. layout: how many cells.
    """
    places = sample_places(n_valid, layout)
    sample = np.empty((len(places), dimension(table)), dtype=np.float32)
    seen = 0
    for numbers, vectors in vector_blocks(table):
        first, last = np.searchsorted(places, [seen, seen + len(numbers)])
        sample[first:last] = vectors[places[first:last] - seen]
        seen += len(numbers)
    return train_cells(sample, layout)


def nearest(
    targets: np.ndarray, table: BlockTable, k: int, cells: Cells | None, device: str = "cpu"
) -> Found:
    """Return the k nearest rows of a table to each target.

    Args:
        targets: vectors. [m, D] float32
        table: embeddings to search.
        k: how many are wanted; fewer are returned where there are fewer.
        cells: where to look; None looks everywhere.
        device: where an exact search runs.
    """
    if cells is None and device != "cpu":
        rows = _device_rows(targets, table, k, device)
    else:
        rows = _merged(_block_hits(targets, table, k, cells), len(targets), k)[1]
    distances = pair_distances(targets, rows, table)
    order = np.lexsort((rows, distances), axis=1)[:, :k]
    return Found(np.take_along_axis(rows, order, 1), np.take_along_axis(distances, order, 1))


def _merged(hits: Hits, m: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the k best squared distances and rows of m targets over all blocks. [m, k] each"""
    import faiss

    squares = np.full((m, k), np.inf, dtype=np.float32)
    rows = np.full((m, k), -1, dtype=np.int64)
    for numbers, found_squares, places in hits:
        found = np.where(places >= 0, numbers[places], -1)
        squares, rows = faiss.merge_knn_results(
            np.stack([squares, found_squares]), np.stack([rows, found]), keep_max=False
        )
    return squares, rows


def _device_rows(targets: np.ndarray, table: BlockTable, k: int, device: str) -> np.ndarray:
    """Return, per target, rows that hold its k nearest and all that tie with the last one. [m, k or more]"""
    from dataflex_pipeline.neighbours.accelerated import MARGIN, block_hits

    kept = k + SPARE
    while True:
        hits = (
            (numbers, *block_hits(targets, vectors, kept, device))
            for numbers, vectors in vector_blocks(table)
        )
        squares, rows = _merged(hits, len(targets), kept)
        if ((rows[:, -1] < 0) | (squares[:, -1] > squares[:, k - 1] + MARGIN)).all():
            return rows
        kept *= 2


def _block_hits(targets: np.ndarray, table: BlockTable, k: int, cells: Cells | None) -> Hits:
    """Yield the hits of every block, from a search on the CPU."""
    import faiss

    index = None if cells is None else _inverted_file(cells)
    for numbers, vectors in vector_blocks(table):
        if index is None:
            squares, places = faiss.knn(targets, vectors, k)
        else:
            index.reset()
            index.add(vectors)
            squares, places = index.search(targets, k)
        places[~np.isfinite(squares)] = -1
        yield numbers, squares, places


def _inverted_file(cells: Cells) -> faiss.IndexIVFFlat:
    import faiss

    index = faiss.IndexIVFFlat(cells.quantizer(), cells.centroids.shape[1], len(cells.centroids))
    index.train(cells.centroids)  # keeps the centroids that the quantizer holds
    index.nprobe = cells.nprobe
    return index


def pair_distances(targets: np.ndarray, rows: np.ndarray, table: BlockTable) -> np.ndarray:
    """Return |target - vector| for pairs, infinity where the row is -1; exactly 0 for equal vectors.

    Args:
        targets: vectors. [m, D] float32
        rows: of the table, for each target. [m, k] int64
        table: embeddings.

    Returns:
        Distances. [m, k] float64
    """
    flat = rows.reshape(-1)
    order = np.argsort(flat, kind="stable")
    ordered = flat[order]
    distances = np.full(flat.shape, np.inf)
    for numbers, vectors in vector_blocks(table):
        first, last = np.searchsorted(ordered, [numbers[0], numbers[-1] + 1])
        pairs = order[first:last]
        places = np.searchsorted(numbers, ordered[first:last])
        distances[pairs] = np.sqrt(_pair_squares(targets, pairs // rows.shape[1], vectors, places))
    return distances.reshape(rows.shape)


def _pair_squares(left: np.ndarray, i: np.ndarray, right: np.ndarray, j: np.ndarray) -> np.ndarray:
    """Return |left_i - right_j|^2 for index pairs, without copying the vectors. [n] float64"""
    import faiss

    squares = np.empty(len(i), dtype=np.float32)
    # names keep the arrays alive while faiss reads them through bare pointers
    arrays: list[Any] = [np.ascontiguousarray(left), i.astype(np.int64), np.ascontiguousarray(right)]
    arrays.append(j.astype(np.int64))
    if len(i):
        a, ia, b, jb = (faiss.swig_ptr(array) for array in arrays)
        faiss.pairwise_indexed_L2sqr(  # type: ignore[attr-defined]
            left.shape[1], len(i), a, ia, b, jb, faiss.swig_ptr(squares)
        )
    return squares.astype(np.float64)


def recall(found: Found, truth: Found) -> np.ndarray:
    """Return, per target, the share of its true neighbours that were found; ties count as found. [m] float64

    Args:
        found: what a search returned. truth: what an exact search returned for the same targets and k.
    """
    farthest = np.where(truth.rows >= 0, truth.distances, -np.inf).max(axis=1, keepdims=True)
    hits = np.count_nonzero((found.rows >= 0) & (found.distances <= farthest), axis=1)
    shares: np.ndarray = hits / np.maximum(1, truth.counts)
    return shares
