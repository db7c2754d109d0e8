"""Training a round: from the checkpoint before it to its own, killed and continued at any moment."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from dataflex_pipeline.api import Progress
from dataflex_pipeline.errors import CorruptError, RunError, StaleError
from dataflex_pipeline.seeds import derive_seed
from dataflex_pipeline.store.atomic import commit, set_aside, write_text
from dataflex_pipeline.store.fingerprint import changes, digest
from dataflex_pipeline.store.parts import PartedTable
from dataflex_pipeline.training.course import LOG, Course, Judge, StepLog
from dataflex_pipeline.training.marker import Marker, missing_pieces, read_marker, verify_checkpoint
from dataflex_pipeline.training.plan import RoundPlan, RoundResult

if TYPE_CHECKING:
    from trl import SFTConfig

    from dataflex_pipeline.config.fields import Config
    from dataflex_pipeline.training.trainer import WeightedTrainer

BEST = "best"


def train_round(
    config: Config, plan: RoundPlan, pool: PartedTable, target: PartedTable | None, progress: Progress
) -> RoundResult:
    """Train one round and make its checkpoint visible, whole.

    A finished checkpoint with the same ingredients is returned as it is. A killed call is continued from
    its newest complete checkpoint inside the round (``save_steps``), else from the round's start; the
    result is the same, bit for bit, on a CPU.

    Args:
        config: model, optimizer, evaluation; ``model_name_or_path`` names a real folder or hub model.
        plan: the round.
        pool: the prepared pool that the index was selected from.
        target: the prepared target; needed when ``eval_strategy`` is not "no".
        progress: where to report to.

    Returns:
        What the marker of the checkpoint records too.

    Raises:
        UserError: settings that cannot work, a previous checkpoint that is damaged or does not fit, an
            index that does not fit, a loss that is not finite, a full disk. The round's checkpoint is then
            not there.
    """
    from dataflex_pipeline.training.arguments import training_arguments

    plan.check()
    finished = _finished(plan)
    if finished is None:
        rule = _check_settings(config, target)
        course = _course_before(plan)
        finished = _continue_at_end(plan, progress)
        if finished is None:
            arguments = training_arguments(config, plan)
            finished = _train(config, plan, pool, target, progress, rule, course, arguments)
        _publish(config, plan, finished)
    shutil.rmtree(plan.work, ignore_errors=True)
    return _result(finished)


def _result(marker: Marker) -> RoundResult:
    assert marker.result is not None  # noqa: S101 (only finished markers get here)
    return RoundResult(**marker.result)
