"""`dataflex inspect`: what a table, or a whole run, says. Reads only, in bounded memory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dataflex_pipeline.errors import UserError

from .completion import complete_run
from .options import EXAMPLES, ConfigOption, JsonOption, MethodOption, RunOption
from .words import split_subject

if TYPE_CHECKING:
    from dataflex_pipeline.reports.subject import Subject

commands = typer.Typer()
TableArguments = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[TABLE|RUN] [KEY=VALUE]...",
        help="A table's path, or a run's name or folder.",
        autocompletion=complete_run,
    ),
]
SqlOption = Annotated[
    str | None,
    typer.Option(help="A query over scores, probabilities, idx, pool, target, features, this, ..."),
]
CsvOption = Annotated[bool, typer.Option("--csv", help="The table as CSV: the answer, or the numbers.")]


@commands.command(
    epilog=EXAMPLES + "dataflex inspect runs/quickstart-loss/round-01/scores/loss.parquet\n\n"  # noqa: S608
    "dataflex inspect quickstart-loss --sql 'select round, avg(score) from scores group by round'"
)
def inspect(
    arguments: TableArguments = None,
    config: ConfigOption = None,
    run: RunOption = None,
    method: MethodOption = None,
    sql: SqlOption = None,
    json: JsonOption = False,
    csv: CsvOption = False,
    rows: Annotated[int, typer.Option(help="Example rows of each kind; 0 for none.", min=0)] = 3,
) -> None:
    """Look at a table or a run: distribution, reasons, sources, example rows; or ask it with SQL."""
    if json and csv:
        raise UserError(
            "--json and --csv were given.", "The output is one or the other.", "Leave one of them out."
        )
    from dataflex_pipeline.terminal.inspection import show

    subject = _subject(config, arguments or [], run, method, json or csv)
    show(subject, sql, "json" if json else "csv" if csv else "text", rows)


def _subject(
    config: Path | None, arguments: list[str], run: str | None, method: str | None, machine: bool
) -> Subject:
    from dataflex_pipeline.pipeline.locate import Options
    from dataflex_pipeline.pipeline.open_run import require_run
    from dataflex_pipeline.reports.subject import Subject
    from dataflex_pipeline.terminal import console

    from .opening import open_run

    named, settings = split_subject(arguments)
    if named is not None and run is None and (found := Subject.at(Path(named))) is not None:
        return found
    with console.messages_to_stderr(machine):
        options = Options(config, tuple(settings), run if run is not None else named, method)
        opened = open_run(options, reads_only=True)
    require_run(opened)
    if named is None or run is None:
        return Subject(opened.store, None)
    return Subject(opened.store, Path(named) if Path(named).exists() else opened.folder / named)
