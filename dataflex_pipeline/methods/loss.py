"""Loss: sample more often from a band of easy, medium or hard rows.

With l_i the mean negative log-likelihood (nats) of row i's response tokens and q1, q2 the quantiles of
all valid losses, the bands are low: l <= q1 < medium <= q2 < high. A row weighs w_i = 1, in the focus
band ``focus_weight``, and is drawn with probability

    p_i = (w_i + eps)^(1/T) / sum_j (w_j + eps)^(1/T),    eps = 1e-12

Where the powers would leave the range of a float (a temperature T near 0), w + eps is divided by the largest
that occurs first, which p does not notice.

The score follows the focus, for a strategy that takes the best rows: l_i for high, -l_i for low, and for
medium -|rank_i - 1/2| with rank_i the place of l_i among all losses (methods/focus.py).

Source: DataFlex (OpenDCAI), guide of the Loss Selector, section 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
from pydantic import Field, field_validator

from dataflex_pipeline import api
from dataflex_pipeline.methods.focus import Focus
from dataflex_pipeline.schemas import column
from dataflex_pipeline.store.ranks import Values, column_values, quantiles

EPSILON = 1e-12
BANDS = ("low", "medium", "high")
ORDINARY = 300.0
"""Powers of e up to here, and down to the inverse, are taken as they are: sums of them stay finite."""


@dataclass(frozen=True)
class Bands:
    """Where the bands are and what the largest weight is.

    Attributes:
        thresholds: where the bands meet, nats per token.
        unit: what w + eps is divided by: 1, or the largest that occurs.
    """

    thresholds: tuple[float, float]
    unit: float

    def of(self, loss: np.ndarray) -> np.ndarray:
        """Return each loss's band: 0 where l <= q1, 1 where l <= q2, 2 above."""
        band: np.ndarray = np.searchsorted(np.array(self.thresholds), loss, side="left")
        return band


class Loss(api.Method):
    """Loss bands with one band in focus."""

    summary = "sample more often from the low, medium or high band of the losses"
    source = "DataFlex (OpenDCAI), Loss Selector"
    version = 2
    columns = (
        column("loss", pa.float64(), "mean negative log-likelihood of the response, nats per token"),
        column("n_tokens", pa.int32(), "response tokens that the mean is over"),
    )

    class Params(api.Params):
        """Parameters of loss."""

        focus: Literal["low", "medium", "high"] = Field(
            "high", description="the band that is favoured: low, medium or high"
        )
        focus_weight: float = Field(
            5.0, gt=0, allow_inf_nan=False, description="weight of a row of that band; others weigh 1"
        )
        quantiles: tuple[float, float] = Field(
            (0.33, 0.66),
            description="where low meets medium and medium meets high, as shares of the valid rows",
        )
        temperature: float = Field(
            1.0, gt=0, description="of the weights: above 1 flattens them, below 1 sharpens"
        )
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

    def begin(self, tables: Mapping[str, api.BlockTable], selection: api.Selection) -> Focus:
        """Read the losses where their places count."""
        blocks = tables["now"].blocks(["loss"])
        losses = (block.column("loss").to_numpy(zero_copy_only=False) for block in blocks)
        return Focus.over("middle" if self.params.focus == "medium" else self.params.focus, losses)

    def score(self, block: api.Block, state: Focus) -> Mapping[str, np.ndarray]:
        """Return the score that the focus gives, and the loss."""
        loss = block.column("now", "loss")
        return {"score": state.scores(loss), "loss": loss, "n_tokens": block.column("now", "n_tokens")}

    def fit(self, scores: api.BlockTable, selection: api.Selection) -> Bands:
        """Return the two thresholds, and the largest weight where powers of it need one."""
        values = column_values(scores, "loss")
        low, high = quantiles(values, self.params.quantiles)
        selection.say(f"loss bands (nats per token): low <= {low:.4f} < medium <= {high:.4f} < high")
        bands = Bands((low, high), 1.0)
        inside, outside = self._sizes(values, bands)
        if not inside or not outside:
            where = "no row is" if not inside else "all rows are"
            selection.say(f"{where} in the band in focus ({self.params.focus}): every row weighs alike")
        weights = [self.params.focus_weight + EPSILON] * (inside > 0) + [1 + EPSILON] * (outside > 0)
        steep = max(abs(math.log(weight)) for weight in weights) / self.params.temperature
        return bands if steep <= ORDINARY else Bands((low, high), max(weights))

    def _sizes(self, values: Values, bands: Bands) -> tuple[int, int]:
        """Return how many rows are in the band in focus and how many are not."""
        focus = BANDS.index(self.params.focus)
        counts = [(np.count_nonzero(bands.of(numbers) == focus), len(numbers)) for _, numbers in values()]
        inside = int(sum(found for found, _ in counts))
        return inside, sum(size for _, size in counts) - inside

    def weigh(self, block: pa.RecordBatch, fitted: Bands) -> np.ndarray:
        """Return ((w + eps) / unit)^(1/T)."""
        loss = block.column("loss").to_numpy(zero_copy_only=False)
        weight = np.where(fitted.of(loss) == BANDS.index(self.params.focus), self.params.focus_weight, 1.0)
        with np.errstate(over="ignore", under="ignore"):  # over: of rows that are not valid
            flattened: np.ndarray = np.power((weight + EPSILON) / fitted.unit, 1.0 / self.params.temperature)
        return flattened
