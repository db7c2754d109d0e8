"""Shortest: prefer rows whose answer is short. score = -response tokens; p ~ exp(score / scale)."""

import numpy as np
from pydantic import Field

from dataflex_pipeline import api


class Shortest(api.Method):
    """Rows with few response tokens are drawn more often."""

    summary = "prefer rows with short answers"
    source = "an example"
    pool_columns = ("n_response_tokens",)

    class Params(api.Params):
        """Parameters of shortest."""

        scale: float = Field(10.0, gt=0, description="tokens over which the weight falls to 1/e")

    def score(self, block, state):
        """Return minus the number of response tokens, so that higher is better."""
        return {"score": -block.pool.column("n_response_tokens").to_numpy().astype(np.float64)}

    def weigh(self, block, fitted):
        """Return the sampling weight of every row."""
        return np.exp(block.column("score").to_numpy(zero_copy_only=False) / self.params.scale)
