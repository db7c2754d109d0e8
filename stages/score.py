"""`dataflex score`: a method's score of every row of the pool, as a table; several methods in one pass."""

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


@commands.command(epilog=EXAMPLES + "dataflex score --round 1 --method loss loss.focus=medium")
def score(
    arguments: RunArguments = None,
    config: ConfigOption = None,
    run: RunOption = None,
    round_number: RoundOption = 1,
    method: MethodOption = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Score every row of the pool; the result is a table. Several methods in one pass: --method less,nice."""
    from .opening import open_run
    from .summary import command, report

    opened = open_run(run_options(config, arguments or [], run, None, overwrite, begins=True))
    names = (method or opened.given.component_name).split(",")
    name = names[0]
    if len(names) > 1:
        opened.score_together(round_number, names)
    else:
        opened.score(round_number, name)
    given = opened.given
    how_many = given.trains_rounds or given.num_samples or given.fraction or given.token_budget
    options = f"--round {round_number} --method {name}" + ("" if how_many else " fraction=0.1")
    next_step = command("select", "select", options, opened)
    report(opened.folder, opened.outcomes, [next_step])
