"""Selections whose rows are not too like each other: a row that resembles one already taken is passed over.

The order in which rows are looked at is that of the selection without the limit: by score, by draw, in turns;
sources with quotas take turns so that every beginning has about their shares. Whoever's turn it is takes its
next row that was neither taken nor passed over; a row passed over takes nothing of the amount or the budget.
Where too few rows are different enough, the selection is shorter than was asked for, and says so.

Only the best rows of each ranking are held. Where they do not suffice, four times as many are, and the walk
begins anew: the outcome is that of holding all.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from dataflex_pipeline.sampling.ranked import Rankings, best_by_columns, best_by_target_row
from dataflex_pipeline.sampling.rows import Rows, gather
from dataflex_pipeline.sampling.selection import Kept, Selection, check_budget, label, nothing_to_draw
from dataflex_pipeline.sampling.settings import DrawSettings
from dataflex_pipeline.sampling.successive import smallest_keys
from dataflex_pipeline.sampling.uniforms import Integers

FIRST_DEPTH = 1024
"""Rows of a ranking that are held at first, at least."""


class KeepsApart(Protocol):
    """What tells whether a row is too like one taken before; see `neighbours.apart.Apart`."""

    def begin(self, rows: Integers) -> None:
        """Forget what was taken; ``rows`` may be looked at, about in that order. [n]"""

    def is_near(self, row: int) -> bool:
        """Whether a row is too like one that was taken; it is passed over then."""

    def take(self, row: int) -> None:
        """Take a row."""


class _TooFewError(Exception):
    """A ranking has more rows than are held, and the next one is needed."""


@dataclass
class _Quota:
    """What one quota takes, and from which rankings.

    Attributes:
        lanes: rows of each ranking that takes turns, best first. whole: whether a lane holds all its rows.
        amount: rows to take, or tokens. costs: tokens of each row; None where rows count.
        taken: in the order taken. ended: whether it has all that it can have.
        ran_out: whether that is because no row was left.
    """

    lanes: list[list[int]]
    whole: list[bool]
    amount: int
    costs: dict[int, int] | None
    taken: list[int] = field(default_factory=list)
    spent: int = 0
    ended: bool = False
    ran_out: bool = False

    def __post_init__(self) -> None:
        self._places = [0] * len(self.lanes)
        self._turn = 0
        self.ended = not self.amount

    @property
    def share(self) -> float:
        """How far it is on its way, as `quotas.interleave` counts it."""
        return self.spent / self.amount if self.costs is not None else (len(self.taken) + 0.5) / self.amount

    def take(self, gone: set[int], apart: KeepsApart) -> None:
        """Take the next row, or end.

        Args:
            gone: rows taken or passed over by anybody; it grows.
        """
        for _ in range(len(self.lanes)):
            lane = self._turn % len(self.lanes)
            self._turn += 1
            row = self._next(lane, gone, apart)
            if row is None:
                continue
            cost = 1 if self.costs is None else self.costs[row]
            if self.spent + cost > self.amount:
                self.ended = True
                return
            apart.take(row)
            gone.add(row)
            self.taken.append(row)
            self.spent += cost
            self.ended = self.costs is None and self.spent == self.amount
            return
        self.ended = self.ran_out = True

    def _next(self, lane: int, gone: set[int], apart: KeepsApart) -> int | None:
        """Return the next row of a lane that may be taken; None if there is none.

        Raises:
            _TooFewError: more rows of the ranking have to be held to know.
        """
        rows = self.lanes[lane]
        while self._places[lane] < len(rows):
            row = rows[self._places[lane]]
            if row not in gone:
                if not apart.is_near(row):
                    return row
                gone.add(row)
            self._places[lane] += 1
        if not self.whole[lane]:
            raise _TooFewError
        return None


def draw_apart(
    rows: Rows, settings: DrawSettings, amounts: Sequence[int], apart: KeepsApart, rankings: Rankings | None
) -> tuple[list[Selection], list[str]]:
    """Select rows none of which is too like one selected before it.

    Args:
        rows: as the strategy needs them. settings: of the draw, without replacement.
        amounts: rows, or tokens with a budget, per quota.
        apart: tells which rows are too like each other.
        rankings: with ``over_target_rows``: of the same rows.

    Returns:
        One selection per quota, and what there is to say.

    Raises:
        DataError: a quota has no row to take, or its first row is over its budget.
    """
    most = FIRST_DEPTH if settings.token_budget is not None else max(amounts)
    turns = 1 if rankings is None else max(1, rankings.n_turns // 4)
    depth = max(FIRST_DEPTH, -(-2 * most // turns))
    while True:
        lanes = _lanes(rows, settings, rankings, depth, amounts)
        for number, (amount, kept) in enumerate(zip(amounts, lanes, strict=True)):
            if amount and not any(len(each.rows) for each in kept):
                raise nothing_to_draw(settings, number, "has a probability or score")
        try:
            quotas = _walk(rows, settings, amounts, lanes, apart)
        except _TooFewError:
            depth *= 4
            continue
        return _selections(settings, quotas, lanes)


def _lanes(
    rows: Rows, settings: DrawSettings, rankings: Rankings | None, depth: int, amounts: Sequence[int]
) -> list[list[Kept]]:
    """Return, per quota, the best ``depth`` rows of each ranking that takes turns."""
    plain = replace(settings, token_budget=None, fraction=None, num_samples=depth)
    depths = [depth if amount else 0 for amount in amounts]
    if rankings is not None:
        kept = best_by_target_row(rows, rankings, depth, depths)[0]
        return [each.finish() for each in kept]
    if settings.strategy == "sample":
        return [[each.finish()] for each in smallest_keys(rows, plain, depths)[0]]
    columns = settings.group_columns if settings.strategy == "round_robin" else ("score",)
    found = best_by_columns(rows, columns, plain, depths)[0]
    return [[group[number].finish() for group in found] for number in range(len(amounts))]


def _walk(
    rows: Rows,
    settings: DrawSettings,
    amounts: Sequence[int],
    lanes: Sequence[Sequence[Kept]],
    apart: KeepsApart,
) -> list[_Quota]:
    """Let the quotas take turns until each has what it can have."""
    costs = _costs(rows, lanes) if settings.token_budget is not None else None
    quotas = [
        _Quota([each.rows.tolist() for each in kept], [each.complete for each in kept], amount, costs)
        for amount, kept in zip(amounts, lanes, strict=True)
    ]
    apart.begin(_expected(lanes, amounts))
    gone: set[int] = set()
    while waiting := [quota for quota in quotas if not quota.ended]:
        min(waiting, key=lambda quota: quota.share).take(gone, apart)
    return quotas


def _expected(lanes: Sequence[Sequence[Kept]], amounts: Sequence[int]) -> Integers:
    """Return all rows held, each once, about in the order in which they are looked at. [n]"""
    pairs = [
        (kept, max(1, amount)) for amount, of_quota in zip(amounts, lanes, strict=True) for kept in of_quota
    ]
    rows = np.concatenate([kept.rows for kept, _ in pairs])
    places = np.concatenate([np.arange(len(kept.rows)) / amount for kept, amount in pairs])
    ordered = rows[np.argsort(places, kind="stable")]
    _, first = np.unique(ordered, return_index=True)
    return ordered[np.sort(first)]


def _costs(rows: Rows, lanes: Sequence[Sequence[Kept]]) -> dict[int, int]:
    held = np.unique(np.concatenate([kept.rows for kept in itertools.chain(*lanes)]))
    return dict(zip(held.tolist(), gather(rows.pool, held, "n_tokens").to_pylist(), strict=True))


def _selections(
    settings: DrawSettings, quotas: Sequence[_Quota], lanes: Sequence[Sequence[Kept]]
) -> tuple[list[Selection], list[str]]:
    total = max(1, sum(len(quota.taken) for quota in quotas))
    selections, notices = [], []
    for number, (quota, kept) in enumerate(zip(quotas, lanes, strict=True)):
        rows = np.array(quota.taken, dtype=np.int64)
        probabilities = np.full(len(rows), 1 / total)
        if settings.strategy == "sample" and len(rows):
            order = np.argsort(kept[0].rows, kind="stable")
            places = order[np.searchsorted(kept[0].rows, rows, sorter=order)]
            probabilities = kept[0].beside[0][places]
        selections.append(Selection(rows, probabilities))
        if settings.token_budget is None and len(rows) < quota.amount:
            notices.append(
                f"{label(settings, number)}{quota.amount} rows were asked for and {len(rows)} are different "
                f"enough (max_similarity {settings.max_similarity:g}): all of those are taken."
            )
    if settings.token_budget is not None:
        usable = [len(quota.taken) + (not quota.ran_out) for quota in quotas]
        notices += check_budget(selections, settings, [quota.amount for quota in quotas], usable)
    return selections, notices
