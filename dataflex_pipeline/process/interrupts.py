"""Ctrl-C: the first one ends the command in order, those right after it nothing, a later one at once.

Every file is whole at every moment, so ending at once does no harm either.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from types import FrameType

from dataflex_pipeline.start import ends_at_once

ORDERLY = 2.0
"""Seconds that the first one has to itself: locks are let go, a line is printed."""
_CODE = 130
_first: list[float] = []


def seen() -> bool:
    """Whether there was one."""
    return bool(_first)


def would_be_seen() -> bool:
    """Whether a Ctrl-C is told from a KeyboardInterrupt that something raised by itself."""
    return signal.getsignal(signal.SIGINT) is _interrupt


def watched(command: Callable[[], int]) -> int:
    """Run a command and return its exit code; what is left to do then is Python's own, and may be cut off.

    A process that the shell keeps from interrupts stays so.
    """
    ours = not_kept_from()
    if ours:
        signal.signal(signal.SIGINT, _interrupt)
    code = command()
    if ours:
        signal.signal(signal.SIGINT, _end)
    return code


def not_kept_from() -> bool:
    """Whether this process gets interrupts; from here on the first one raises KeyboardInterrupt."""
    if signal.getsignal(signal.SIGINT) is ends_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return signal.getsignal(signal.SIGINT) is signal.default_int_handler


def _interrupt(number: int, frame: FrameType | None) -> None:
    if not _first:
        _first.append(time.monotonic())
        raise KeyboardInterrupt
    if time.monotonic() - _first[0] > ORDERLY:
        _end(number, frame)


def _end(number: int, frame: FrameType | None) -> None:
    os._exit(_CODE)
