"""`dataflex inspect`: what a table, a whole run, or one row of it, says. Reads only, in bounded memory."""

from __future__ import annotations

from typing import Annotated

import typer

from dataflex_pipeline.errors import UserError

from .completion import complete_run
from .looked_at import show_row, subject_of
from .options import EXAMPLES, ConfigOption, JsonOption, MethodOption, RunOption

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
    typer.Option(help="A query over scores, selections, idx, probabilities, pool, target, features, ..."),
]
CsvOption = Annotated[bool, typer.Option("--csv", help="The table as CSV: the answer, or the numbers.")]
RowOption = Annotated[int | None, typer.Option(help="Why this row? All that is known of row N of the pool.")]
GradientsOption = Annotated[
    bool, typer.Option("--gradients", help="With --row: take gradients anew, for the target rows that agree.")
]
RowIdOption = Annotated[str | None, typer.Option(help="The same, by the beginning of its row_id.")]
FindOption = Annotated[str | None, typer.Option(help="The same, by a text that it holds; of several a list.")]


@commands.command(
    epilog=EXAMPLES + "dataflex inspect runs/quickstart-loss/round-01/scores/loss.parquet\n\n"  # noqa: S608
    "dataflex inspect quickstart-loss --row 7\n\n"
    "dataflex inspect quickstart-loss --sql 'select round, avg(score) from scores group by round'"
)
def inspect(
    arguments: TableArguments = None,
    config: ConfigOption = None,
    run: RunOption = None,
    method: MethodOption = None,
    row: RowOption = None,
    row_id: RowIdOption = None,
    find: FindOption = None,
    gradients: GradientsOption = False,
    sql: SqlOption = None,
    json: JsonOption = False,
    csv: CsvOption = False,
    rows: Annotated[int, typer.Option(help="Example rows of each kind; 0 for none.", min=0)] = 3,
) -> None:
    """Look at a table, a run or a row: numbers, reasons, examples, ranks; or ask with SQL."""
    if json and csv:
        raise UserError(
            "--json and --csv were given.", "The output is one or the other.", "Leave one of them out."
        )
    one = any(each is not None for each in (row, row_id, find))
    if one and (csv or sql is not None):
        raise UserError(
            f"{'--csv' if csv else '--sql'} was given with --row, --row-id or --find.",
            "What is known of one row is no table.",
            "Leave one of them out; --json gives all of it to a program.",
        )
    if gradients and not one:
        raise UserError(
            "--gradients was given without --row, --row-id or --find.",
            "Gradients are taken of one row, and compared with those of the target.",
            "Name the row, or leave it out.",
        )
    subject = subject_of(config, arguments or [], run, method, json or csv)
    if one:
        show_row(subject, row, row_id, find, json=json, gradients=gradients)
        return
    from dataflex_pipeline.terminal.inspection import show

    show(subject, sql, "json" if json else "csv" if csv else "text", rows)
