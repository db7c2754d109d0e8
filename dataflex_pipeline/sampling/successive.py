"""Random draws, each in one pass: without replacement, and with replacement.

Successive sampling draws a row by probability, takes it out, and draws from the rest. Its stream form
(Efraimidis and Spirakis, "Weighted random sampling with a reservoir", Information Processing Letters 97,
2006, section 3, in its exponential form): row i gets the key E_i / p_i, E_i standard exponential. The
smallest of independent exponentials with rates p_i is that of row i with probability p_i / sum p, and what
remains of the others has no memory, so the rows in rising order of their keys are the draws in their order.
Here E_i = -log(u_i), u_i the row's own number; equal keys go to the lower row.

With replacement, draw j is the first row at which the running sum of the probabilities exceeds u_j times
the total. The u_j are sorted once, so that one pass serves all draws, and the rows are put back in the
order of the draws. The running sum is carried through the blocks element by element, so their size changes
nothing; a row with probability 0 does not move it and is never drawn. Memory grows with the draws, not with
the rows, and no number of rows is too large.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from dataflex_pipeline.ahead import ahead
from dataflex_pipeline.errors import DataError
from dataflex_pipeline.sampling.rows import Block, Rows
from dataflex_pipeline.sampling.selection import (
    Kept,
    Selection,
    Smallest,
    check_budget,
    containers,
    label,
    nothing_to_draw,
    probability,
    strata,
)
from dataflex_pipeline.sampling.settings import DrawSettings
from dataflex_pipeline.sampling.uniforms import (
    Floats,
    Integers,
    Words,
    row_uniforms,
    row_words,
    uniforms_of,
    word_from,
)
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


def sample(rows: Rows, settings: DrawSettings, amounts: Sequence[int]) -> tuple[list[Selection], list[str]]:
    """Draw by probability: without replacement, or with it where that is asked for or needed.

    Args:
        rows: with probabilities.
        settings: of the draw.
        amounts: rows, or tokens with a budget, per quota.

    Returns:
        One selection per quota, and what there is to say.

    Raises:
        DataError: a quota has no row with a probability above 0, or its first row is over its budget.
    """
    if settings.replacement:
        return with_replacement(rows, settings, amounts), []
    kept, positive = smallest_keys(rows, settings, amounts)
    finished = [container.finish() for container in kept]
    selections = [_selection(each) for each in finished]
    if settings.token_budget is not None:
        return selections, check_budget(selections, settings, amounts, positive)
    short = [amount if amount > there else 0 for amount, there in zip(amounts, positive, strict=True)]
    if not any(short):
        return selections, []
    again = with_replacement(rows, settings, short)
    notices = [
        f"{label(settings, i)}{amount} rows were asked for and {positive[i]} have a probability above 0: "
        "drawn with replacement."
        for i, amount in enumerate(short)
        if amount
    ]
    return [again[i] if short[i] else chosen for i, chosen in enumerate(selections)], notices


def smallest_keys(
    rows: Rows, settings: DrawSettings, amounts: Sequence[int]
) -> tuple[list[Smallest], list[int]]:
    """Return the rows with the smallest keys of each quota, and its rows with a probability above 0."""
    seed = derive_seed(settings.seed, "keys")
    kept = containers(settings, amounts, beside=2 if "score" in rows.columns else 1)
    positive = [0] * len(amounts)
    for block, words in zip(rows, ahead(_words(seed, rows)), strict=True):
        p = probability(block)
        for i, inside in enumerate(strata(block, p > 0, len(amounts))):
            positive[i] += int(np.count_nonzero(inside))
            if amounts[i]:
                _offer(kept[i], block, p, words, inside)
    for i, amount in enumerate(amounts):
        if amount and not positive[i]:
            raise nothing_to_draw(settings, i, "has a probability above 0")
    return kept, positive


def _selection(kept: Kept) -> Selection:
    probabilities, *scores = kept.beside
    return Selection(kept.rows, probabilities, kept.keys, kept.tau, scores[0] if scores else None)


def _words(seed: int, rows: Rows) -> Iterator[Words]:
    """Yield the words of each block's rows."""
    n_rows = rows.ranked.n_rows
    for start in range(0, n_rows, rows.block_rows):
        yield row_words(seed, start, min(start + rows.block_rows, n_rows))


def _offer(kept: Smallest, block: Block, p: Floats, words: Words, inside: npt.NDArray[np.bool_]) -> None:
    """Offer the rows inside that may have a key below the bound: most blocks have few of them.

    1 - u <= -log(u): where 1 - u is above bound x p, so is the key above the bound, and the logarithm is not
    needed. With the largest p of the block, few rows need even their u.
    """
    bound = kept.bound * (1 + 1e-9)  # room for the rounding of both sides
    farthest = bound * float(p.max())
    if farthest < 1:
        near = np.flatnonzero(words >= word_from(1 - farthest))
        chosen = near[inside[near]]
    else:
        chosen = np.flatnonzero(inside)
    numbers = uniforms_of(words[chosen])
    if np.isfinite(bound):
        near = np.flatnonzero(1.0 - numbers <= bound * p[chosen])
        numbers, chosen = numbers[near], chosen[near]
    with np.errstate(over="ignore"):
        keys = -np.log(numbers) / p[chosen]
    costs = None if block.tokens is None else block.tokens[chosen]
    scores = [block.values["score"][chosen]] if "score" in block.values else []
    kept.offer(chosen + block.start, keys, costs, [p[chosen], *scores])
