"""IFD, instruction-following difficulty: how little the prompt helps with the response.

    ifd(z) = l(response | prompt) / l(response alone)

with l the mean negative log-likelihood (nats) of the same T response tokens: once in the whole row, once
behind nothing but what the chat template writes before any answer (data/chat/beginning.py). Near 0 the prompt
says all; near 1 it says nothing, because the response is hard to follow from it, or obvious without it.
Above 1 the prompt makes the response less likely: such rows are set aside, as in the paper.

    score = ifd                     where ifd <= 1
    score = 1 / ifd - 1, below 0    where ifd > 1 (``over_one``): still valid, and ranked last

With ``score_model`` another model than the run's computes both losses, as in Superfiltering, where GPT-2
stands in for a model sixty times its size. Of a row of several turns each labelled response counts, alone
behind the same beginning, and the means run over the tokens of all of them.

Sources: Li et al., From Quantity to Quality: Boosting LLM Performance with Self-Guided Data Selection for
Instruction Tuning (NAACL 2024), section 2.2; Li et al., Superfiltering: Weak-to-Strong Data Filtering for
Fast Instruction-Tuning (ACL 2024). Their code puts the response alone behind no token at all, so that its
first token counts in one of the two means only; here the tokens are the same.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
from pydantic import Field

from dataflex_pipeline import api
from dataflex_pipeline.features.score_params import ScoredParams, ScoreModelParams
from dataflex_pipeline.sampling.softmax import Softmax
from dataflex_pipeline.schemas import column
from dataflex_pipeline.store.tables import zip_blocks


class Ifd(api.Method):
    """The rows whose prompt helps least with the response, while it helps at all."""

    summary = "instruction-following difficulty: the response's loss with its prompt over that without"
    source = "Li et al. 2024, From Quantity to Quality (Cherry_LLM); Superfiltering"
    default_strategy = "top_k"
    columns = (
        column("ifd", pa.float64(), "loss given the prompt / loss alone; above 1 the prompt does not help"),
        column("loss", pa.float64(), "mean negative log-likelihood of the response, nats per token"),
        column("loss_alone", pa.float64(), "the same of the response without its prompt, nats per token"),
        column("n_tokens", pa.int32(), "response tokens that both means are over"),
        column("over_one", pa.bool_(), "whether ifd is above 1: the row is ranked last"),
    )

    class Params(ScoreModelParams):
        """Parameters of ifd."""

        temperature: float = Field(
            0.1,
            gt=0,
            description="for strategy: sample, which draws by exp(score / (largest |score| x temperature))",
        )

    params: Params

    def needs(self, selection: api.Selection) -> Mapping[str, api.Need]:
        """Ask for both losses, at the checkpoint of the round before or by the model that scores."""
        if self.params.score_model is not None:
            given = self.params.part(ScoreModelParams)
            return {
                "given": api.Need("score_losses", params=ScoredParams(**given)),
                "alone": api.Need("score_losses", params=ScoredParams(**given, alone=True)),
            }
        number = selection.round - 1
        return {
            "given": api.Need("losses", checkpoint=number),
            "alone": api.Need("response_losses", checkpoint=number),
        }

    def begin(self, tables: Mapping[str, api.BlockTable], selection: api.Selection) -> None:
        """Count the rows above 1, and say so."""
        over = valid = 0
        for given, alone in zip_blocks((tables["given"], ["loss"]), (tables["alone"], ["loss"])):
            ratio = _ratio(_losses(given), _losses(alone))
            over, valid = over + int((ratio > 1).sum()), valid + int(np.isfinite(ratio).sum())
        if over:
            selection.say(
                f"{over:,} of {valid:,} rows have an ifd above 1 (the prompt does not help): ranked last"
            )

    def score(self, block: api.Block, state: None) -> Mapping[str, np.ndarray]:
        """Return the ratio as a score, and what it came from."""
        given, alone = block.column("given", "loss"), block.column("alone", "loss")
        ratio = _ratio(given, alone)
        over = ratio > 1
        return {
            "score": np.where(over, 1 / np.where(over, ratio, 1.0) - 1, ratio),
            "ifd": ratio,
            "loss": given,
            "loss_alone": alone,
            "n_tokens": block.column("given", "n_tokens"),
            "over_one": over,
        }

    def fit(self, scores: api.BlockTable, selection: api.Selection) -> Softmax:
        """Find the largest score and the scale of the softmax."""
        return Softmax.fit(scores, self.params.temperature)

    def weigh(self, block: pa.RecordBatch, fitted: Softmax) -> np.ndarray:
        """Return exp((score - largest) / scale)."""
        return fitted.weigh(block)


def _losses(block: pa.RecordBatch) -> np.ndarray:
    values: np.ndarray = block.column("loss").to_numpy(zero_copy_only=False)
    return values


def _ratio(given: np.ndarray, alone: np.ndarray) -> np.ndarray:
    """Return given / alone; of a response that is certain alone, 1 where it is so with its prompt too."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where((given == 0) & (alone == 0), 1.0, given / alone)
