"""The `dataflex` command. Everything heavy is imported inside the commands, so that --help is quick."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from dataflex_pipeline.errors import DataflexError

from . import (
    compare,
    doctor,
    estimate,
    evaluate,
    export,
    init,
    inspect_,
    methods,
    report,
    round,
    score,
    select_,
    status,
    train_round,
    warmup,
)

COMMANDS = (
    warmup,
    score,
    select_,
    train_round,
    round,
    methods,
    init,
    status,
    compare,
    inspect_,
    report,
    export,
    doctor,
    estimate,
    evaluate,
)
"""In the order of --help."""

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


for _command in COMMANDS:
    app.add_typer(_command.commands)


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
        from dataflex_pipeline.store.disk_errors import disk_error

        explained = disk_error(error)
        if explained is None:
            raise
        return _failed(explained)
    return 0


def _failed(error: DataflexError) -> int:
    from dataflex_pipeline.terminal import console

    console.fail(error)
    return error.exit_code


if __name__ == "__main__":
    main()
