"""The start of a round: the parts of it that are already there, and whether the training can continue."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dataflex_pipeline import launch
from dataflex_pipeline.api import Progress
from dataflex_pipeline.errors import CorruptError, RunError, StaleError
from dataflex_pipeline.store.agreed import agreed_file
from dataflex_pipeline.store.fingerprint import changes, digest
from dataflex_pipeline.store.run import BEST
from dataflex_pipeline.store.stale import MARKER, named_changes
from dataflex_pipeline.training.course import LOG, Course, StepLog
from dataflex_pipeline.training.kept import set_aside_kept, usable_steps
from dataflex_pipeline.training.marker import Marker, missing_pieces, read_marker, verify_checkpoint
from dataflex_pipeline.training.plan import RoundPlan
from dataflex_pipeline.training.sharded import check_sharding

if TYPE_CHECKING:
    from dataflex_pipeline.config.fields import Config


def already_there(plan: RoundPlan) -> Marker | None:
    """Return the marker of a finished checkpoint that is this round's; raise when it is another one's."""
    if not plan.checkpoint.exists():
        return None
    marker = verify_checkpoint(plan.checkpoint)
    differing = named_changes(marker.ingredients, plan.ingredients)
    differing += named_changes(marker.plan, plan.describe())
    if differing:
        raise StaleError(
            f"{plan.checkpoint} was made from other settings:\n" + "\n".join(differing),
            "Going on would mix two different runs.",
            "Use another run name, or --overwrite to set the old checkpoint aside.",
        )
    shutil.rmtree(plan.work, ignore_errors=True)
    return marker


def checkpoint_before(plan: RoundPlan) -> Marker | None:
    """Check that the previous checkpoint is whole and that this round continues exactly it."""
    if plan.previous is None:
        return None
    marker = _whole(plan.previous)
    full = "adapter_model.safetensors" not in marker.files
    lacking = missing_pieces(marker.files, full, sharded_states="latest" in marker.files)
    if lacking:
        raise CorruptError(
            f"{plan.previous} was written without {', '.join(lacking)}.",
            "The optimizer, the schedule or the random streams would start anew, unnoticed.",
            "Train that round again with --overwrite.",
        )
    if marker.result is not None and marker.result["stopped_early"]:
        raise RunError(
            f"{plan.previous} is the end of the run: early stopping fired at step {marker.step}.",
            "The patience is counted over all rounds, and it is used up.",
            "Export that run, or start another one with a larger early_stopping_steps.",
        )
    if not marker.finished or marker.step != plan.first_step:
        raise RunError(
            f"{plan.previous} is at step {marker.step}, and round {plan.round} starts at step "
            f"{plan.first_step}.",
            "A round continues the optimizer and the learning-rate schedule where the round before ended.",
            "Run the rounds in order; after a change of warmup_step or update_step use another run name.",
        )
    fixed = ("horizon", "global_batch")
    differing = changes({k: marker.plan[k] for k in fixed}, {k: plan.describe()[k] for k in fixed})
    if differing:
        raise StaleError(
            f"{plan.previous} belongs to a run with another shape:\n" + "\n".join(differing),
            "One learning-rate schedule and one batch size hold over the whole run.",
            "Use another run name for other settings.",
        )
    return marker


def _whole(checkpoint: Path) -> Marker:
    """Return the marker of a checkpoint; the first process of a launch reads all of its files to check it."""
    if launch.rank():
        launch.await_file(checkpoint / MARKER)
        marker = read_marker(checkpoint)
        if marker is not None:
            return marker
    return verify_checkpoint(checkpoint)


def newest_inside(config: Config, plan: RoundPlan, progress: Progress) -> Marker | None:
    """Return the newest whole checkpoint inside the round; remove what is unfinished or of other settings."""
    found: dict[int, Marker] = {}
    noted = [agreed_file(plan.work, name) for name in (plan.rows_name, plan.pieces_name)]
    for folder in sorted(plan.work.glob("*")):
        if folder in noted:
            continue
        if folder.name.startswith(f"{BEST}-") and read_marker(folder) is not None:
            continue
        marker = _usable(folder, plan, progress) if folder.name.startswith("checkpoint-") else None
        if marker is not None:
            found[marker.step] = marker
        elif folder.is_dir():
            shutil.rmtree(folder)
        else:
            folder.unlink()
    usable = usable_steps(config, plan, found)
    for step in sorted(set(found) - set(usable)):
        progress.say(
            f"Not used, and removed: the checkpoint of step {step}; with save_steps: {config.save_steps} it "
            "is none to be kept, or one before it is missing."
        )
        shutil.rmtree(plan.work / f"checkpoint-{step}")
    if not usable:
        set_aside_kept(plan)
        return None
    return found[usable[-1]]


def _usable(folder: Path, plan: RoundPlan, progress: Progress) -> Marker | None:
    if not (folder / MARKER).is_file():
        return None
    try:
        marker = verify_checkpoint(folder)
    except CorruptError as error:
        progress.say(f"Not used, and removed: {error.what}")
        return None
    if marker.fingerprint != digest(plan.ingredients) or marker.plan != plan.describe():
        progress.say(f"Not used, and removed: {folder} was made from other settings.")
        return None
    return marker


@dataclass(frozen=True)
class Start:
    """Where the training of the round begins: a checkpoint (None: the base model) and the books so far."""

    folder: Path | None
    step: int
    course: Course
    log: StepLog

    @classmethod
    def of(
        cls,
        plan: RoundPlan,
        config: Config,
        inside: Marker | None,
        before: Marker | None,
        progress: Progress,
    ) -> Start:
        """Return the newest checkpoint inside the round, else the one before it.

        Args:
            plan: the round.
            config: whether a best checkpoint is kept.
            inside: marker of the newest checkpoint inside the round, if there is one.
            before: marker of the previous checkpoint; None for the warm-up.
            progress: told where it goes on.
        """
        if inside is not None:
            folder = plan.work / f"checkpoint-{inside.step}"
            progress.say(f"Round {plan.round} goes on from step {inside.step}.")
            return cls(
                folder, inside.step, Course.of(inside.course), StepLog.parse((folder / LOG).read_text())
            )
        course = Course.of(None if before is None else before.course)
        course.seconds = 0.0
        if config.load_best_model_at_end and course.best is not None:
            kept = read_marker(plan.run_folder / BEST)
            if kept is None or kept.step != course.best["step"]:
                progress.say(
                    f"best/ is not the best checkpoint before this round (step {course.best['step']}) any "
                    "more; the next evaluation counts as the best."
                )
                course.best = None
        return cls(plan.previous, plan.first_step, course, StepLog())


def check_start(start: Start, config: Config) -> None:
    """Refuse a start whose optimizer this launch cannot load (see `check_sharding`)."""
    marker = None if start.folder is None else read_marker(start.folder)
    if start.folder is None or marker is None:
        return
    stage = None
    if config.deepspeed is not None:
        content = json.loads(Path(config.deepspeed).read_text(encoding="utf-8"))
        stage = int(content.get("zero_optimization", {}).get("stage", 0))
    check_sharding(marker.files, start.folder, stage, launch.world_size())
