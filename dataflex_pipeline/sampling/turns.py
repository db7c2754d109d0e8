"""Taking turns: who takes turns, each one's best rows held in bounded memory, and the turns themselves."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from dataflex_pipeline.sampling.smallest import Kept
from dataflex_pipeline.sampling.uniforms import Floats, Integers

SLACK = 1 << 18
"""Entries taken in beyond twice those kept before the worst are dropped."""


class Rankings(Protocol):
    """How each of ``n_turns`` values the rows of the pool; values are made when read, and never stored."""

    n_turns: int

    def blocks(self, max_rows: int) -> Iterator[Floats]:
        """Yield values of consecutive rows, NaN where one does not look at a row. [rows, n_turns]

        Every block but the last has exactly ``max_rows`` rows.
        """


class BestPerTurn:
    """Keeps the ``depth`` rows with the highest values of each of ``n_turns``, ties by row.

    Memory: about 2 x n_turns x depth entries of 28 bytes.

    Args:
        n_turns: how many rank the rows. depth: rows to keep of each.
    """

    def __init__(self, n_turns: int, depth: int) -> None:
        self._n, self._depth = n_turns, depth
        self._bound = np.full(n_turns, -np.inf)
        self._pieces: list[tuple[npt.NDArray[np.generic], ...]] = []
        self._held, self._cut_at = 0, SLACK

    def offer(self, rows: Integers, values: Floats, costs: Integers) -> None:
        """Take in rows that still have a chance.

        Args:
            rows: row numbers, rising, above all rows offered before. [b]
            values: NaN where not looked at. [b, n_turns]
            costs: of each row, for a budget. [b]
        """
        # A later row with the same value loses the tie, so strictly larger is exact; NaN is never larger.
        turn, place = np.nonzero((values > self._bound).T)
        if not len(turn):
            return
        self._pieces.append((turn.astype(np.int32), values[place, turn], rows[place], costs[place]))
        self._held += len(turn)
        if self._held >= self._cut_at:
            self._cut()

    def _cut(self) -> None:
        """Keep the best of each turn, and one more, which says that there are more."""
        turn, values, rows, costs = (np.concatenate(column) for column in zip(*self._pieces, strict=True))
        order = np.lexsort((rows, -values, turn))
        starts = np.searchsorted(turn[order], np.arange(self._n))
        rank = np.arange(len(order)) - starts[turn[order]]
        self._bound[turn[order[rank == self._depth]]] = values[order[rank == self._depth]]
        kept = order[rank <= self._depth]
        self._pieces = [(turn[kept], values[kept], rows[kept], costs[kept])]
        self._held = len(kept)
        self._cut_at = 2 * self._held + SLACK

    def finish(self) -> list[Kept]:
        """Return each one's best rows, best first; keys are the negated values."""
        if not self._pieces:
            nothing, none = np.empty(0), np.empty(0, np.int64)
            return [Kept(none, nothing, np.inf, none, True)] * self._n
        self._cut()
        turn, values, rows, costs = self._pieces[0]
        starts = np.searchsorted(turn, np.arange(self._n + 1))
        found = []
        for first, end in itertools.pairwise(starts):
            part = slice(first, min(end, first + self._depth))
            complete = end - first <= self._depth
            tau = np.inf if complete else -float(values[end - 1])
            keys = -values[part].astype(np.float64)
            found.append(Kept(rows[part].astype(np.int64), keys, tau, costs[part].astype(np.int64), complete))
        return found


def take_turns(groups: Sequence[Kept], amount: int, budgeted: bool) -> tuple[Integers, bool]:
    """Let each in turn take its best row that is not taken yet, for at most ``amount`` rows or tokens.

    Args:
        groups: each one's rows, best first.
        amount: rows to take, or tokens with ``budgeted``.
        budgeted: whether ``amount`` counts tokens.

    Returns:
        The rows in the order taken. [n]
        Whether it ended at a list whose next row was not kept.
    """
    lists = [group.rows.tolist() for group in groups]
    costs = [
        group.costs.tolist() if budgeted and group.costs is not None else [1] * len(rows)
        for group, rows in zip(groups, lists, strict=True)
    ]
    places = [0] * len(groups)
    taken: dict[int, None] = {}
    spent, idle, turn, short = 0, 0, 0, False
    while idle < len(groups):
        group = turn % len(groups)
        turn += 1
        while places[group] < len(lists[group]) and lists[group][places[group]] in taken:
            places[group] += 1
        if places[group] == len(lists[group]):
            if not groups[group].complete:
                short = True
                break
            idle += 1
            continue
        spent += costs[group][places[group]]
        if spent > amount:
            break
        taken[lists[group][places[group]]] = None
        idle = 0
    return np.fromiter(taken, np.int64, len(taken)), short
