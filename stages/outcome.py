"""What a stage did, for the summary at the end of a command."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stages import console


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
