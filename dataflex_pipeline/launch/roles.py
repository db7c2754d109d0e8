"""Rank 0 that leads and the others that follow, each up to its exit code."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Any

from dataflex_pipeline.errors import DataflexError
from dataflex_pipeline.launch import leave_process_group, rank
from dataflex_pipeline.launch.team import Job, Team, end_now


def lead(team: Team, run: Callable[[], int]) -> int:
    """Run the command and let the others go; return the exit code.

    Args:
        team: the processes of the launch.
        run: the command; it prints its errors and returns its exit code.
    """
    try:
        code = run()
    except Exception:
        # Before the others hear of it: the launcher ends this process as soon as one of them has left.
        tell_all(traceback.format_exc())
        team.dismiss(1)
        end_now(1)
        raise
    team.dismiss(code)
    if code == 0:
        leave_process_group()
    return code


def follow(
    team: Team,
    do: Callable[[Job, dict[str, Any]], None],
    explain: Callable[[Exception], DataflexError | None],
) -> int:
    """Do jobs until rank 0 has ended; print nothing but an error that rank 0 does not print.

    Args:
        team: the processes of the launch.
        do: this process' share of a job, from what rank 0 says of it.
        explain: puts an error of the machine (a full disk) into words; None where it cannot.
    """
    code: int
    try:
        while (given := team.next_job()) is not None:
            job, content = given
            do(job, content)
            job.done()
        code = 0
    except KeyboardInterrupt:
        code = 130
    except SystemExit as leaving:  # rank 0 has failed and says why
        code = int(leaving.code or 0)
    except DataflexError as error:
        code = _report(team, error)
    except Exception as error:
        if team.has_failed():  # a connection that broke because another process has ended
            end_now(1)
        explained = explain(error)
        if explained is None:
            team.fail(error)
            raise
        code = _report(team, explained)
    team.leave()
    if code == 0:
        leave_process_group()
    return code


def _report(team: Team, error: DataflexError) -> int:
    if not team.fail(error):
        tell(error)
    return error.exit_code


def crash(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Show an error that nobody expected, and end without waiting for ranks that are gone."""
    tell_all("".join(traceback.format_exception(kind, error, trace)))
    end_now(1)


def tell(error: DataflexError) -> None:
    """Print an error in its three parts, the rank before every line."""
    tell_all(f"error: {error.what}\n{error.why}\n-> {error.fix}")


def tell_all(text: str) -> None:
    """Print to stderr with the rank before every line."""
    sys.stderr.write("".join(f"rank {rank()}: {line}\n" for line in text.splitlines()))
