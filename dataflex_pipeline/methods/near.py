"""Near: the rows whose embedding is nearest to some target row, by cosine.

    score(z) = max over target rows z' of cos(e_z, e_z')

with e unit embeddings (methods/embedding_similarity.py). The plain baseline for TSDS: it knows nothing of
near-duplicates, and a target row in a crowded region takes more than its share. ``strategy: round_robin``
lets the target rows take turns instead, each taking its nearest row that is still there.
"""

from __future__ import annotations

from dataflex_pipeline.methods.embedding_similarity import EmbeddingSimilarity, SimilarityParams


class Near(EmbeddingSimilarity):
    """Nearest neighbours of the target."""

    summary = "rows whose embedding is nearest to some target row"
    source = "nearest-neighbour retrieval"
    default_strategy = "top_k"

    class Params(SimilarityParams):
        """Parameters of near."""

    params: Params
