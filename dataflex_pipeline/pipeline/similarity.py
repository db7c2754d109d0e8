"""Rows of a selection kept apart by their embeddings (``max_similarity``): which, and what was passed over.

The embeddings are those that the setting ``similarity`` names; where it names none, the pool's of the method,
or of the method that chose its candidates; else those that near would have by default.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import ValidationError

from dataflex_pipeline.api import Method, Need
from dataflex_pipeline.config.explain import explain
from dataflex_pipeline.config.fields import Config
from dataflex_pipeline.errors import ConfigError, did_you_mean
from dataflex_pipeline.features.embedding_params import EmbeddingParams
from dataflex_pipeline.features.plan import FeaturePlan, plan_feature, with_rounds
from dataflex_pipeline.neighbours.apart import Apart
from dataflex_pipeline.pipeline.feature_tables import feature_input, feature_table, rows_per_part
from dataflex_pipeline.pipeline.open_run import OpenRun
from dataflex_pipeline.pipeline.score import Scoring
from dataflex_pipeline.sampling.rows import ScoreTable, gather, gather_row_ids
from dataflex_pipeline.schemas import PASSED_OVER
from dataflex_pipeline.store.parts import PartedTable

NOT_HERE = ("candidate_path", "query", "query_embeddings", "query_path", "query_prompt", "query_text")
"""Parameters on embeddings that say nothing of the pool's vectors."""


def similarity_need(config: Config, methods: Sequence[Method]) -> Need | None:
    """Return the embeddings that rows are kept apart by; None without ``max_similarity``.

    Args:
        config: of the run. methods: that score a round: what chooses the candidates, and the method.

    Raises:
        ConfigError: ``similarity`` holds something that is no parameter on embeddings.
    """
    if config.max_similarity is None:
        return None
    params = _given(config.similarity) if config.similarity else _of_methods(methods)
    return params.pool_need()


def _of_methods(methods: Sequence[Method]) -> EmbeddingParams:
    found = [method.params for method in methods if isinstance(method.params, EmbeddingParams)]
    return found[-1] if found else EmbeddingParams()


def _given(values: Mapping[str, Any]) -> EmbeddingParams:
    known = [name for name in EmbeddingParams.model_fields if name not in NOT_HERE]
    for name in values:
        if name not in known:
            raise ConfigError(
                f"similarity.{name} is no setting of embeddings.{did_you_mean(name, known)}",
                f"similarity takes: {', '.join(known)}.",
                "Correct the name, or leave it out.",
            )
    try:
        return EmbeddingParams(**values)
    except ValidationError as error:
        raise explain(error, EmbeddingParams, "similarity", noun="setting") from error


def similarity_plan(run: OpenRun, scoring: Scoring, chooser: Method | None) -> FeaturePlan | None:
    """Return the plan of the embeddings that rows are kept apart by; None without ``max_similarity``.

    Args:
        run: of the run. scoring: of the round; only its candidates are embedded, where it has some.
        chooser: the method that chose them.
    """
    methods = [scoring.method] if chooser is None else [chooser, scoring.method]
    need = similarity_need(run.given, methods)
    if need is None:
        return None
    part = rows_per_part(run, scoring.entry)
    need = with_rounds({"pool": need}, scoring.selection)["pool"]
    return plan_feature(need, run.config, partial(feature_input, run), part, scoring.cascade)


def keep_apart(run: OpenRun, plan: FeaturePlan) -> Apart:
    """Return what keeps rows apart; embeddings that are not there are computed."""
    if run.given.max_similarity is None:
        raise ValueError("rows are kept apart where max_similarity is set")
    return Apart(feature_table(run, plan), run.given.max_similarity)


def passed_over_table(apart: Apart, pool: PartedTable, scores: ScoreTable) -> pa.Table:
    """Return the rows that were passed over, each with the row that it resembles.

    Args:
        apart: after the draw. pool: prepared rows. scores: of the round.
    """
    found = apart.passed_over()
    if not len(found.rows):
        return PASSED_OVER.empty_table()
    like = np.maximum(found.like, 0)
    without = found.like < 0
    ids = gather_row_ids(pool, like).combine_chunks()
    named = "source" in pool.schema.names
    columns = {
        "row": found.rows,
        "row_id": gather_row_ids(pool, found.rows),
        "source": gather(pool, found.rows, "source") if named else pa.nulls(len(like), pa.string()),
        "score": gather(scores, found.rows, "score"),
        "like_row": pa.array(like, mask=without),
        "like_row_id": pa.array(ids.to_pylist(), pa.string(), mask=without),
        "similarity": pa.array(found.similarity, mask=without),
    }
    return pa.table([columns[name] for name in PASSED_OVER.names], names=PASSED_OVER.names).cast(PASSED_OVER)


def said_of(table: pa.Table, limit: float) -> str:
    """Return the sentence about the rows that were passed over."""
    if not table.num_rows:
        return f"no row is like one taken before it (max_similarity {limit:g})"
    bare = table.column("like_row").null_count
    more = f" ({bare} of them because they have no embedding)" if bare else ""
    return (
        f"{table.num_rows} rows were passed over, too like one taken before them{more}: max_similarity "
        f"{limit:g}; passed_over.parquet names them"
    )
