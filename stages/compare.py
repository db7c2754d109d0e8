"""`dataflex compare`: runs side by side at equal budget. Reads only."""

from __future__ import annotations

from typing import Annotated

import typer

from dataflex_pipeline.errors import UserError

from .completion import complete_run
from .folders import run_folders
from .options import EXAMPLES, JsonOption

commands = typer.Typer()


@commands.command(epilog=EXAMPLES + "dataflex compare random-seed1 random-seed2 less-seed1 less-seed2")
def compare(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RUN... [runs_dir=FOLDER]",
            help="Names below runs_dir, or folders.",
            autocompletion=complete_run,
        ),
    ] = None,
    run: Annotated[
        list[str] | None,
        typer.Option("--run", help="One run more; several times.", autocompletion=complete_run),
    ] = None,
    baseline: Annotated[
        str | None, typer.Option("--baseline", help="Method to compare with; random, where it is there.")
    ] = None,
    allow_different: Annotated[
        bool, typer.Option("--allow-different", help="Go on where pools, targets or budgets differ.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Put runs side by side at equal budget: by method, over seeds, with a paired test."""
    from dataflex_pipeline.reports.comparison import compare as compare_records
    from dataflex_pipeline.reports.records import RunRecord
    from dataflex_pipeline.terminal.answers import print_json
    from dataflex_pipeline.terminal.comparison import draw_comparison

    folders = run_folders([*(arguments or []), *(run or [])])
    if not folders:
        raise UserError(
            "No run was named.",
            "A comparison puts two runs or more side by side.",
            "Name them: `dataflex compare random-seed1 less-seed1`.",
        )
    records = [RunRecord.read(folder) for folder in folders]
    found = compare_records(records, baseline, allow_different=allow_different)
    if json:
        print_json(found.plain())
    else:
        draw_comparison(found, records)
