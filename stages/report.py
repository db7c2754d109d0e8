"""`dataflex report`: a run as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dataflex_pipeline.errors import UserError

from .completion import complete_run
from .folders import run_folders
from .options import EXAMPLES, OverwriteOption, RunOption
from .words import with_run

commands = typer.Typer()


@commands.command(epilog=EXAMPLES + "dataflex report quickstart-loss")
def report(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RUN [runs_dir=FOLDER]",
            help="A name below runs_dir, or a folder.",
            autocompletion=complete_run,
        ),
    ] = None,
    run: RunOption = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The page; report.html in the run by default.")
    ] = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Write a run as one HTML page: rounds, curves, scores, what was selected, examples, settings."""
    from dataflex_pipeline.reports.records import RunRecord
    from dataflex_pipeline.reports.report import write_report
    from dataflex_pipeline.terminal import console

    folders = run_folders(with_run(arguments or [], run))
    if len(folders) != 1:
        raise UserError(
            f"{len(folders)} runs were named.",
            "A report is of one run.",
            "Name one: `dataflex report quickstart-loss`. `dataflex compare` puts several side by side.",
        )
    record = RunRecord.read(folders[0], trained=False)
    where = write_report(record, output, overwrite=overwrite)
    console.line(
        f"Report of {record.name}: {where} ({where.stat().st_size / 1024:.0f} KB). Open it in a browser."
    )
