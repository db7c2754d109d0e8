"""`dataflex report`: a run as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .completion import complete_run
from .folders import run_folder
from .options import EXAMPLES, OverwriteOption, RunOption
from .words import split_subjects, with_run

commands = typer.Typer()


@commands.command(epilog=EXAMPLES + "dataflex report quickstart-loss --against quickstart-random")
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
    against: Annotated[
        str | None,
        typer.Option(help="A run to hold the target loss against, such as one of method random."),
    ] = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Write a run as one HTML page to explore: what was selected, scores, single rows, losses, warnings."""
    from dataflex_pipeline.reports.page.report import write_report
    from dataflex_pipeline.reports.records import RunRecord
    from dataflex_pipeline.terminal import console

    words = with_run(arguments or [], run)
    fix = "Name one: `dataflex report quickstart-loss`. `dataflex compare` puts several side by side."
    record = RunRecord.read(run_folder(words, "A report", fix), trained=False)
    other = None
    if against is not None:
        other = RunRecord.read(run_folder([against, *split_subjects(words)[1]], "--against", "Name one."))
    where = write_report(record, output, against=other, overwrite=overwrite)
    console.line(
        f"Report of {record.name}: {where} ({where.stat().st_size / 1024:.0f} KB). Open it in a browser."
    )
