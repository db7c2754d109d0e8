"""Rows that are too like one taken before them: cosines to the rows taken so far, made on demand.

    passed over  <=>  max over the rows t taken before of cos(e, e_t) > limit,   cos(a, b) = 1 - |a - b|^2 / 2

with e unit embeddings. Every comparison is made, in matrix products of a batch of rows with the rows taken. A
product's cosine is off by about 1e-6, so one within `UNSURE` of the limit is taken anew as written above, in
float64: the outcome does not depend on the batches.

Memory: the vectors of the rows that may be looked at and of those taken, 4 D bytes each. Time: 2 D operations
for each pair of a row that was looked at and a row taken before it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dataflex_pipeline.api import BlockTable
from dataflex_pipeline.neighbours.vectors import dimension, vector_blocks

BATCH = 512
"""Rows that are compared with the taken ones at a time."""
TILE = 1 << 15
"""Taken rows in one matrix product."""
UNSURE = 1e-5


@dataclass(frozen=True)
class PassedOver:
    """Rows that were passed over, in the order in which they were looked at. Each [n]

    Attributes:
        rows: int64. like: the taken row of the highest cosine, the first taken of equals; -1 where the row
            has no embedding.
        similarity: that cosine; NaN without one. float64
    """

    rows: np.ndarray
    like: np.ndarray
    similarity: np.ndarray


class Apart:
    """Keeps the rows that are taken apart.

    Args:
        table: embeddings of the pool.
        limit: the highest cosine that two rows taken may have.
    """

    def __init__(self, table: BlockTable, limit: float) -> None:
        self._table, self._limit = table, limit
        self.begin(np.empty(0, np.int64))

    def begin(self, rows: np.ndarray) -> None:
        """Forget what was taken, and read the vectors of the rows that may be looked at.

        Args:
            rows: each once, about in the order in which they are looked at. [n] int64
        """
        self._order = rows
        self._place = {int(row): place for place, row in enumerate(rows)}
        self._vectors, self._there = _gather(self._table, rows)
        self._best = np.full(len(rows), -np.inf, dtype=np.float32)
        self._seen = np.zeros(len(rows), dtype=np.int64)  # taken rows that ``_best`` knows
        self._taken = np.empty((1024, dimension(self._table)), dtype=np.float32)
        self._taken_rows: list[int] = []
        self._lost: list[tuple[int, int]] = []  # place of a row passed over, rows taken before it

    def is_near(self, row: int) -> bool:
        """Whether a row is too like one that was taken, or has no embedding; it is passed over then."""
        place, n = self._place[row], len(self._taken_rows)
        if self._there[place] and not self._is_near(place, n):
            return False
        self._lost.append((place, n))
        return True

    def _is_near(self, place: int, n: int) -> bool:
        if self._seen[place] < n:
            # The first look at a row is one at those after it too; later ones have few taken rows to see.
            last = place + BATCH if self._seen[place] == 0 else place + 1
            self._update(place, min(last, len(self._order)), n)
        best = float(self._best[place])
        if abs(best - self._limit) > UNSURE:
            return best > self._limit
        near = self._vectors[place] @ self._taken[:n].T > self._limit - 2 * UNSURE
        return bool((_cosines(self._vectors[place], self._taken[:n][near]) > self._limit).any())

    def _update(self, first: int, last: int, n: int) -> None:
        """Let the rows at some places know the first ``n`` taken ones."""
        start = int(self._seen[first:last].min())
        for tile in range(start, n, TILE):
            found = self._vectors[first:last] @ self._taken[tile : min(tile + TILE, n)].T
            np.maximum(self._best[first:last], found.max(axis=1), out=self._best[first:last])
        self._seen[first:last] = n

    def take(self, row: int) -> None:
        """Take a row."""
        n = len(self._taken_rows)
        if n == len(self._taken):
            self._taken = np.concatenate([self._taken, np.empty_like(self._taken)])
        self._taken[n] = self._vectors[self._place[row]]
        self._taken_rows.append(row)

    def passed_over(self) -> PassedOver:
        """Return the rows passed over since ``begin``, each with the taken row that it is most like."""
        places = np.array([place for place, _ in self._lost], dtype=np.int64)
        counts = np.array([n for _, n in self._lost], dtype=np.int64)
        like, similarity = np.full(len(places), -1, dtype=np.int64), np.full(len(places), np.nan)
        compared = np.flatnonzero(self._there[places]) if len(places) else places
        for start in range(0, len(compared), BATCH):
            some = compared[start : start + BATCH]
            like[some], similarity[some] = self._most_like(places[some], counts[some])
        return PassedOver(self._order[places] if len(places) else places, like, similarity)

    def _most_like(self, places: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the taken row that each row is most like, among those taken before it, and the cosine."""
        vectors, n, least = self._vectors[places], int(counts.max()), int(counts.min())
        found = vectors @ self._taken[:n].T  # [b, n]
        found[:, least:][np.arange(least, n) >= counts[:, None]] = -np.inf
        best = found.max(axis=1)
        like, similarity = np.empty(len(places), dtype=np.int64), np.empty(len(places))
        for line in range(len(places)):
            near = np.flatnonzero(found[line] >= best[line] - UNSURE)
            exact = _cosines(vectors[line], self._taken[near])
            first = int(exact.argmax())
            like[line], similarity[line] = self._taken_rows[near[first]], exact[first]
        return like, similarity


def _cosines(one: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return 1 - |a - b|^2 / 2 of a unit vector and others: 1 for equal ones. [n] float64"""
    gaps = others.astype(np.float64) - one
    cosines: np.ndarray = 1 - np.einsum("nd,nd->n", gaps, gaps) / 2
    return cosines


def _gather(table: BlockTable, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the vectors of some rows in their order, zeros where there is none, and which have one.

    Returns:
        Vectors. [n, D] float32
        Whether a row has one. [n] bool
    """
    order = np.argsort(rows, kind="stable")
    ordered = rows[order]
    vectors = np.zeros((len(rows), dimension(table)), dtype=np.float32)
    there = np.zeros(len(rows), dtype=bool)
    for numbers, found in vector_blocks(table) if len(rows) else ():
        first, last = np.searchsorted(ordered, [numbers[0], numbers[-1] + 1])
        wanted = ordered[first:last]
        places = np.minimum(np.searchsorted(numbers, wanted), len(numbers) - 1)
        hit = numbers[places] == wanted
        vectors[order[first:last][hit]] = found[places[hit]]
        there[order[first:last][hit]] = True
    return vectors, there
