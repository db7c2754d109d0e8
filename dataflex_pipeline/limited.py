"""Work of unknown length, tried in a process of its own within limits of time and memory.

What comes with a model may hold programs: chat templates, patterns. Nothing inside of a process can end one
that never ends; the system can end another process.
"""

from __future__ import annotations

import os
import select
import signal
import warnings
from collections.abc import Callable
from pathlib import Path

_WAIT = 300
"""Seconds on the clock after which it is given up in any case."""


def tried(work: Callable[[], str], seconds: int, room: int) -> str | None:
    """Return what a piece of work says, done in a copy of this process; None if it does not end in time.

    Args:
        work: what it changes is lost. It says "" where the system makes no copy of a process.
        seconds: on a processor. room: bytes of memory beside those that this process has already.
    """
    if not hasattr(os, "fork"):
        return ""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking among threads: the child starts none
        child = os.fork()
    if child == 0:
        try:
            _limit(seconds, room)
            os.write(writing, work().encode())
        finally:  # nothing of the program goes on in the child
            os._exit(0)
    os.close(writing)
    try:
        said = _heard(reading)
        if said is None:
            os.kill(child, signal.SIGKILL)
    finally:
        os.close(reading)
    _, status = os.waitpid(child, 0)
    return None if os.WIFSIGNALED(status) else said


def _heard(reading: int) -> str | None:
    """Return all that the child says until it ends; None if it takes too long."""
    said = b""
    while select.select([reading], [], [], _WAIT)[0]:
        block = os.read(reading, 4096)
        if not block:
            return said.decode()
        said += block
    return None


def _limit(seconds: int, room: int) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    pages = Path("/proc/self/statm")
    if pages.is_file():
        now = int(pages.read_text().split()[0]) * resource.getpagesize()
        _, most = resource.getrlimit(resource.RLIMIT_AS)
        limit = now + room if most == resource.RLIM_INFINITY else min(now + room, most)
        resource.setrlimit(resource.RLIMIT_AS, (limit, most))
