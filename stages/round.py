"""`dataflex round N`: whatever is missing up to a round, in order."""

from __future__ import annotations

from typing import Annotated

import typer

from .completion import complete_argument
from .options import EXAMPLES, ConfigOption, MethodOption, OverwriteOption, RunOption
from .subject import run_options, split_round

commands = typer.Typer()


@commands.command("round", epilog=EXAMPLES + "dataflex round 2 --method delta_loss learning_rate=1e-4")
def round_(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[N] [RUN] [KEY=VALUE]...",
            help="How far to go (without N: to the horizon), a run's name or folder, and settings.",
            autocompletion=complete_argument,
        ),
    ] = None,
    config: ConfigOption = None,
    run: RunOption = None,
    method: MethodOption = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Do whatever is missing up to round N: prepare, warm up, then score, select and train each round."""
    from .opening import open_run
    from .summary import after_round, report

    number, words = split_round(arguments or [])
    opened = open_run(run_options(config, words, run, method, overwrite, begins=True))
    last = opened.given.update_times if number is None else number
    opened.round(last)
    report(opened.folder, opened.outcomes, after_round(opened, last))
