"""The selected rows: those with the smallest keys of a stream, and what is said of quotas that fell short.

Memory grows with what is selected only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dataflex_pipeline.errors import DataError
from dataflex_pipeline.sampling.rows import Block
from dataflex_pipeline.sampling.settings import DrawSettings
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


@dataclass(frozen=True)
class Selection:
    """The rows of one quota (or of the whole pool), first selected first.

    Attributes:
        rows: row numbers; repeats with replacement. [n] int64
        probabilities: that each row had. [n] float64
        keys: keys of a draw without replacement, rising; None for other selections. [n] float64
        tau: the key of the first row not drawn; None where there are no keys.
        scores: of the rows, NaN where they have none; None where the selection has not read them.
            [n] float64
    """

    rows: Integers
    probabilities: Floats
    keys: Floats | None = None
    tau: float | None = None
    scores: Floats | None = None

    def first(self, n: int) -> Selection:
        """Return the selection as if only ``n`` rows had been asked for."""
        if n >= len(self.rows):
            return self
        scores = None if self.scores is None else self.scores[:n]
        if self.keys is None:
            return Selection(self.rows[:n], self.probabilities[:n], scores=scores)
        return Selection(self.rows[:n], self.probabilities[:n], self.keys[:n], float(self.keys[n]), scores)


def containers(settings: DrawSettings, amounts: Sequence[int], beside: int = 0) -> list[Smallest]:
    """Return a container per quota, for its number of rows or its budget; quotas of 0 stay empty.

    Args:
        settings: of the draw. amounts: rows or tokens per quota.
        beside: how many numbers of each row are kept beside its key.
    """
    if settings.token_budget is not None:
        return [Smallest(None, amount, beside) for amount in amounts]
    return [Smallest(max(1, amount), None, beside) for amount in amounts]


def strata(block: Block, usable: npt.NDArray[np.bool_], n: int) -> Iterator[npt.NDArray[np.bool_]]:
    """Yield, for each of ``n`` quotas, which rows of the block are usable rows of it. [rows]"""
    if block.stratum is None:
        yield usable
        return
    for number in range(n):
        yield usable & (block.stratum == number)


def probability(block: Block) -> Floats:
    """Return the block's probabilities, which a draw by probability must have been given."""
    if block.probability is None:
        raise ValueError("this draw needs a table of probabilities")
    return block.probability


def label(settings: DrawSettings, number: int) -> str:
    """Return "Source 'x': " for a quota, or nothing for a selection without quotas."""
    names = list(settings.source_quotas)
    if not names:
        return ""
    return f"Source '{names[number]}': " if number < len(names) else "Other sources: "


def nothing_to_draw(settings: DrawSettings, number: int, what: str) -> DataError:
    """Return the error for a quota without any row to take."""
    return DataError(
        f"{label(settings, number)}no row can be selected: none {what}.",
        "A selection takes valid rows only, by their probability or their score.",
        "Look at the score table's score and reason columns; choose another method, or another quota.",
    )


def check_budget(
    selections: Sequence[Selection], settings: DrawSettings, amounts: Sequence[int], found: Sequence[int]
) -> list[str]:
    """Check that every token budget bought a row, and say where it was larger than all there is.

    Args:
        selections: per quota. settings: of the draw. amounts: tokens per quota.
        found: usable rows per quota.

    Raises:
        DataError: a quota has no usable row, or the first row is over its budget.
    """
    notices = []
    for i, (chosen, budget) in enumerate(zip(selections, amounts, strict=True)):
        if not budget:
            continue
        if not found[i]:
            raise nothing_to_draw(settings, i, "has a probability or score")
        if not len(chosen.rows):
            raise DataError(
                f"{label(settings, i)}the first row selected has more than the budget of {budget} tokens.",
                "Rows are taken whole, in the order of selection, while their tokens stay within the budget.",
                "Raise token_budget (or the source's quota) to the length of a long row at least.",
            )
        if not settings.replacement and len(chosen.rows) == found[i]:
            notices.append(
                f"{label(settings, i)}all {found[i]} usable rows fit the budget of {budget} tokens."
            )
    return notices
