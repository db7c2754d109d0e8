"""One pass over the pool for several methods: influence on all their targets at once, then a table for each.

Tables of influence that differ in nothing but the target's directions need the same gradients. They are
computed as one table with a column for each target, which is cut into the tables that each method would have
made alone, to the last bit, and removed. In a folder of features that runs share every table is made alone.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import cast

from dataflex_pipeline.features.influence import DOTS, Influence
from dataflex_pipeline.features.plan import FeaturePlan, plan_feature
from dataflex_pipeline.pipeline.feature_tables import check_target_tables, feature_input, feature_table
from dataflex_pipeline.pipeline.open_run import OpenRun
from dataflex_pipeline.pipeline.score import Scoring
from dataflex_pipeline.store.fingerprint import digest
from dataflex_pipeline.store.parts import PartedTable, PartsWriter


def share_passes(run: OpenRun, scorings: Sequence[Scoring]) -> None:
    """Compute the influence tables of several scorings that one pass over the pool can give.

    Args:
        run: owned for writing. scorings: of one round.
    """
    if run.given.features_dir is not None:
        return
    alike: dict[str, dict[str, FeaturePlan]] = {}
    for scoring in scorings:
        for plan in scoring.needs.values():
            if plan.need.name == Influence.name:
                same = {key: value for key, value in plan.ingredients.items() if key != "features"}
                alike.setdefault(digest(same), {})[digest(plan.ingredients)] = plan
                check_target_tables(run, scoring)
    for plans in alike.values():
        if len(plans) > 1:
            _share(run, [plans[fingerprint] for fingerprint in sorted(plans)])


def _share(run: OpenRun, plans: list[FeaturePlan]) -> None:
    """Compute tables together if none of them was begun alone, and go on with what was begun together."""
    first, *others = plans
    params = cast(Influence, first.feature).params
    further = tuple(cast(Influence, plan.feature).params.directions for plan in others)
    need = replace(first.need, params=params.model_copy(update={"more": further}))
    joint = plan_feature(need, run.config, partial(feature_input, run), first.rows_per_part)
    folder = joint.folder(run.features)
    begun = PartedTable.is_complete(folder) or not any(plan.folder(run.features).exists() for plan in plans)
    if begun:
        run.progress.say(f"influence of the pool: one pass for {len(plans)} targets")
        _cut(run, feature_table(run, joint), plans)
    shutil.rmtree(folder, ignore_errors=True)


def _cut(run: OpenRun, table: PartedTable, plans: Iterable[FeaturePlan]) -> None:
    """Write the table of each plan from the columns of the whole."""
    for place, plan in enumerate(plans):
        folder = plan.folder(run.features)
        if PartedTable.is_complete(folder):
            continue
        names = plan.feature.schema.names
        own = [f"{DOTS}_{place}" if name == DOTS and place else name for name in names]
        writer = PartsWriter(folder, plan.feature.schema, plan.ingredients)
        for number in range(table.n_parts):
            if number not in writer.done:
                writer.write(number, table.part(number, own).rename_columns(names))
        writer.finish(table.n_parts, table.summary)
