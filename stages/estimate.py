"""`dataflex estimate`: what a run will take, before it is run. Nothing is written into the run."""

from __future__ import annotations

import typer

from .options import EXAMPLES, ConfigOption, JsonOption, MethodOption, RunArguments, RunOption
from .subject import refuse_nothing_to_estimate, run_options

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
        refuse_nothing_to_estimate(options)
        opened = open_run(options)
        found = predict(opened)
    if json:
        print_json(found.plain())
    else:
        draw_estimate(opened.folder, found)
