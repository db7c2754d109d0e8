"""The rows with the smallest keys of a stream, held in memory that grows with what is selected only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dataflex_pipeline.sampling.uniforms import Floats, Integers

SLACK = 65536
"""Rows taken in before the first cut, so that small selections are not cut after every block."""


@dataclass(frozen=True)
class Kept:
    """Rows in rising order of their keys, ties by row.

    Attributes:
        rows: row numbers. [n] int64
        keys: their keys. [n] float64
        tau: the key of the first row that did not get in; infinity if every row did.
        costs: what each row takes of the budget; None without one. [n] int64
        complete: whether every row got in.
        beside: what was offered beside the keys. Each [n] float64
    """

    rows: Integers
    keys: Floats
    tau: float
    costs: Integers | None
    complete: bool
    beside: tuple[Floats, ...] = ()


class Smallest:
    """Keeps the ``count`` rows with the smallest keys, or as many as fit a budget; ties go to the lower row.

    With a budget, rows are taken by rising key while the sum of their costs stays within it; the first
    row that would exceed it ends the selection, even if a cheaper one comes after it.

    Args:
        count: how many rows to keep, at least 1; None with a budget.
        budget: the largest sum of costs; None with a count.
        beside: how many numbers of each row are kept beside its key.
    """

    def __init__(self, count: int | None, budget: int | None, beside: int = 0) -> None:
        if (count is None) == (budget is None):
            raise ValueError("give a count or a budget")
        self._count = count
        self._budget = budget
        self._beside = beside
        self._pieces: list[tuple[npt.NDArray[np.generic], ...]] = []
        self._held = 0
        self._cut_at = max(SLACK, 2 * (count + 1) if count is not None else 0)
        self.bound = np.inf
        self._full = False

    def offer(
        self, rows: Integers, keys: Floats, costs: Integers | None = None, beside: Sequence[Floats] = ()
    ) -> None:
        """Take in the rows of a block that still have a chance.

        Args:
            rows: row numbers, rising, above all rows offered before. [n]
            keys: their keys, no NaN. [n]
            costs: what each row takes of the budget, where there is one. [n]
            beside: as many numbers of each row as were announced. Each [n]
        """
        arrays: tuple[npt.NDArray[np.generic], ...] = (rows, keys, *beside)
        if self._budget is not None:
            if costs is None:
                raise ValueError("a budget needs costs")
            arrays = (*arrays, costs)
        if self._full:
            # A later row with the same key loses the tie, so strictly smaller is exact.
            better = np.flatnonzero(keys < self.bound)
            arrays = tuple(array[better] for array in arrays)
        if not len(arrays[0]):
            return
        self._pieces.append(arrays)
        self._held += len(arrays[0])
        if self._held >= self._cut_at:
            self._cut()

    def _cut(self) -> None:
        """Drop what cannot be selected any more; the first row left out stays, as it gives tau."""
        whole = tuple(np.concatenate(column) for column in zip(*self._pieces, strict=True))
        keep = self._first_by_count(whole[1]) if self._count is not None else self._first_by_cost(whole)
        kept = tuple(column[keep] for column in whole)
        self._pieces = [kept]
        self._held = len(kept[0])
        self._cut_at = max(2 * self._held, self._held + SLACK)
        if self._full:
            self.bound = float(kept[1].max())

    def _first_by_count(self, keys: npt.NDArray[np.generic]) -> Integers:
        assert self._count is not None  # noqa: S101 (for the type checker; see __init__)
        wanted = self._count + 1
        if len(keys) < wanted:
            return np.arange(len(keys))
        self._full = True
        last = np.partition(keys, wanted - 1)[wanted - 1]
        below = np.flatnonzero(keys < last)
        # Pieces lie in row order, so the first of the equal keys are the lowest rows.
        equal = np.flatnonzero(keys == last)[: wanted - len(below)]
        return np.sort(np.concatenate([below, equal]))

    def _first_by_cost(self, whole: tuple[npt.NDArray[np.generic], ...]) -> Integers:
        rows, keys, *_, costs = whole
        order = np.lexsort((rows, keys))
        inside = int(np.count_nonzero(np.cumsum(costs[order]) <= self._budget))
        self._full = inside < len(order)
        return np.sort(order[: inside + 1]).astype(np.int64, copy=False)

    def finish(self) -> Kept:
        """Return what was selected."""
        if not self._pieces:
            empty, none = np.empty(0), np.empty(0, np.int64)
            return Kept(none, empty, np.inf, none, True, (empty,) * self._beside)
        self._cut()
        rows, keys, *others = self._pieces[0]
        costs = None if self._budget is None else others.pop()
        order = np.lexsort((rows, keys))
        tau = float(keys[order[-1]]) if self._full else np.inf
        order = order[:-1] if self._full else order
        return Kept(
            rows[order].astype(np.int64, copy=False),
            keys[order].astype(np.float64, copy=False),
            tau,
            None if costs is None else costs[order].astype(np.int64, copy=False),
            not self._full,
            tuple(other[order].astype(np.float64, copy=False) for other in others),
        )
