"""What a stage did, for the summary at the end of a command."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dataflex_pipeline import launch

from . import console

if TYPE_CHECKING:
    from .context import Context


@dataclass(frozen=True)
class Outcome:
    """One finished stage.

    Attributes:
        stage: its name. output: where the result is. done: False if it was up to date already.
        seconds: spent on it. found: one line about the result.
    """

    stage: str
    output: Path
    done: bool
    seconds: float
    found: str


def note(context: Context, stage: str, number: int, began: float, *, on_device: bool, **more: object) -> None:
    """Add a finished stage of a round to the run's history: how many seconds it took, and on how many GPUs.

    Args:
        context: of the command. stage: score, select, train or evaluate. number: the round.
        began: `time.monotonic` then. on_device: whether a model ran; each process of the launch has one GPU.
        more: goes into the line as it is.
    """
    gpus = 0
    if on_device:
        from dataflex_pipeline.models.base import resolve_device

        gpus = 0 if resolve_device(context.given.device) == "cpu" else launch.world_size()
    context.run.note(stage=stage, round=number, seconds=time.monotonic() - began, gpus=gpus, **more)


def report(run: Path, outcomes: Sequence[Outcome], next_steps: Sequence[str]) -> None:
    """Print what happened, what was found, where it is below the run folder, and what to do next."""
    rows = [
        [
            outcome.stage,
            f"{outcome.seconds:.1f} s" if outcome.done else "up to date",
            outcome.found,
            console.shown(outcome.output, run),
        ]
        for outcome in outcomes
    ]
    console.print_table(f"Summary of {run}", ["stage", "time", "result", "where"], rows, wraps="result")
    if next_steps:
        console.line("Next:")
        for step in next_steps:
            console.line(f"  {step}")
