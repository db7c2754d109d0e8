"""Selections that are not random: the best rows by score, and round robin over groups or target rows."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from dataflex_pipeline.sampling.rows import Block, Rows
from dataflex_pipeline.sampling.selection import (
    Kept,
    Selection,
    Smallest,
    check_budget,
    containers,
    label,
    nothing_to_draw,
    strata,
)
from dataflex_pipeline.sampling.settings import DrawSettings
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


FIRST_DEPTH = 64
"""Rows that are kept of each target row at first, at least."""


def top_k(rows: Rows, settings: DrawSettings, amounts: Sequence[int]) -> tuple[list[Selection], list[str]]:
    """Take the rows with the highest ``score``, ties by row; a row without a score is never taken.

    Args:
        rows: with the column ``score``.
        settings: of the draw.
        amounts: rows, or tokens with a budget, per quota.

    Returns:
        One selection per quota, probabilities 1 / (rows taken over all quotas), and what there is to say:
        a quota with fewer rows than asked for gives all of them.

    Raises:
        DataError: a quota has no row with a score, or its first row is over its budget.
    """
    kept = containers(settings, amounts)
    scored = _offer_all(rows, "score", kept, amounts)
    best = [container.finish() for container in kept]
    selections, notices = _finished([each.rows for each in best], settings, amounts, scored)
    scores = [-each.keys for each in best]
    return [replace(s, scores=score) for s, score in zip(selections, scores, strict=True)], notices


def round_robin(
    rows: Rows, settings: DrawSettings, amounts: Sequence[int]
) -> tuple[list[Selection], list[str]]:
    """Let the group columns take turns: each takes its best row that is not taken yet, ties by row.

    A group looks only at rows that it has a value for, and is passed over when it has none left. All rows
    that it looks at are taken, by itself or by others, except the last one; so the best ``amount`` rows
    of each group are all that is held. Arguments, returns and errors are those of ``top_k``.
    """
    kept, usable = best_by_columns(rows, settings.group_columns, settings, amounts)
    chosen = [
        # A group's next row that was not kept was left out because those before it use the amount up.
        take_turns([by_quota[i].finish() for by_quota in kept], amount, settings.token_budget is not None)[0]
        if amount
        else np.empty(0, np.int64)
        for i, amount in enumerate(amounts)
    ]
    return _finished(chosen, settings, amounts, usable)


def best_by_columns(
    rows: Rows, columns: Sequence[str], settings: DrawSettings, amounts: Sequence[int]
) -> tuple[list[list[Smallest]], list[int]]:
    """Return what holds the best rows of each column and quota, and each quota's rows with any value."""
    kept = [containers(settings, amounts) for _ in columns]
    usable = [0] * len(amounts)
    for block in rows:
        values = [block.values[name] for name in columns]
        for value, containers_of_group in zip(values, kept, strict=True):
            _offer(block, value, containers_of_group, amounts)
        any_value = block.valid & ~np.all([np.isnan(value) for value in values], axis=0)
        for i, inside in enumerate(strata(block, any_value, len(amounts))):
            usable[i] += int(np.count_nonzero(inside))
    return kept, usable


def round_robin_rows(
    rows: Rows, rankings: Rankings, settings: DrawSettings, amounts: Sequence[int]
) -> tuple[list[Selection], list[str]]:
    """Let target rows take turns, like the groups of ``round_robin``.

    Most of them take few rows, so the first pass over the pool keeps few rows of each. Where one needs more,
    because others took those that it wanted, another pass keeps four times as many; the outcome is that of
    keeping all.

    Args:
        rows: without score columns. rankings: of the same rows.
        settings: of the draw.
        amounts: rows, or tokens with a budget, per quota.

    Returns, Raises:
        As ``top_k``.
    """
    budgeted = settings.token_budget is not None
    depth = max(FIRST_DEPTH, 0 if budgeted else -(-4 * max(amounts) // rankings.n_turns))
    while True:
        kept, usable = best_by_target_row(rows, rankings, depth, amounts)
        turns = [take_turns(k.finish(), amount, budgeted) for k, amount in zip(kept, amounts, strict=True)]
        lacking = (
            short and (budgeted or len(taken) < amount)
            for (taken, short), amount in zip(turns, amounts, strict=True)
        )
        if not any(lacking):
            return _finished([taken for taken, _ in turns], settings, amounts, usable)
        depth *= 4


def best_by_target_row(
    rows: Rows, rankings: Rankings, depth: int, amounts: Sequence[int]
) -> tuple[list[BestPerTurn], list[int]]:
    """Return the best ``depth`` rows of everyone who takes turns, and how many rows anyone looks at."""
    kept = [BestPerTurn(rankings.n_turns, depth) for _ in amounts]
    usable = [0] * len(amounts)
    for block, values in zip(rows, rankings.blocks(rows.block_rows), strict=True):
        any_value = block.valid & ~np.isnan(values).all(axis=1)
        for i, inside in enumerate(strata(block, any_value, len(amounts))):
            places = np.flatnonzero(inside)
            usable[i] += len(places)
            costs = np.ones(len(places), np.int64) if block.tokens is None else block.tokens[places]
            if amounts[i]:
                kept[i].offer(places + block.start, values[places], costs)
    return kept, usable


def _offer_all(rows: Rows, name: str, kept: list[Smallest], amounts: Sequence[int]) -> list[int]:
    """Offer every row that has a value to its quota; return how many each quota has."""
    usable = [0] * len(amounts)
    for block in rows:
        for i, count in enumerate(_offer(block, block.values[name], kept, amounts)):
            usable[i] += count
    return usable


def _offer(block: Block, value: Floats, kept: list[Smallest], amounts: Sequence[int]) -> list[int]:
    counts = []
    for i, inside in enumerate(strata(block, block.valid & ~np.isnan(value), len(amounts))):
        counts.append(int(np.count_nonzero(inside)))
        if amounts[i]:
            if np.isfinite(kept[i].bound):  # most blocks have few rows that still have a chance
                inside = inside & (value > -kept[i].bound)
            places = np.flatnonzero(inside)
            keys = -value[places]
            costs = None if block.tokens is None else block.tokens[places]
            kept[i].offer(places + block.start, keys, costs)
    return counts


def _finished(
    chosen: list[Integers], settings: DrawSettings, amounts: Sequence[int], usable: list[int]
) -> tuple[list[Selection], list[str]]:
    total = sum(map(len, chosen))
    selections = [Selection(rows, np.full(len(rows), 1 / max(1, total))) for rows in chosen]
    if settings.token_budget is not None:
        return selections, check_budget(selections, settings, amounts, usable)
    notices = []
    for i, (amount, there) in enumerate(zip(amounts, usable, strict=True)):
        if amount and not there:
            raise nothing_to_draw(settings, i, "has a score")
        if amount > there:
            notices.append(
                f"{label(settings, i)}{amount} rows were asked for and {there} have a score: all are taken."
            )
    return selections, notices
