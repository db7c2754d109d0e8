"""A command from its first to its last moment, in one process or in each of a launch."""

from __future__ import annotations

import functools
from collections.abc import Callable

from dataflex_pipeline import launch
from dataflex_pipeline.process import interrupts
from dataflex_pipeline.process.exits import exit_code
from dataflex_pipeline.process.streams import write_anything


def run(command: Callable[[], object]) -> int:
    """Run a command, on rank 0 alone where there are several; return this process' exit code.

    Args:
        command: reads sys.argv; its errors are printed here.
    """
    write_anything()
    told = functools.partial(exit_code, command)
    code = exit_code(launch.check_environment)
    if code == 0 and launch.world_size() == 1:
        code = interrupts.watched(told)
        launch.leave_process_group()
    elif code == 0:
        from dataflex_pipeline.process import several

        interrupts.not_kept_from()
        code = several.run(told)
    return code
