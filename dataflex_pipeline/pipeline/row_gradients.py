"""The target rows whose gradients agree most with a row's update: exact, computed when asked for.

Scores without a projection keep no gradient. The row's update is taken anew with the checkpoint that the
scores were made with, and then the gradient of every target row, one pass over the target.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import numpy as np

from dataflex_pipeline.features.capturing import COLUMNS, NOT_FINITE, load
from dataflex_pipeline.features.influence import Influence
from dataflex_pipeline.features.plan import FeaturePlan
from dataflex_pipeline.features.target_directions import TargetDirections
from dataflex_pipeline.gradients.similarity import PREFIX
from dataflex_pipeline.pipeline.open_run import OpenRun
from dataflex_pipeline.pipeline.row_likeness import Likeness, best_rows, described
from dataflex_pipeline.pipeline.score import plan_scoring
from dataflex_pipeline.store.parts import PartedTable
from dataflex_pipeline.store.stale import found_ingredients
from dataflex_pipeline.store.tables import TableFile
from dataflex_pipeline.training.marker import verify_checkpoint

if TYPE_CHECKING:
    from pathlib import Path


def agreements(run: OpenRun, row: int, notices: list[str]) -> Iterator[Likeness]:
    """Yield the target rows that agree most with a row, for every score table without a projection.

    Args:
        run: opened. row: of the pool. notices: is told what cannot be computed any more.
    """
    for number in run.store.rounds():
        for path in sorted((run.store.round(number).folder / "scores").glob("*.parquet")):
            yield from _of_scores(run, number, path, row, notices)


def _of_scores(run: OpenRun, number: int, path: Path, row: int, notices: list[str]) -> Iterator[Likeness]:
    if not any(name.startswith(PREFIX) for name in TableFile(path).schema.names):
        return
    label = f"{path.stem}, round {number}"
    scoring = plan_scoring(run, number, path.stem)
    exact = {key: plan for key, plan in scoring.needs.items() if plan.need.name == Influence.name}
    if exact and scoring.wanted["features"] != (found_ingredients(path) or {}).get("features"):
        notices.append(f"{label} was made with other settings: its gradients cannot be taken anew")
        return
    for key, plan in exact.items():
        yield _agreement(run, plan, label + key.removeprefix("pool").replace("-", " "), row)


def _agreement(run: OpenRun, plan: FeaturePlan, label: str, row: int) -> Likeness:
    """Take the row's update and the target's gradients, and compare them."""
    columns = [name for name in COLUMNS if name in plan.given.table.schema.names]
    rows = cast(PartedTable, plan.given.table).rows(row, row + 1, columns)
    if not rows.column("valid")[0].as_py():
        return Likeness("gradients", (label,), (), rows.column("reason")[0].as_py())
    if plan.given.checkpoint is not None:
        verify_checkpoint(plan.given.checkpoint)
    loaded = load(plan.given, run.config, run.progress)
    direction = cast(Influence, plan.feature).unit_update(loaded, rows)
    if not all(one.isfinite().all() for one in direction.values()):
        return Likeness("gradients", (label,), (), NOT_FINITE)
    inner = plan.upstream["directions"]
    tables = {key: PartedTable.open(each.folder(run.features)) for key, each in inner.upstream.items()}
    loaded = replace(loaded, given=replace(inner.given, tables=tables))
    numbers, best = np.empty(0, np.int64), np.empty(0)
    for found in cast(TargetDirections, inner.feature).cosines(loaded, direction):
        kept = found.filter(found.column("valid"))
        numbers, best = best_rows(
            np.concatenate([numbers, kept.column("row").to_numpy()]),
            np.concatenate([best, kept.column("cosine").to_numpy()]),
        )
    return Likeness("gradients", (label,), tuple(described(run.store, numbers, best)))
