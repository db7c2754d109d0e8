"""What every strategy shares: the rows it selected, and what it says about quotas that fell short."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dataflex_pipeline.errors import DataError
from dataflex_pipeline.sampling.rows import Block
from dataflex_pipeline.sampling.settings import DrawSettings
from dataflex_pipeline.sampling.smallest import Smallest
from dataflex_pipeline.sampling.uniforms import Floats, Integers


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
