"""The `dataflex` command. Everything heavy is imported inside the commands, so that --help is quick."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from dataflex_pipeline.errors import DataflexError

from .cli_results import results
from .options import (
    EXAMPLES,
    ConfigOption,
    JsonOption,
    MethodOption,
    OverwriteOption,
    RoundOption,
    RunOption,
    SettingsArgument,
)
from .subject import run_options

app = typer.Typer(
    name="dataflex",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Offline data selection for LLM fine-tuning, as files: score, select, train, go round again.",
)

INTERRUPTED = 130
READER_LEFT = 141
"""What a shell reports of a program whose output nobody reads any more (128 + SIGPIPE), as in ``| head``."""


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


@app.command(epilog=EXAMPLES + "dataflex warmup dataset=my.json model_name_or_path=./model")
def warmup(
    settings: SettingsArgument = None,
    config: ConfigOption = None,
    run: RunOption = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Prepare the data and train round 0 on uniformly drawn rows."""
    from . import warmup as module

    module.warmup(run_options(config, settings or [], run, None, overwrite, begins=True))


@app.command(epilog=EXAMPLES + "dataflex score --round 1 --method loss loss.focus=medium")
def score(
    settings: SettingsArgument = None,
    config: ConfigOption = None,
    run: RunOption = None,
    round_number: RoundOption = 1,
    method: MethodOption = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Score every row of the pool with one method; the result is a table."""
    from . import score as module

    options = run_options(config, settings or [], run, None, overwrite, begins=True)
    module.score(options, round_number, method)


@app.command(epilog=EXAMPLES + "dataflex select --round 1 --method loss fraction=0.1 weights=importance")
def select(
    settings: SettingsArgument = None,
    config: ConfigOption = None,
    run: RunOption = None,
    round_number: RoundOption = 1,
    method: MethodOption = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Turn scores into probabilities and draw the weighted index of a round."""
    from . import select_index as module

    options = run_options(config, settings or [], run, None, overwrite, begins=True)
    module.select(options, round_number, method)


@app.command("train-round", epilog=EXAMPLES + "dataflex train-round --round 1")
def train_round(
    settings: SettingsArgument = None,
    config: ConfigOption = None,
    run: RunOption = None,
    round_number: RoundOption = 1,
    overwrite: OverwriteOption = False,
) -> None:
    """Train one round on its index, going on from the round before."""
    from . import train_round as module

    options = run_options(config, settings or [], run, None, overwrite, begins=True)
    module.train_round(options, round_number)


@app.command("round", epilog=EXAMPLES + "dataflex round 2 --method delta_loss learning_rate=1e-4")
def round_(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[N] [KEY=VALUE]...", help="How far to go (without N: to the horizon), and settings."
        ),
    ] = None,
    config: ConfigOption = None,
    run: RunOption = None,
    method: MethodOption = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Do whatever is missing up to round N: prepare, warm up, then score, select and train each round."""
    from . import round as module

    number, settings = module.parse_round(arguments or [])
    module.round_(run_options(config, settings, run, method, overwrite, begins=True), number)


@app.command(epilog=EXAMPLES + "dataflex methods loss")
def methods(
    name: Annotated[str | None, typer.Argument(help="Show one method's parameters only.")] = None,
    config: ConfigOption = None,
    templates: Annotated[bool, typer.Option("--templates", help="List the chat templates instead.")] = False,
) -> None:
    """List the methods: what they do, their parameters, defaults and source."""
    from . import listing

    listing.templates() if templates else listing.methods(name, config)


@app.command(epilog=EXAMPLES + "dataflex init my-run.yaml")
def init(
    path: Annotated[Path, typer.Argument(help="Where to write the configuration.")] = Path("dataflex.yaml"),
) -> None:
    """Write a configuration file with every key, its default and its meaning."""
    from . import listing

    listing.init(path)


@app.command(epilog=EXAMPLES + "dataflex status --run quickstart-loss")
def status(
    settings: SettingsArgument = None,
    config: ConfigOption = None,
    run: RunOption = None,
    method: MethodOption = None,
    json: JsonOption = False,
) -> None:
    """Show what of a run is done, stale or missing."""
    from . import status as module

    module.status(run_options(config, settings or [], run, method, False), json)


app.add_typer(results)


def main() -> None:
    """Run the command: exit code 0 done, 1 our failure, 2 the user's mistake, 130 interrupted, 141 unread."""
    from dataflex_pipeline import launch

    if launch.world_size() == 1:
        code = _run()
        launch.leave_process_group()
        sys.exit(code)
    from . import several

    code = several.run(_run)
    if code:
        launch.end_now(code)
    sys.exit(0)


def _run() -> int:
    """Run the command in this process; its errors are printed. Return the exit code."""
    try:
        app(standalone_mode=True)
    except DataflexError as error:
        return _failed(error)
    except SystemExit as leaving:
        if leaving.code == INTERRUPTED:  # typer has turned the KeyboardInterrupt into this
            typer.echo("interrupted; the same command goes on from here", err=True)
        if isinstance(leaving.__context__, BrokenPipeError):  # typer makes a failure (1) of it
            return READER_LEFT
        return leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except Exception as error:
        from .disk import disk_error

        explained = disk_error(error)
        if explained is None:
            raise
        return _failed(explained)
    return 0


def _failed(error: DataflexError) -> int:
    from . import console

    console.fail(error)
    return error.exit_code


if __name__ == "__main__":
    main()
