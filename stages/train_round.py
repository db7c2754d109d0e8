"""`dataflex train-round`: one round trained on its index, going on from the round before."""

from __future__ import annotations

from dataflex_pipeline.pipeline.locate import Options

from .opening import open_run
from .summary import command, report


def train_round(options: Options, number: int) -> None:
    """Train one round on its index."""
    run = open_run(options)
    run.train(number)
    is_last = number >= run.given.update_times
    next_steps = [] if is_last else [command("go on", "score", f"--round {number + 1}", run)]
    report(run.folder, run.outcomes, next_steps)
