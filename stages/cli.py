"""The `dataflex` command. Everything heavy is imported inside the commands, so that --help is quick."""

from __future__ import annotations

import functools
import sys
from typing import Annotated

import typer

from dataflex_pipeline.process.exits import Commands

from . import (
    compare,
    doctor,
    estimate,
    evaluate,
    export,
    init,
    inspect_,
    methods,
    pick,
    report,
    round,
    score,
    select_,
    status,
    train_round,
    view,
    warmup,
)

STEPS = (pick, warmup, score, select_, train_round, round)
AROUND = (methods, init, status, compare, inspect_, report, view, export, doctor, estimate, evaluate)

app = typer.Typer(
    name="dataflex",
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Offline data selection for LLM fine-tuning, as files: score, select, train, go round again.",
)


@app.callback(invoke_without_command=True)
def _common(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
) -> None:
    if version:
        from dataflex_pipeline import __version__

        typer.echo(__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


for _command in (*STEPS, *AROUND):  # the order of --help
    app.add_typer(_command.commands)


def main() -> None:
    """Run the command, in one process or in each of a launch, and leave with its exit code."""
    from dataflex_pipeline.process.command import run

    sys.exit(run(functools.partial(app, standalone_mode=False)))
