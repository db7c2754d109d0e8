"""Exit codes of the process: 0 done, 1 our failure, 2 the user's mistake, 130 interrupted, 141 unread."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperGroup

from dataflex_pipeline.errors import DataflexError, UserError
from dataflex_pipeline.process import interrupts
from dataflex_pipeline.start import fill_streams, is_open

INTERRUPTED = 130
READER_LEFT = 141
"""What a shell reports of a program whose output nobody reads any more (128 + SIGPIPE), as in ``| head``."""


class Commands(TyperGroup):
    """The commands; typer leaves in silence where a file of the user's own raises what it takes for its own.

    That is its Exit, with which a command would end half done and as if all were well, and a
    KeyboardInterrupt that nobody's Ctrl-C has raised.
    """

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        try:
            return super().invoke(ctx)
        except BaseException as error:
            from dataflex_pipeline.own_code import own_error

            is_key = isinstance(error, KeyboardInterrupt) and not interrupts.would_be_seen()
            found = None if is_key or interrupts.seen() else own_error(error, at_once=True)
            if found is None:
                raise
            raise found from error


def exit_code(command: Callable[[], object]) -> int:
    """Run a command in this process; its errors are printed. Return the exit code.

    Args:
        command: returns an exit code of its own, or nothing.
    """
    here = _folder()
    try:
        code = command()
        return _interrupted() if code == INTERRUPTED else code if isinstance(code, int) else 0
    except DataflexError as error:
        return _failed(_moved(error.__cause__, here) or error)
    except SystemExit as leaving:
        if (ended := explained(leaving)) is not None:  # by a file of the user's own
            return _failed(ended)
        if isinstance(leaving.__context__, BrokenPipeError):  # typer makes a failure (1) of it
            return READER_LEFT
        return leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException as error:
        if interrupts.seen() or isinstance(error, KeyboardInterrupt):
            return _interrupted()  # whatever a library made of it on its way here
        if getattr(error, "format_message", str)() == "" and hasattr(error, "exit_code"):
            return int(error.exit_code)  # a command without words, whose help was printed
        found = _misused(error) or _closed(error) or explained(error) or _moved(error, here)
        if found is None:
            raise
        return _failed(found)


def explained(error: BaseException) -> DataflexError | None:
    """Return what is to be told of a failure of disk or memory, or of a file of the user's own; else None."""
    from dataflex_pipeline.host_memory import memory_error
    from dataflex_pipeline.own_code import own_error
    from dataflex_pipeline.store.disk_errors import disk_error

    of_its_own = own_error(error, at_once=True)
    return of_its_own or disk_error(error) or memory_error(error) or own_error(error)


def _closed(error: BaseException) -> UserError | None:
    """Return the error to show where what is printed goes nowhere any more; None for any other."""
    wrapped = {"output": sys.stdout, "errors": sys.stderr}
    closed = [name for name, stream in wrapped.items() if stream.closed]
    numbers = [name for number, name in enumerate(wrapped, 1) if not is_open(number)]
    if not (isinstance(error, ValueError) and closed) and not (isinstance(error, OSError) and numbers):
        return None
    fill_streams()  # the numbers are taken again, or a file opened now would get what is printed
    for name in ("stdout", "stderr"):
        if getattr(sys, name).closed:
            setattr(sys, name, os.fdopen(os.dup(2), "w"))
    return UserError(
        f"The stream of standard {' and of '.join(closed or numbers)} was closed: {error}.",
        "The command had more to print, and nothing of this program closes that stream.",
        "Find close() in your own file (a method, a feature, a rewarder) or in what it calls; take it out, "
        "and run the same command again: finished work is kept.",
    )


def _folder() -> Path | None:
    try:
        return Path.cwd()
    except OSError:  # it was removed
        return None


def _moved(error: BaseException | None, here: Path | None) -> UserError | None:
    """Return the error to show where a path was not found because the working directory is another one."""
    if not isinstance(error, OSError) or here is None or (now := _folder()) == here:
        return None
    return UserError(
        f"The working directory was changed from {here} to {now}: {error}.",
        "Paths begin at the working directory, so the run's own files were not found any more.",
        "Find os.chdir in your own file (a method, a feature, a rewarder) or in what it calls; take it out.",
    )


def _misused(error: Any) -> UserError | None:
    """Return the error to show for words that the command does not take; None for any other."""
    if not hasattr(error, "format_message"):
        return None
    command = getattr(getattr(error, "ctx", None), "command_path", "dataflex")
    return UserError(
        error.format_message(),
        f"`{command}` takes other words and options.",
        f"See `{command} --help`.",
    )


def _interrupted() -> int:
    typer.echo("interrupted; the same command goes on from here", err=True)
    return INTERRUPTED


def _failed(error: DataflexError) -> int:
    from dataflex_pipeline.terminal import console

    console.fail(error)
    return error.exit_code
