"""`dataflex select`: the probabilities and the weighted index of a round, from its scores."""

from __future__ import annotations

import typer

from .options import (
    EXAMPLES,
    ConfigOption,
    MethodOption,
    OverwriteOption,
    RoundOption,
    RunArguments,
    RunOption,
)
from .subject import run_options

commands = typer.Typer()


@commands.command(epilog=EXAMPLES + "dataflex select --round 1 --method loss fraction=0.1 weights=importance")
def select(
    arguments: RunArguments = None,
    config: ConfigOption = None,
    run: RunOption = None,
    round_number: RoundOption = 1,
    method: MethodOption = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Turn scores into probabilities and draw the weighted index of a round."""
    from .opening import open_run
    from .summary import command, report

    opened = open_run(run_options(config, arguments or [], run, None, overwrite, begins=True))
    opened.select(round_number, method or opened.given.component_name)
    next_step = command("train", "train-round", f"--round {round_number}", opened)
    report(opened.folder, opened.outcomes, [next_step])
