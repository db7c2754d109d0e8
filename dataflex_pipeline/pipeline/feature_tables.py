"""The feature tables that a run's methods read: what they are computed over, and with; and the tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from dataflex_pipeline import api
from dataflex_pipeline.config.components import ComponentEntry
from dataflex_pipeline.features.build import build_feature
from dataflex_pipeline.features.plan import FeaturePlan
from dataflex_pipeline.pipeline.checkpoints import checkpoint_of
from dataflex_pipeline.pipeline.open_run import OpenRun
from dataflex_pipeline.pipeline.prepare import open_split
from dataflex_pipeline.store.parts import PartedTable
from dataflex_pipeline.training.marker import verify_checkpoint

if TYPE_CHECKING:
    from dataflex_pipeline.pipeline.score import Scoring


def feature_input(run: OpenRun, need: api.Need) -> api.FeatureInput:
    """Return the rows and the checkpoint that a need speaks of."""
    table = open_split(run, need.split)
    checkpoint, fingerprint = checkpoint_of(run, need)
    return api.FeatureInput(table, table.fingerprint, checkpoint, fingerprint)


def rows_per_part(run: OpenRun, entry: ComponentEntry) -> int | Literal["auto"]:
    """Return the unit of resume: the method's ``save_interval`` or the configuration's ``rows_per_part``."""
    return entry.save_interval or run.given.rows_per_part


def feature_table(run: OpenRun, plan: FeaturePlan) -> PartedTable:
    """Return a feature table of the run; missing parts are computed."""
    return build_feature(
        run.features,
        plan,
        run.progress,
        overwrite=run.overwrite,
        verify=verify_checkpoint,
        shared=run.given.features_dir is not None,
    ).table


def feature_tables(run: OpenRun, scoring: Scoring) -> dict[str, PartedTable]:
    """Return the feature tables that the method needs, by its own names; missing parts are computed.

    Raises:
        UserError: those of the target show that the pool's would be computed for nothing.
    """
    target = check_target_tables(run, scoring)
    return {key: target.get(key) or feature_table(run, plan) for key, plan in scoring.needs.items()}


def check_target_tables(run: OpenRun, scoring: Scoring) -> dict[str, PartedTable]:
    """Return the target's feature tables that the method has looked at before the pool's are computed.

    None of a method that does not look at them: what its features need of a checkpoint is checked as each is
    opened, the pool's first.
    """
    if type(scoring.method).check_target is api.Method.check_target:
        return {}
    plans = {key: plan for key, plan in scoring.needs.items() if plan.need.split != "pool"}
    tables = {key: feature_table(run, plan) for key, plan in plans.items()}
    scoring.method.check_target(tables)
    return tables
