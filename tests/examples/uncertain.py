"""Uncertain: rows whose answers the model is unsure of. A feature of one's own, and a method that uses it."""

from contextlib import contextmanager

import numpy as np
import pyarrow as pa
from pydantic import Field

from dataflex_pipeline import api
from dataflex_pipeline.schemas import REASON, ROW, ROW_ID, VALID, column


class Entropy(api.Feature):
    """Mean entropy of the model's next-token distribution over the response, in nats."""

    schema = pa.schema([ROW, ROW_ID, column("entropy", pa.float64(), "mean entropy, nats"), VALID, REASON])
    input_columns = ("row", "row_id", "input_ids", "labels", "valid", "reason")

    class Params(api.Params):
        """Parameters of entropy."""

        temperature: float = Field(1.0, gt=0, description="logits are divided by it")

    @contextmanager
    def open(self, given, progress):
        """Load the model of `given.checkpoint` once; yield the function from rows to their entropies."""
        import torch

        from dataflex_pipeline.models.base import load_for_scoring, resolve_device

        model = load_for_scoring(self.config, given.checkpoint, resolve_device(self.config.device))

        def entropy(ids, labels):
            answers = torch.tensor(labels[1:]) != -100  # position t predicts token t + 1
            logits = model(torch.tensor([ids], device=model.device)).logits[0, :-1][answers]  # [answers, V]
            logp = torch.log_softmax(logits.float() / self.params.temperature, dim=-1)
            return float(-(logp.exp() * logp).sum(-1).mean())

        def compute(rows):
            values = np.full(rows.num_rows, np.nan)
            with torch.inference_mode():
                for place, row in enumerate(rows.to_pylist()):
                    if row["valid"]:
                        values[place] = entropy(row["input_ids"], row["labels"])
            return self.table(rows, {"entropy": values}, "the entropy is not finite")

        yield compute


class Uncertain(api.Method):
    """Rows with a high entropy are drawn more often."""

    summary = "prefer rows whose answers the model is unsure of"
    source = "an example"

    class Params(api.Params):
        """Parameters of uncertain."""

        temperature: float = Field(1.0, gt=0, description="of the model's distribution")

    def needs(self, selection):
        """Ask for the entropies under the model of the round before: the default checkpoint."""
        return {"now": api.Need(Entropy, params=Entropy.Params(temperature=self.params.temperature))}

    def score(self, block, state):
        """Return the entropy, so that higher is better."""
        return {"score": block.column("now", "entropy")}

    def weigh(self, block, fitted):
        """Return the sampling weight of every row."""
        return block.column("score").to_numpy(zero_copy_only=False)
