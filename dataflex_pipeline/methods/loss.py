"""Loss: sample more often from a band of easy, medium or hard rows.

With l_i the mean negative log-likelihood (nats) of row i's response tokens and q1, q2 the quantiles of
all valid losses, the bands are low: l <= q1 < medium <= q2 < high. A row weighs w_i = 1, in the focus
band ``focus_weight``, and is drawn with probability

    p_i = (w_i + eps)^(1/T) / sum_j (w_j + eps)^(1/T),    eps = 1e-12

Source: DataFlex (OpenDCAI), guide of the Loss Selector, section 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field, field_validator

from dataflex_pipeline import api
from dataflex_pipeline.schemas import column
from dataflex_pipeline.store.ranks import column_values, quantiles

EPSILON = 1e-12


class Loss(api.Method):
    """Loss bands with one band in focus."""

    summary = "sample more often from the low, medium or high band of the losses"
    source = "DataFlex (OpenDCAI), Loss Selector"
    columns = (
        column("loss", pa.float64(), "mean negative log-likelihood of the response, nats per token"),
        column("n_tokens", pa.int32(), "response tokens that the mean is over"),
    )

    class Params(api.Params):
        """Parameters of loss."""

        focus: Literal["low", "medium", "high"] = Field("high", description="the band drawn more often")
        focus_weight: float = Field(5.0, gt=0, description="weight of a row of that band; others weigh 1")
        quantiles: tuple[float, float] = Field((0.33, 0.66), description="where the bands meet, in [0, 1]")
        temperature: float = Field(1.0, gt=0, description="above 1 flattens the weights, below sharpens")
        replacement: bool = Field(False, description="draw with replacement")

        @field_validator("quantiles")
        @classmethod
        def _in_order(cls, value: tuple[float, float]) -> tuple[float, float]:
            if not 0 <= value[0] <= value[1] <= 1:
                raise ValueError("two rising numbers in [0, 1] are needed")
            return value

    def needs(self, selection: api.Selection) -> Mapping[str, api.Need]:
        """Ask for the losses at the checkpoint of the round before."""
        return {"now": api.Need("losses", checkpoint=selection.round - 1)}

    def score(self, block: api.Block, state: Any) -> Mapping[str, np.ndarray]:
        """Return the loss as the score."""
        loss = block.column("now", "loss")
        return {"score": loss, "loss": loss, "n_tokens": block.column("now", "n_tokens")}

    def fit(self, scores: api.BlockTable, selection: api.Selection) -> tuple[float, float]:
        """Return the two thresholds (nats per token)."""
        low, high = quantiles(column_values(scores, "score"), self.params.quantiles)
        selection.say(f"loss bands (nats per token): low <= {low:.4f} < medium <= {high:.4f} < high")
        return low, high

    def weigh(self, block: pa.RecordBatch, fitted: tuple[float, float]) -> np.ndarray:
        """Return (w + eps)^(1/T)."""
        loss = block.column("score").to_numpy(zero_copy_only=False)
        band = np.searchsorted(np.array(fitted), loss, side="left")  # 0: l <= q1, 1: l <= q2, 2: above
        focus = ("low", "medium", "high").index(self.params.focus)
        weight = np.where(band == focus, self.params.focus_weight, 1.0)
        flattened: np.ndarray = np.power(weight + EPSILON, 1.0 / self.params.temperature)
        return flattened
