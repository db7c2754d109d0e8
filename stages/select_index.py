"""`dataflex select`: the probabilities and the weighted index of a round, from its scores."""

from __future__ import annotations

from dataflex_pipeline.pipeline.locate import Options

from .opening import open_run
from .summary import command, report


def select(options: Options, number: int, method: str | None) -> None:
    """Draw the index of one round."""
    run = open_run(options)
    run.select(number, method or run.given.component_name)
    report(run.folder, run.outcomes, [command("train", "train-round", f"--round {number}", run)])
