"""A greedy choice by density and diversity, with the score of the method guide.

One row after the other is chosen, always the one with the largest

    mix_i = alpha density_i + (1 - alpha) diversity_i,
    diversity_i = distance to the nearest row chosen so far

(ties by row). Before anything is chosen every row is at distance 2, the diameter of the unit sphere, so the
first row is the densest one.

The diversity of a row only falls as more rows are chosen, so a value worked out earlier is an upper bound
now: only the rows whose bound is on top are brought up to date, a batch at a time, and the choice is the
same as if all had been.

Source: DataFlex (OpenDCAI), guide of the TSDS selector, section 1, which names the mix and leaves the order
of choice, the first row and the end open.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

BATCH = 256
"""Rows brought up to date at a time."""
DIAMETER = 2.0


@dataclass(frozen=True)
class Chosen:
    """Rows in the order in which they were chosen.

    Attributes:
        places: [n] int64. diversity: distance to the nearest row chosen before. [n] float64
        mix: what they were chosen for. [n] float64
        distance: of every row to its nearest chosen row, in the order of the vectors. [S] float64
    """

    places: np.ndarray
    diversity: np.ndarray
    mix: np.ndarray
    distance: np.ndarray


def choose(vectors: np.ndarray, density: np.ndarray, alpha: float, n: int) -> Chosen:
    """Choose rows greedily.

    Args:
        vectors: of length 1. [S, D] float32
        density: of each. [S] float64
        alpha: share of the density in the mix, in [0, 1].
        n: rows to choose; all where there are fewer.
    """
    n = min(n, len(vectors))
    state = _Distances(vectors, n)
    bound = alpha * density + (1 - alpha) * state.nearest
    places, mix = np.empty(n, dtype=np.int64), np.empty(n)
    diversity = np.empty(n)
    for step in range(n):
        best = int(np.argmax(bound))
        while state.seen[best] < step:
            stale = np.flatnonzero((state.seen < step) & np.isfinite(bound))
            if len(stale) > BATCH:
                stale = stale[np.argpartition(-bound[stale], BATCH - 1)[:BATCH]]
            state.update(stale, step)
            bound[stale] = alpha * density[stale] + (1 - alpha) * state.nearest[stale]
            best = int(np.argmax(bound))
        places[step], mix[step], diversity[step] = best, bound[best], state.nearest[best]
        state.add(step, best)
        bound[best] = -np.inf
    state.update(np.arange(len(vectors)), n)
    return Chosen(places, diversity, mix, state.nearest)


class _Distances:
    """The distance of every row to the nearest chosen one, brought up to date on demand."""

    def __init__(self, vectors: np.ndarray, n: int) -> None:
        self.vectors = vectors
        self.chosen = np.empty((n, vectors.shape[1]), dtype=np.float64)
        self.nearest = np.full(len(vectors), DIAMETER)
        self.seen = np.zeros(len(vectors), dtype=np.int64)  # chosen rows that ``nearest`` knows

    def add(self, step: int, place: int) -> None:
        """Add a chosen row."""
        self.chosen[step] = self.vectors[place]

    def update(self, rows: np.ndarray, step: int) -> None:
        """Let some rows know the first ``step`` chosen ones."""
        for start in range(0, len(rows), BATCH):
            some = rows[start : start + BATCH]
            first = int(self.seen[some].min())
            vectors = self.vectors[some].astype(np.float64)
            chosen = self.chosen[first:step]
            squares = (vectors**2).sum(1)[:, None] + (chosen**2).sum(1) - 2 * vectors @ chosen.T
            if squares.shape[1]:
                found = np.sqrt(np.maximum(squares.min(axis=1), 0.0))
                self.nearest[some] = np.minimum(self.nearest[some], found)
            self.seen[some] = step
