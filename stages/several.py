"""One command on several processes: rank 0 runs it, the others do the jobs that it gives out."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Any

from dataflex_pipeline import launch
from dataflex_pipeline.errors import DataflexError, RunError

from . import console
from .disk import disk_error
from .libraries import quieten


def run(lead: Callable[[], int]) -> int:
    """Return this process' exit code, once the whole launch has ended.

    Args:
        lead: runs the command, on rank 0 only, prints its errors and returns its exit code.
    """
    quieten()
    # DDP warns at each start that no parameter was unused, which is the normal case.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    sys.excepthook = _crash
    first = launch.rank() == 0
    try:
        team = launch.join(console.fail if first else _tell)
    except DataflexError as error:
        console.fail(error)
        return error.exit_code
    return _lead(team, lead) if first else _follow(team)


def _lead(team: launch.Team, lead: Callable[[], int]) -> int:
    try:
        code = lead()
    except Exception:
        # Before the others hear of it: the launcher ends this process as soon as one of them has left.
        _tell_all(traceback.format_exc())
        team.dismiss(1)
        launch.end_now(1)
        raise
    team.dismiss(code)
    if code == 0:
        launch.leave_process_group()
    return code


def _follow(team: launch.Team) -> int:
    """Do jobs until rank 0 has ended; print nothing but an error that rank 0 does not print."""
    code: int
    try:
        while (given := team.next_job()) is not None:
            job, content = given
            _do(job, content)
            job.done()
        code = 0
    except KeyboardInterrupt:
        code = 130
    except SystemExit as leaving:  # rank 0 has failed and says why
        code = int(leaving.code or 0)
    except DataflexError as error:
        code = error.exit_code
        if not team.fail(error):
            _tell(error)
    except Exception as error:
        if team.has_failed():  # a connection that broke because another process has ended
            launch.end_now(1)
        explained = disk_error(error)
        if explained is None:
            team.fail(error)
            raise
        code = explained.exit_code
        if not team.fail(explained):
            _tell(explained)
    team.leave()
    if code == 0:
        launch.leave_process_group()
    return code


def _do(job: launch.Job, content: dict[str, Any]) -> None:
    kind = content["do"]
    if kind == "feature":
        from dataflex_pipeline.features.build import compute_share

        compute_share(job, content)
    elif kind == "train":
        from dataflex_pipeline.pipeline.train import train_share

        train_share(content)
    else:
        raise RunError(
            f"Rank 0 gives out the job '{kind}'.",
            "The processes run different versions of this program.",
            "Use one environment on all machines.",
        )


def _crash(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Show an error that nobody expected, and end without waiting for ranks that are gone."""
    _tell_all("".join(traceback.format_exception(kind, error, trace)))
    launch.end_now(1)


def _tell(error: DataflexError) -> None:
    _tell_all(f"error: {error.what}\n{error.why}\n-> {error.fix}")


def _tell_all(text: str) -> None:
    """Print to stderr with the rank before every line."""
    sys.stderr.write("".join(f"rank {launch.rank()}: {line}\n" for line in text.splitlines()))
