"""`dataflex compare`: runs side by side at equal budget, or the methods scored in one run. Reads only."""

from __future__ import annotations

from typing import Annotated

import typer

from dataflex_pipeline.errors import UserError

from .completion import complete_run
from .folders import run_folders
from .options import EXAMPLES, JsonOption

commands = typer.Typer()


@commands.command(
    epilog=EXAMPLES + "dataflex compare random-seed1 random-seed2 less-seed1 less-seed2\n\n"
    "dataflex compare quickstart-loss --top 500"
)
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
    top: Annotated[
        int | None, typer.Option("--top", help="Of one run: how many best rows of each method.", min=1)
    ] = None,
    json: JsonOption = False,
) -> None:
    """Put runs side by side at equal budget; of one run the methods that were scored in it."""
    from dataflex_pipeline.reports.comparison import compare as compare_records
    from dataflex_pipeline.reports.records import RunRecord
    from dataflex_pipeline.reports.within import compare_methods
    from dataflex_pipeline.store.run import RunFolder
    from dataflex_pipeline.terminal.answers import print_json
    from dataflex_pipeline.terminal.comparison import draw_comparison, draw_methods

    folders = run_folders([*(arguments or []), *(run or [])])
    if not folders:
        raise UserError(
            "No run was named.",
            "A comparison puts runs side by side, or the methods that were scored in one run.",
            "Name them: `dataflex compare random-seed1 less-seed1`, or one run.",
        )
    alone = len(folders) == 1
    if (baseline is not None or allow_different) if alone else top is not None:
        raise UserError(
            f"{'--baseline or --allow-different' if alone else '--top'} was given for {len(folders)} run(s).",
            "--top is for the methods of one run, the other two are for several runs.",
            "Leave it out, or name other runs.",
        )
    if alone:
        methods = compare_methods(RunFolder(folders[0]), top)
        print_json(methods) if json else draw_methods(methods)
        return
    records = [RunRecord.read(folder) for folder in folders]
    found = compare_records(records, baseline, allow_different=allow_different)
    print_json(found.plain()) if json else draw_comparison(found, records)
