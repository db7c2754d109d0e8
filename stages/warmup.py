"""`dataflex warmup`: the data prepared, and round 0 trained on uniformly drawn rows."""

from __future__ import annotations

from dataflex_pipeline.pipeline.locate import Options

from .opening import open_run
from .summary import after_round, report


def warmup(options: Options) -> None:
    """Prepare the data and train round 0."""
    run = open_run(options)
    run.warmup()
    report(run.folder, run.outcomes, after_round(run, 0))
