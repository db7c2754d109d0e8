"""`dataflex round N`: whatever is missing up to a round, in order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from dataflex_pipeline.errors import UserError

from .completion import complete_argument
from .options import EXAMPLES, ConfigOption, MethodOption, OverwriteOption, RunOption
from .subject import run_options

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
    opened = open_run(run_options(config, words, run, method, overwrite, begins=True, rounds=True))
    last = opened.given.last_round if number is None else number
    opened.round(last)
    report(opened.folder, opened.outcomes, after_round(opened, last))


def split_round(arguments: Sequence[str]) -> tuple[int | None, list[str]]:
    """Split ``[N] [RUN] key=value ...`` into the round number and the rest, in whatever order they stand.

    A whole number is always the round; a run whose name is a number is given with --run.

    Raises:
        UserError: two numbers are given.
    """
    numbers = [word for word in arguments if word.isascii() and word.removeprefix("-").isdigit()]
    if len(numbers) > 1:
        raise UserError(
            f"Two rounds are given: '{numbers[0]}' and '{numbers[1]}'.",
            "A whole number is how far to go, and there is one.",
            "Leave one of them out; a run whose name is a number is given as --run NAME.",
        )
    rest = [word for word in arguments if word not in numbers]
    return (int(numbers[0]) if numbers else None), rest
