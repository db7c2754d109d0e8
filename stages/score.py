"""`dataflex score`: one method's score of every row of the pool, as a table."""

from __future__ import annotations

from dataflex_pipeline.pipeline.locate import Options

from .opening import open_run
from .summary import command, report


def score(options: Options, number: int, method: str | None) -> None:
    """Score one round with one method."""
    run = open_run(options)
    name = method or run.given.component_name
    run.score(number, name)
    next_step = command("select", "select", f"--round {number} --method {name}", run)
    report(run.folder, run.outcomes, [next_step])
