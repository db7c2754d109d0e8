"""Focus: which losses are better, as a score; what loss and perplexity share.

    high      score = l
    low       score = -l
    middle    score = -|rank - 1/2|

with l the loss of a row, and rank its place among the N valid losses in rising order, scaled to [0, 1]. Equal
losses share the mean of their places: with ``smaller`` losses below l and ``equal`` of its value, itself
included,

    rank = (smaller + (equal - 1) / 2) / (N - 1),      1/2 where N = 1

so that equal losses get equal scores, and so do two rows as far below the median as above it. The median has
the score 0, the smallest and the largest loss have -1/2, ties among them apart.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np

Kind = Literal["high", "low", "middle"]


@dataclass(frozen=True)
class Focus:
    """What losses become scores with.

    Attributes:
        kind: which losses are better.
        rising: all valid losses, sorted, where places among them are needed; else empty. [N] float64
    """

    kind: Kind
    rising: np.ndarray

    @classmethod
    def over(cls, kind: Kind, losses: Iterable[np.ndarray]) -> Focus:
        """Return the focus on some of the losses.

        Args:
            kind: which losses are better.
            losses: of the whole pool in pieces, NaN where a row has none. They are only read, and then kept
                (8 bytes per row), where the kind is "middle".
        """
        if kind != "middle":
            return cls(kind, np.empty(0))
        rising = np.concatenate([piece[~np.isnan(piece)] for piece in losses])
        rising.sort()
        return cls(kind, rising)

    def scores(self, losses: np.ndarray) -> np.ndarray:
        """Return the scores of losses, NaN where there is none. [n] float64"""
        if self.kind == "high":
            return losses
        if self.kind == "low":
            return 0.0 - losses  # a loss of 0 becomes 0, not -0
        smaller = np.searchsorted(self.rising, losses, side="left")
        not_larger = np.searchsorted(self.rising, losses, side="right")
        last = len(self.rising) - 1
        # Twice the place less the last one is a whole number: rows as far on either side are equal exactly.
        from_middle = np.abs(smaller + not_larger - 1 - last) / max(2 * last, 1)
        return np.where(np.isnan(losses), np.nan, 0.0 - from_middle)
