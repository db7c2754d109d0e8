"""Drawing with replacement: independent draws by probability, read off the running sum of the rows.

Draw j is the first row at which the running sum of the probabilities exceeds u_j times the total. The u_j
are sorted once, so that one pass serves all draws, and the rows are put back in the order of the draws. The
running sum is carried through the blocks element by element, so their size changes nothing; a row with
probability 0 does not move it and is never drawn. Memory grows with the draws, not with the rows, and no
number of rows is too large.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dataflex_pipeline.errors import DataError
from dataflex_pipeline.sampling.rows import Block, Rows
from dataflex_pipeline.sampling.selection import (
    Selection,
    check_budget,
    label,
    nothing_to_draw,
    probability,
)
from dataflex_pipeline.sampling.settings import DrawSettings
from dataflex_pipeline.sampling.uniforms import Floats, Integers, row_uniforms
from dataflex_pipeline.seeds import derive_seed


def with_replacement(rows: Rows, settings: DrawSettings, amounts: Sequence[int]) -> list[Selection]:
    """Draw ``amounts[i]`` rows (or rows for so many tokens) of each quota, in the order of the draws.

    Raises:
        DataError: a quota has no row with a probability above 0, or its first row is over its budget.
    """
    masses, costs = _totals(rows, len(amounts))
    for i, (amount, mass) in enumerate(zip(amounts, masses, strict=True)):
        if amount and not mass > 0:
            raise nothing_to_draw(settings, i, "has a probability above 0")
    if settings.token_budget is None:
        return [draws.selection() for draws in _draw(rows, settings, amounts, masses)]
    return _within_budgets(rows, settings, amounts, masses, costs)


def _within_budgets(
    rows: Rows,
    settings: DrawSettings,
    budgets: Sequence[int],
    masses: Sequence[float],
    costs: Sequence[float],
) -> list[Selection]:
    """Take about as many draws as the mean cost suggests, and more until every budget is passed.

    Draw j is the same however many are taken, so the outcome does not depend on the guess.
    """
    for i, budget in enumerate(budgets):
        if budget and not costs[i] > 0:
            raise DataError(
                f"{label(settings, i)}token_budget is set and every row that can be drawn has 0 tokens.",
                "Draws with replacement would never use the budget up.",
                "Use num_samples, or prepare the pool again.",
            )
    means = [cost / mass if mass else 1.0 for cost, mass in zip(costs, masses, strict=True)]
    counts = [int(1.1 * b / mean) + 16 if b else 0 for b, mean in zip(budgets, means, strict=True)]
    while True:
        drawn = _draw(rows, settings, counts, masses)
        if all(not b or d.tokens.sum() > b for b, d in zip(budgets, drawn, strict=True)):
            break
        counts = [2 * count for count in counts]
    selections = [
        d.selection().first(int(np.searchsorted(np.cumsum(d.tokens), b, side="right")))
        for b, d in zip(budgets, drawn, strict=True)
    ]
    check_budget(selections, settings, budgets, [1] * len(budgets))
    return selections


def _totals(rows: Rows, n: int) -> tuple[list[float], list[float]]:
    """Return each quota's sum of probabilities, and its sum of probability x tokens."""
    masses, costs = [0.0] * n, [0.0] * n
    for block in rows:
        for i in range(n):
            p = _inside(block, i)
            masses[i] = float(_running(masses[i], p)[-1])
            if block.tokens is not None:
                costs[i] += float(p @ block.tokens)
    return masses, costs


def _inside(block: Block, number: int) -> Floats:
    """Return the block's probabilities with 0 outside of a quota."""
    p = probability(block)
    return p if block.stratum is None else np.where(block.stratum == number, p, 0.0)


def _running(before: float, p: Floats) -> Floats:
    """Return the running sum that continues ``before``, one addition after the other. [n]"""
    return np.add.accumulate(np.concatenate([[before], p]))[1:]


class _Draws:
    """The draws of one quota, filled while the rows go by.

    Args:
        seed: of this quota's stream. count: number of draws. mass: the quota's sum of probabilities.
        scored: whether to keep the score of each row drawn.
    """

    def __init__(self, seed: int, count: int, mass: float, scored: bool) -> None:
        numbers = row_uniforms(seed, 0, count)
        self._order = np.argsort(numbers, kind="stable")
        self._targets = numbers[self._order] * mass
        self._mass = mass
        self._done = 0
        self._reached = 0.0
        self._rows = np.zeros(count, np.int64)
        self._probabilities = np.zeros(count)
        self._scores = np.zeros(count) if scored else None
        self.tokens: Integers = np.zeros(count, np.int64)

    def take(self, block: Block, p: Floats) -> None:
        """Settle the draws that fall into a block. ``p``: its probabilities, 0 outside of the quota."""
        if self._done == len(self._targets):
            return
        sums = _running(self._reached, p)
        self._reached = float(sums[-1])
        stop = int(np.searchsorted(self._targets, self._reached))
        if self._reached >= self._mass:
            stop = len(self._targets)
        if stop == self._done:
            return
        # u x total can round up to the total; such a draw belongs to the row that reaches it.
        targets = np.minimum(self._targets[self._done : stop], np.nextafter(self._reached, 0.0))
        at = np.searchsorted(sums, targets, side="right")
        draws = self._order[self._done : stop]
        self._rows[draws] = at + block.start
        self._probabilities[draws] = p[at]
        if self._scores is not None:
            self._scores[draws] = block.values["score"][at]
        if block.tokens is not None:
            self.tokens[draws] = block.tokens[at]
        self._done = stop

    def selection(self) -> Selection:
        """Return the rows in the order of the draws."""
        return Selection(self._rows, self._probabilities, scores=self._scores)


def _draw(rows: Rows, settings: DrawSettings, counts: Sequence[int], masses: Sequence[float]) -> list[_Draws]:
    draws = [
        _Draws(derive_seed(settings.seed, "draws", i), count, mass, "score" in rows.columns)
        for i, (count, mass) in enumerate(zip(counts, masses, strict=True))
    ]
    for block in rows:
        for i, quota in enumerate(draws):
            if counts[i]:
                quota.take(block, _inside(block, i))
    return draws
