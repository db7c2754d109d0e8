"""Work of unknown length, tried in a process of its own within limits, or ended by a timer in this one.

What comes with a model may hold programs: chat templates, patterns. Nothing inside of a process can end all
that never ends; the system can end another process. A loop in Python can be ended by a timer here too.
"""

from __future__ import annotations

import atexit
import os
import select
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

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


class TookTooLongError(Exception):
    """Work that was ended."""


class _Watch:
    """The work that goes on in this process, counted in ticks of a timer that stops when there is none."""

    def __init__(self) -> None:
        self.armed = self.works = False
        self.ticks, self.most = 0, 0
        self._before: Any = None

    def begin(self, seconds: int) -> None:
        self.ticks, self.most, self.works = 0, seconds, True
        if not self.armed:
            self._before = signal.signal(signal.SIGVTALRM, self._tick)
            signal.setitimer(signal.ITIMER_VIRTUAL, 1, 1)
            self.armed = True

    def _tick(self, number: int, frame: FrameType | None) -> None:
        self.ticks += 1
        if not self.works:
            self.stop()
        elif self.ticks > self.most:
            raise TookTooLongError("it takes longer than any row can need")

    def stop(self) -> None:
        """Stop the timer; left alone it would end a process that has put its signals back already."""
        if self.armed:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.signal(signal.SIGVTALRM, self._before or signal.SIG_DFL)
            self.armed = False

    def after_fork(self) -> None:
        self.armed = self.works = False  # timers are not inherited


_WATCH = _Watch()
atexit.register(_WATCH.stop)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_WATCH.after_fork)


@contextmanager
def within(seconds: int) -> Iterator[None]:
    """End a loop in Python that takes longer, in the main thread of a system that has such timers.

    One timer a second serves all work, which may be too short to start one each: it costs a microsecond.

    Args:
        seconds: of this process on a processor, so that a busy machine ends nothing; up to one more.

    Raises:
        TookTooLongError: it took longer.
    """
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return
    _WATCH.begin(seconds)
    try:
        yield
    finally:
        _WATCH.works = False
