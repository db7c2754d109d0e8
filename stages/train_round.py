"""`dataflex train-round`: one round trained on its index, going on from the round before."""

from __future__ import annotations

import typer

from .options import EXAMPLES, ConfigOption, OverwriteOption, RoundOption, RunArguments, RunOption
from .subject import run_options

commands = typer.Typer()


@commands.command("train-round", epilog=EXAMPLES + "dataflex train-round --round 1")
def train_round(
    arguments: RunArguments = None,
    config: ConfigOption = None,
    run: RunOption = None,
    round_number: RoundOption = 1,
    overwrite: OverwriteOption = False,
) -> None:
    """Train one round on its index, going on from the round before."""
    from .opening import open_run
    from .summary import command, report

    opened = open_run(run_options(config, arguments or [], run, None, overwrite, begins=True))
    opened.train(round_number)
    is_last = round_number >= opened.given.last_round
    next_steps = [] if is_last else [command("go on", "score", f"--round {round_number + 1}", opened)]
    report(opened.folder, opened.outcomes, next_steps)
