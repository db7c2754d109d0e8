"""`dataflex warmup`: the data prepared, and round 0 trained on uniformly drawn rows."""

from __future__ import annotations

import typer

from .options import EXAMPLES, ConfigOption, OverwriteOption, RunArguments, RunOption
from .subject import run_options

commands = typer.Typer()


@commands.command(epilog=EXAMPLES + "dataflex warmup dataset=my.json model_name_or_path=./model")
def warmup(
    arguments: RunArguments = None,
    config: ConfigOption = None,
    run: RunOption = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Prepare the data and train round 0 on uniformly drawn rows."""
    from .opening import open_run
    from .summary import after_round, report

    opened = open_run(run_options(config, arguments or [], run, None, overwrite, begins=True))
    opened.warmup()
    report(opened.folder, opened.outcomes, after_round(opened, 0))
