"""Perplexity: the rows of the highest, the lowest or the middle loss, without a draw.

With l_i the loss of row i and rank_i its place among the N valid ones, scaled to [0, 1], equal losses sharing
the mean of their places (methods/focus.py),

    focus: high      score = l_i
    focus: low       score = -l_i
    focus: middle    score = -|rank_i - 1/2|

so that the highest score is always what was asked for. l_i is the mean negative log-likelihood (nats) of the
T_i response tokens (``loss: per_token``), which ranks rows as their perplexity exp(l_i) does, or the sum
T_i l_i (``loss: total``), at whose upper end are the long responses.

With ``score_model`` another, smaller model than the run's computes the losses.

``strategy: sample`` draws by exp(score / (largest |score| x temperature)), as for every method whose own
strategy is top_k.

Sources: Marion et al., When Less is More: Investigating Data Pruning for Pretraining LLMs at Scale (2023),
for the bottom, middle and top of perplexity; Ankner et al., Perplexed by Perplexity (2024).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from dataflex_pipeline import api
from dataflex_pipeline.features.score_params import ScoredParams, ScoreModelParams
from dataflex_pipeline.methods.focus import Focus
from dataflex_pipeline.sampling.softmax import Softmax
from dataflex_pipeline.schemas import column


class Perplexity(api.Method):
    """The top, the bottom or the middle of the losses."""

    summary = "the rows of the highest, the lowest or the middle perplexity"
    source = "Marion et al. 2023, When Less is More"
    default_strategy = "top_k"
    columns = (
        column("loss", pa.float64(), "mean negative log-likelihood of the response, nats per token"),
        column("n_tokens", pa.int32(), "response tokens that the mean is over"),
        column("perplexity", pa.float64(), "exp(loss), per token; infinite beyond the range of a float"),
    )

    class Params(ScoreModelParams):
        """Parameters of perplexity."""

        focus: Literal["high", "low", "middle"] = Field(
            "high", description="which losses are better: high, low, or middle (nearest to the median)"
        )
        loss: Literal["per_token", "total"] = Field(
            "per_token", description="the loss that counts: per_token (mean) or total (sum over the response)"
        )
        temperature: float = Field(
            0.1,
            gt=0,
            description="for strategy: sample, which draws by exp(score / (largest |score| x temperature))",
        )

    params: Params

    def needs(self, selection: api.Selection) -> Mapping[str, api.Need]:
        """Ask for the losses at the checkpoint of the round before, or by the model that scores."""
        if self.params.score_model is not None:
            return {
                "now": api.Need("score_losses", params=ScoredParams(**self.params.part(ScoreModelParams)))
            }
        return {"now": api.Need("losses", checkpoint=selection.round - 1)}

    def begin(self, tables: Mapping[str, api.BlockTable], selection: api.Selection) -> Focus:
        """Read the losses where their places count."""
        blocks = tables["now"].blocks(["loss", "n_tokens"])
        return Focus.over(self.params.focus, map(self._losses, blocks))

    def _losses(self, block: pa.RecordBatch) -> np.ndarray:
        """Return the loss that counts of each row of a block of losses, NaN where there is none. [rows]"""
        mean: np.ndarray = block.column("loss").to_numpy(zero_copy_only=False)
        return mean if self.params.loss == "per_token" else mean * block.column("n_tokens").to_numpy()

    def score(self, block: api.Block, state: Focus) -> Mapping[str, np.ndarray]:
        """Return the score that the focus gives, and what it came from."""
        loss = block.column("now", "loss")
        with np.errstate(over="ignore"):
            perplexity = np.exp(loss)
        return {
            "score": state.scores(self._losses(block.features["now"])),
            "loss": loss,
            "n_tokens": block.column("now", "n_tokens"),
            "perplexity": perplexity,
        }

    def fit(self, scores: api.BlockTable, selection: api.Selection) -> Softmax:
        """Find the largest score and the scale of the softmax."""
        return Softmax.fit(scores, self.params.temperature)

    def weigh(self, block: pa.RecordBatch, fitted: Softmax) -> np.ndarray:
        """Return exp((score - largest) / scale)."""
        return fitted.weigh(block)
