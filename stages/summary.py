"""The summary at the end of a command: what was done, what was found, where it is, and what to do next."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from dataflex_pipeline import launch
from dataflex_pipeline.pipeline.output import Outcome, shown
from dataflex_pipeline.pipeline.outputs import early_end
from dataflex_pipeline.pipeline.run import Run
from dataflex_pipeline.terminal import console


def report(folder: Path, outcomes: Sequence[Outcome], next_steps: Sequence[str]) -> None:
    """Print what happened, what was found, where it is below the run folder, and what to do next."""
    rows = [
        [
            outcome.stage,
            f"{outcome.seconds:.1f} s" if outcome.done else "up to date",
            outcome.found,
            shown(outcome.output, folder),
        ]
        for outcome in outcomes
    ]
    console.print_table(f"Summary of {folder}", ["stage", "time", "result", "where"], rows, wraps="result")
    if next_steps:
        console.line("Next:")
        for step in next_steps:
            console.line(f"  {step}")


def after_round(run: Run, last: int) -> list[str]:
    """Return what can be done after round ``last``."""
    steps = [
        f"see what there is:  dataflex status {run.again}",
        f"look at it in a browser:  dataflex report {shlex.quote(str(run.folder))}",
    ]
    if not run.given.trains_rounds:
        return [*_after_selecting(run, last), *steps]
    if last < run.given.update_times and early_end(run, last) is None:
        steps.insert(0, f"go on:  {launch.command()} round {last + 1} {run.again}")
    return steps


def _after_selecting(run: Run, last: int) -> list[str]:
    """Return the next steps of a run that is not trained any further."""
    if not last:
        return [command("score every row", "score", "--round 1", run)]
    return [command("write the rows to a file", "export", "--to selected.jsonl", run)]


def after_pick(run: Run) -> list[str]:
    """Return what can be done with rows that were picked."""
    where = run.store.round(1)
    method = run.given.component_name
    return [
        f"all rows with their scores:  {where.scores(method)}",
        f"the selected ones, by rank:  {where.selection}",
        f"look at them in a browser:  dataflex report {shlex.quote(str(run.folder))}",
    ]


def command(label: str, name: str, options: str, run: Run) -> str:
    """Return a next step that is a command on the same run, started as this one was."""
    return f"{label}:  {launch.command()} {name} {options} {run.again}".rstrip()
