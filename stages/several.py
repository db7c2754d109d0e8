"""One command on several processes: rank 0 runs it, the others do the jobs that it gives out."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

from dataflex_pipeline import launch
from dataflex_pipeline.errors import DataflexError, RunError
from dataflex_pipeline.launch import roles
from dataflex_pipeline.terminal import console

from .exits import explained
from .libraries import quieten


def run(lead: Callable[[], int]) -> int:
    """Return this process' exit code, once the whole launch has ended.

    Args:
        lead: runs the command, on rank 0 only, prints its errors and returns its exit code.
    """
    quieten()
    # DDP warns at each start that no parameter was unused, which is the normal case.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    sys.excepthook = roles.crash
    first = launch.rank() == 0
    try:
        team = launch.join(console.fail if first else roles.tell)
    except DataflexError as error:
        console.fail(error)
        launch.end_now(error.exit_code)
    code = roles.lead(team, lead) if first else roles.follow(team, _do, explained)
    if code:
        launch.end_now(code)
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
