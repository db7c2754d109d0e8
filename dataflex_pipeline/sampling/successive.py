"""Drawing without replacement, in one pass.

Successive sampling draws a row by probability, takes it out, and draws from the rest. Its stream form
(Efraimidis and Spirakis, "Weighted random sampling with a reservoir", Information Processing Letters 97,
2006, section 3, in its exponential form): row i gets the key E_i / p_i, E_i standard exponential. The
smallest of independent exponentials with rates p_i is that of row i with probability p_i / sum p, and what
remains of the others has no memory, so the rows in rising order of their keys are the draws in their order.
Here E_i = -log(u_i), u_i the row's own number; equal keys go to the lower row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from dataflex_pipeline.ahead import ahead
from dataflex_pipeline.sampling.replacement import with_replacement
from dataflex_pipeline.sampling.rows import Block, Rows
from dataflex_pipeline.sampling.selection import (
    Selection,
    check_budget,
    containers,
    label,
    nothing_to_draw,
    probability,
    strata,
)
from dataflex_pipeline.sampling.settings import DrawSettings
from dataflex_pipeline.sampling.smallest import Kept, Smallest
from dataflex_pipeline.sampling.uniforms import Floats, Words, row_words, uniforms_of, word_from
from dataflex_pipeline.seeds import derive_seed


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
    kept, positive = _smallest_keys(rows, settings, amounts)
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


def _smallest_keys(
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
