"""Exit codes of the process: 0 done, 1 our failure, 2 the user's mistake, 130 interrupted, 141 unread."""

from __future__ import annotations

from collections.abc import Callable

import typer

from dataflex_pipeline.store.disk_errors import in_words

INTERRUPTED = 130
READER_LEFT = 141
"""What a shell reports of a program whose output nobody reads any more (128 + SIGPIPE), as in ``| head``."""


def exit_code(command: Callable[[], object]) -> int:
    """Run a command in this process; its errors are printed. Return the exit code."""
    try:
        command()
    except SystemExit as leaving:
        if leaving.code == INTERRUPTED:  # typer has turned the KeyboardInterrupt into this
            typer.echo("interrupted; the same command goes on from here", err=True)
        if isinstance(leaving.__context__, BrokenPipeError):  # typer makes a failure (1) of it
            return READER_LEFT
        return leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except Exception as error:
        known = in_words(error)
        if known is None:
            raise
        from dataflex_pipeline.terminal import console

        console.fail(known)
        return known.exit_code
    return 0
