"""Softmax of scores: sampling weights that rise exponentially with the score.

    weight(z) = exp((score(z) - max score) / (max |score| x temperature))

so the largest weight is 1, and a temperature means the same whatever the scale of the scores.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from dataflex_pipeline.api import BlockTable
from dataflex_pipeline.store.ranks import column_values, count, order_statistics


@dataclass(frozen=True)
class Softmax:
    """Sampling weights exp(score / (largest |score| x temperature)), the largest weight being 1.

    Attributes:
        largest: the largest score. scale: largest |score| x temperature; 0 where that is too small for a
            float, and only the largest score has a weight.
    """

    largest: float
    scale: float

    @classmethod
    def fit(cls, scores: BlockTable, temperature: float) -> Softmax:
        """Read the extremes of a score table's scores."""
        values = column_values(scores, "score")
        low, high = order_statistics(values, [0, count(values) - 1])
        return cls(high, max(abs(low), abs(high), np.finfo(float).tiny) * temperature)

    def weigh(self, block: pa.RecordBatch) -> np.ndarray:
        """Return the weights of a block of the score table. [rows]"""
        scores = block.column("score").to_numpy(zero_copy_only=False)
        if self.scale == 0:
            return np.where(np.isnan(scores), np.nan, scores == self.largest)
        with np.errstate(over="ignore", under="ignore"):
            weights: np.ndarray = np.exp((scores - self.largest) / self.scale)
        return weights
