"""The run that a command works on, opened for it: its notices are shown."""

from __future__ import annotations

from dataflex_pipeline.api import Silent
from dataflex_pipeline.pipeline.locate import Options
from dataflex_pipeline.pipeline.run import Run
from dataflex_pipeline.process.libraries import quieten
from dataflex_pipeline.terminal import console
from dataflex_pipeline.terminal.progress import progress


def open_run(options: Options, *, reads_only: bool = False) -> Run:
    """Open a run and print what its configuration has to say.

    Args:
        options: of the command.
        reads_only: for a command that writes nothing, and says nothing while it works.
    """
    quieten()
    run = Run.of(options, Silent() if reads_only else progress(), reads_only=reads_only)
    for notice in run.notices:
        console.line(f"note: {notice}", style="yellow")
    return run
