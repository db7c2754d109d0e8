"""One command on several processes: rank 0 runs it, the others do the jobs that it gives out."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable

from dataflex_pipeline import launch
from dataflex_pipeline.errors import DataflexError
from dataflex_pipeline.launch.team import Team, end_now
from dataflex_pipeline.models.one_base import one_base
from dataflex_pipeline.process.exits import INTERRUPTED, explained
from dataflex_pipeline.process.libraries import quieten
from dataflex_pipeline.terminal import console


def run(command: Callable[[], int]) -> int:
    """Return this process' exit code, once the whole launch has ended.

    Args:
        command: run on rank 0 only; prints its errors and returns its exit code.
    """
    quieten()
    # DDP warns at each start that no parameter was unused, which is the normal case.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    sys.excepthook = _crash
    try:
        team = launch.join(_tell if launch.rank() else console.fail)
    except DataflexError as error:
        console.fail(error)
        end_now(error.exit_code)
    code = _follow(team) if team.rank else command()
    team.end(code)
    if code:
        end_now(code)
    launch.leave_process_group()
    return code


def _follow(team: Team) -> int:
    """Do jobs until rank 0 has ended; print nothing but an error that rank 0 does not print."""
    try:
        with one_base():
            team.follow()
        return 0
    except KeyboardInterrupt:
        return INTERRUPTED
    except SystemExit as leaving:
        own = explained(leaving)
        if own is None:  # rank 0 has failed and says why
            return int(leaving.code or 0)
        if not team.fail(own):
            _tell(own)
        return own.exit_code
    except Exception as error:
        if not isinstance(error, DataflexError) and team.has_failed():
            end_now(1)  # a connection that broke because another process has ended
        known = error if isinstance(error, DataflexError) else explained(error)
        told = team.fail(known or error)
        if known is None:
            raise
        if not told:
            _tell(known)
        return known.exit_code


def _crash(kind: type[BaseException], error: BaseException, trace: object) -> None:
    """Show an error that nobody expected, and end without waiting for ranks that are gone."""
    _print("".join(traceback.format_exception(error)))
    try:
        # Only now: the launcher ends this process as soon as one of the others has left.
        if (team := launch.current()) is not None and team.rank == 0:
            team.end(1)
    finally:
        end_now(1)


def _tell(error: DataflexError) -> None:
    _print(f"error: {error.what}\n{error.why}\n-> {error.fix}")


def _print(text: str) -> None:
    sys.stderr.write("".join(f"rank {launch.rank()}: {line}\n" for line in text.splitlines()))
