"""RDS+: the rows whose hidden states in the model itself are nearest to some target row's.

    score(z) = max over target rows z' of cos(e_z, e_z'),   e = sum over t of t h_t, scaled to length 1

with h_t the last hidden states of the run's model (or of any causal language model: ``embed_model``) over
prompt and response, position t counted from 1 (models/hidden.py). By default the target rows take turns, each
taking the row that it is nearest to and that is still there.

Source: Ivison et al., Large-Scale Data Selection for Instruction Tuning (2025), section 3. They take turns
over the rows of each task, and then over tasks; here over all target rows, in their order.
"""

from __future__ import annotations

from pydantic import Field

from dataflex_pipeline.embed.embedders import Chosen
from dataflex_pipeline.methods.embedding_similarity import EmbeddingSimilarity, SimilarityParams


class Rds(EmbeddingSimilarity):
    """Nearest neighbours of the target in the model's own last hidden states."""

    summary = "rows whose hidden states in the model are nearest to some target row's"
    source = "Ivison et al. 2025, Large-Scale Data Selection for Instruction Tuning (RDS+)"
    default_strategy = "round_robin"

    class Params(SimilarityParams):
        """Parameters of rds."""

        embed_method: Chosen = Field(
            "model",
            exclude=True,
            description="what embeds; model: the last hidden states of a causal language model, averaged "
            "with weights that rise along the row (auto, vllm, sentence-transformers: as near)",
        )

    params: Params
