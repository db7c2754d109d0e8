"""The `dataflex` command. Everything heavy is imported inside the commands, so that --help is quick."""

from __future__ import annotations

import errno
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from dataflex_pipeline.errors import DataflexError

app = typer.Typer(
    name="dataflex",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Offline data selection for LLM fine-tuning, as files: score, select, train, go round again.",
)

Config = Annotated[
    Path | None,
    typer.Option(
        "--config", "-c", help="Configuration file (YAML). Without one: the run's own, or the demo's."
    ),
]
Run = Annotated[str | None, typer.Option("--run", help="Name of the run: a folder below runs_dir.")]
Overwrite = Annotated[
    bool,
    typer.Option("--overwrite", help="Make anew what was made with other settings; the old is kept aside."),
]
MethodOption = Annotated[
    str | None, typer.Option("--method", "-m", help="The method; `dataflex methods` lists them.")
]
RoundOption = Annotated[int, typer.Option("--round", "-r", help="The round, from 1.")]
Settings = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings over the configuration.")
]
EXAMPLES = "[bold]Example[/bold]  "
INTERRUPTED = 130


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
    settings: Settings = None, config: Config = None, run: Run = None, overwrite: Overwrite = False
) -> None:
    """Prepare the data and train round 0 on uniformly drawn rows."""
    from stages import commands

    commands.warmup(config, settings or [], run, overwrite)


@app.command(epilog=EXAMPLES + "dataflex score --round 1 --method loss loss.focus=medium")
def score(
    settings: Settings = None,
    config: Config = None,
    run: Run = None,
    round_number: RoundOption = 1,
    method: MethodOption = None,
    overwrite: Overwrite = False,
) -> None:
    """Score every row of the pool with one method; the result is a table."""
    from stages import commands

    commands.score(config, settings or [], run, round_number, method, overwrite)


@app.command(epilog=EXAMPLES + "dataflex select --round 1 --method loss fraction=0.1 weights=importance")
def select(
    settings: Settings = None,
    config: Config = None,
    run: Run = None,
    round_number: RoundOption = 1,
    method: MethodOption = None,
    overwrite: Overwrite = False,
) -> None:
    """Turn scores into probabilities and draw the weighted index of a round."""
    from stages import commands

    commands.select(config, settings or [], run, round_number, method, overwrite)


@app.command("train-round", epilog=EXAMPLES + "dataflex train-round --round 1")
def train_round(
    settings: Settings = None,
    config: Config = None,
    run: Run = None,
    round_number: RoundOption = 1,
    overwrite: Overwrite = False,
) -> None:
    """Train one round on its index, going on from the round before."""
    from stages import commands

    commands.train_round(config, settings or [], run, round_number, overwrite)


@app.command("round", epilog=EXAMPLES + "dataflex round 2 --method delta_loss learning_rate=1e-4")
def round_(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[N] [KEY=VALUE]...", help="How far to go (without N: to the horizon), and settings."
        ),
    ] = None,
    config: Config = None,
    run: Run = None,
    method: MethodOption = None,
    overwrite: Overwrite = False,
) -> None:
    """Do whatever is missing up to round N: prepare, warm up, then score, select and train each round."""
    from stages import commands

    commands.round_(config, arguments or [], run, method, overwrite)


@app.command(epilog=EXAMPLES + "dataflex methods loss")
def methods(
    name: Annotated[str | None, typer.Argument(help="Show one method's parameters only.")] = None,
    config: Config = None,
    templates: Annotated[bool, typer.Option("--templates", help="List the chat templates instead.")] = False,
) -> None:
    """List the methods: what they do, their parameters, defaults and source."""
    from stages import listing

    listing.templates() if templates else listing.methods(name, config)


@app.command(epilog=EXAMPLES + "dataflex init my-run.yaml")
def init(
    path: Annotated[Path, typer.Argument(help="Where to write the configuration.")] = Path("dataflex.yaml"),
) -> None:
    """Write a configuration file with every key, its default and its meaning."""
    from stages import listing

    listing.init(path)


@app.command(epilog=EXAMPLES + "dataflex status --run quickstart-loss")
def status(
    settings: Settings = None, config: Config = None, run: Run = None, method: MethodOption = None
) -> None:
    """Show what of a run is done, stale or missing."""
    from stages import status as module

    module.status(config, settings or [], run, method)


def main() -> None:
    """Run the command: exit code 0 done, 1 our failure, 2 the user's mistake, 130 interrupted."""
    try:
        app(standalone_mode=True)
    except DataflexError as error:
        _leave(error)
    except SystemExit as leaving:
        if leaving.code == INTERRUPTED:  # typer has turned the KeyboardInterrupt into this
            typer.echo("interrupted; the same command goes on from here", err=True)
        raise
    except Exception as error:
        full = disk_full(error)
        if full is None:
            raise
        _leave(full)


def _leave(error: DataflexError) -> NoReturn:
    from stages import console

    console.fail(error)
    sys.exit(error.exit_code)


def disk_full(error: BaseException) -> DataflexError | None:
    """Return the error to show when a full disk, a quota or a file-size limit is behind an exception."""
    seen: BaseException | None = error
    while seen is not None:
        code = getattr(seen, "errno", None)
        text = str(seen)
        full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        # Libraries written in Rust put the system's number into the text only.
        if code in full or any(f"os error {number})" in text for number in full) or "No space left" in text:
            return DataflexError(
                f"A file could not be written: {text.splitlines()[0]}",
                "The disk is full, or a quota or file-size limit was reached.",
                "Free some space and run the same command again: finished work is kept, nothing is damaged.",
            )
        seen = seen.__cause__ or seen.__context__
    return None


if __name__ == "__main__":
    main()
