"""Random: every valid row alike. The baseline that every other method has to beat."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import Field

from dataflex_pipeline import api


class Random(api.Method):
    """Uniform selection."""

    summary = "uniform: every valid row alike, the baseline of every comparison"
    source = "baseline"

    class Params(api.Params):
        """Parameters of random."""

        replacement: bool = Field(False, description="draw with replacement")

    def score(self, block: api.Block, state: Any) -> Mapping[str, np.ndarray]:
        """Return a score of 0 for every row."""
        return {"score": np.zeros(block.pool.num_rows)}

    def weigh(self, block: pa.RecordBatch, fitted: Any) -> np.ndarray:
        """Return a weight of 1 for every row."""
        return np.ones(block.num_rows)
