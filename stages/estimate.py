"""`dataflex estimate`: what a run will take, before it is run. Nothing is written into the run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from dataflex_pipeline.errors import RunError

from .options import EXAMPLES, ConfigOption, JsonOption, MethodOption, RunArguments, RunOption
from .subject import is_run, run_options

if TYPE_CHECKING:
    from dataflex_pipeline.pipeline.locate import Options

commands = typer.Typer()


@commands.command(epilog=EXAMPLES + "dataflex estimate --config my-run.yaml --method less")
def estimate(
    arguments: RunArguments = None,
    config: ConfigOption = None,
    run: RunOption = None,
    method: MethodOption = None,
    json: JsonOption = False,
) -> None:
    """Predict what a run takes, from a short calibration here: time, memory, disk, FLOPs, API requests."""
    from dataflex_pipeline.estimate.run import predict
    from dataflex_pipeline.terminal import console
    from dataflex_pipeline.terminal.answers import print_json
    from dataflex_pipeline.terminal.estimate import draw_estimate

    from .opening import open_run

    with console.messages_to_stderr(json):
        options = run_options(config, arguments or [], run, method, False, begins=True)
        _refuse_nothing(options)
        opened = open_run(options)
        found = predict(opened)
    if json:
        print_json(found.plain())
    else:
        draw_estimate(opened.folder, found)


def _refuse_nothing(options: Options) -> None:
    """Refuse the name of a run that is not there where nothing says what it would be: not the demo's cost.

    Raises:
        RunError: there is none, and neither a configuration file nor data is given.
    """
    told = {text.partition("=")[0].strip() for text in options.overrides} & {"dataset", "model_name_or_path"}
    if options.run is None or options.config is not None or told or is_run(options.run, options.overrides):
        return
    raise RunError(
        f"There is no run {options.run}, and nothing says what it would be made of.",
        "Without a configuration file and without data it would be the demo that is estimated.",
        "Name a run that is there, give --config or dataset=... and model_name_or_path=..., or leave --run "
        "out for the demo.",
    )
