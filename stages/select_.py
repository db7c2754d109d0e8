"""`dataflex select`: the rows of a round, chosen from its scores."""

from __future__ import annotations

from typing import Annotated

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
    name: Annotated[
        str | None,
        typer.Option(help="Try it under this name, beside the round's own; nothing is trained on it."),
    ] = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Choose the rows of a round from its scores: exactly as many as asked for, best first."""
    from .opening import open_run
    from .summary import command, report

    opened = open_run(run_options(config, arguments or [], run, None, overwrite, begins=True))
    opened.select(round_number, method or opened.given.component_name, name=name)
    which = f"--round {round_number}" + (f" --selection {name}" if name else "")
    steps = [command("write the rows to a file", "export", f"{which} --to selected.jsonl", opened)]
    if opened.given.trains_rounds and name is None:
        steps.insert(0, command("train", "train-round", f"--round {round_number}", opened))
    report(opened.folder, opened.outcomes, steps)
