"""Checkpoints inside a round that are kept after its end, for methods that score by several.

A round writes a checkpoint every ``save_steps`` steps into its work folder, where one is enough to go on
from. With ``keep_checkpoints`` none of them is removed before the round's end, and then each becomes
``round-NN/checkpoints/step-NNNNNN/``, before the round's own checkpoint becomes visible: a finished round has
all of them. Each is whole and has its marker, like the round's end. Which there are depends on ``save_steps``
alone, however often the training was killed: one that is missing below the newest makes the training go
back to where none is.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from dataflex_pipeline.api import Checkpoint, Progress
from dataflex_pipeline.errors import CorruptError
from dataflex_pipeline.store.atomic import commit, set_aside
from dataflex_pipeline.store.fingerprint import digest
from dataflex_pipeline.training.course import LOG, StepLog, mean
from dataflex_pipeline.training.marker import Marker, read_marker
from dataflex_pipeline.training.plan import RoundPlan

if TYPE_CHECKING:
    from dataflex_pipeline.config.fields import Config

KEPT = "checkpoints"


def kept_folder(checkpoint: Path, step: int) -> Path:
    """Return where a checkpoint inside a round is kept.

    Args:
        checkpoint: the round's own. step: optimizer steps of the whole run.
    """
    return checkpoint.parent / KEPT / f"step-{step:06d}"


def checkpoints_of(checkpoint: Path) -> tuple[Checkpoint, ...]:
    """Return the kept checkpoints of a finished round and its end, with their mean learning rates.

    Raises:
        CorruptError: a folder among them is no whole checkpoint of the round, or the round's log does not
            hold the steps that lead to it.
    """
    end = read_marker(checkpoint)
    if end is None:
        raise CorruptError(
            f"{checkpoint} has no marker.",
            "It is no finished checkpoint.",
            "Run the command that makes it again, with --overwrite if this stays.",
        )
    log = StepLog.parse((checkpoint / LOG).read_text(encoding="utf-8"))
    rates = {line["step"]: line["learning_rate"] for line in log.steps()}
    steps = [marker.step for marker in _kept(checkpoint, end.fingerprint)]
    found, before = [], end.plan["first_step"]
    for step in [*steps, end.step]:
        if not all(number in rates for number in range(before + 1, step + 1)) or step <= before:
            raise CorruptError(
                f"{checkpoint / LOG} does not hold the steps {before + 1} to {step}.",
                "The checkpoints of a round are weighed by the learning rates of those steps.",
                "Train that round again with --overwrite.",
            )
        since = mean([rates[number] for number in range(before + 1, step + 1)])
        found.append(Checkpoint(None if step == end.step else step, since))
        before = step
    return tuple(found)


def _kept(checkpoint: Path, fingerprint: str) -> Iterator[Marker]:
    """Yield the markers of the checkpoints kept beside a round's own, by rising step."""
    for folder in sorted((checkpoint.parent / KEPT).glob("step-*[0-9]")):
        marker = read_marker(folder)
        if (
            marker is None
            or folder != kept_folder(checkpoint, marker.step)
            or marker.fingerprint != fingerprint
        ):
            raise CorruptError(
                f"{folder} is no checkpoint of that step of this training.",
                "Kept checkpoints are moved there whole; something else changed it.",
                "Remove the folder, or train that round again with --overwrite.",
            )
        yield marker


def usable_steps(config: Config, plan: RoundPlan, found: Collection[int]) -> list[int]:
    """Return the checkpoints found inside a round that its training can go on with, by rising step.

    With ``keep_checkpoints`` those are the ones to be kept, as far as none is missing, and a newer one that
    none is missing below.

    Args:
        config: whether they are kept, and how many steps lie between two. plan: the round.
        found: steps of the whole ones in the work folder.
    """
    if not config.keep_checkpoints:
        return sorted(found)
    markers = [read_marker(folder) for folder in (plan.checkpoint.parent / KEPT).glob("step-*")]
    moved = [m.step for m in markers if m is not None and m.fingerprint == digest(plan.ingredients)]
    wanted = kept_steps(config, plan.first_step, plan.last_step)
    for newest in sorted(found, reverse=True):
        below = {number for number in wanted if number < newest}
        if below <= {*found, *moved}:
            return [*sorted(below & set(found)), newest]
    return []


def kept_steps(config: Config, first: int, last: int) -> range:
    """Return the steps of the whole run whose checkpoints are kept inside a stretch of it.

    Args:
        config: whether they are kept, and how many steps lie between two.
        first: last step before the stretch. last: its last step, whose checkpoint stays anyway.
    """
    if not config.keep_checkpoints or config.save_steps is None:
        return range(0)
    every = config.save_steps
    return range((first // every + 1) * every, last, every)


def set_aside_kept(plan: RoundPlan) -> None:
    """Set aside what an earlier training of the round kept, before it is trained anew."""
    set_aside(plan.checkpoint.parent / KEPT)


def publish_kept(config: Config, plan: RoundPlan, end: int, progress: Progress) -> None:
    """Move the checkpoints inside a finished round, all but its end, to where they are kept.

    Args:
        config: which ones are to be kept. plan: the round. end: its last step.
        progress: told what a killed call with another ``save_steps`` had moved there, and is removed.
    """
    wanted = [step for step in kept_steps(config, plan.first_step, plan.last_step) if step < end]
    finals = [kept_folder(plan.checkpoint, step) for step in wanted]
    for other in sorted((plan.checkpoint.parent / KEPT).glob("step-*")):
        if other not in finals:
            progress.say(
                f"Removed: {other}; with save_steps: {config.save_steps} and keep_checkpoints: "
                f"{str(config.keep_checkpoints).lower()} it is none to be kept."
            )
            shutil.rmtree(other)
    for step, final in zip(wanted, finals, strict=True):
        folder = plan.work / f"checkpoint-{step}"
        if read_marker(folder) is None:
            continue  # moved by a call that was killed right after
        final.parent.mkdir(exist_ok=True)
        if final.exists():
            shutil.rmtree(final)
        commit(folder, final)
