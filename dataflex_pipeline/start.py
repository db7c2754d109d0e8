"""First moments of a process: Ctrl-C and closed standard streams, before anything else is imported."""

import os
import signal
from types import FrameType

INTERRUPTED = 130
_NO_MEMORY = (
    b"error: There is not enough memory to start.\n"
    b"The machine has no more, or a limit of this process was reached (ulimit -v, a control group).\n"
    b"-> Raise the limit, and run the same command again: finished work is kept.\n"
)
_TOLD = b"interrupted; nothing was begun\n"


def begin() -> None:
    """Set up signals and streams of a process that runs one command.

    Its imports take a third of a second, in which nothing can catch a Ctrl-C in order; one ends it at once
    then. A process that the shell keeps from interrupts stays so.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, ends_at_once)
    fill_streams()


def ends_at_once(number: int, frame: FrameType | None) -> None:
    """End this process, in which nothing has begun."""
    try:
        os.write(2, _TOLD)
    finally:
        os._exit(INTERRUPTED)


def ends_without_memory() -> None:
    """End this process, which has not even the memory for its own messages."""
    try:
        os.write(2, _NO_MEMORY)
    finally:
        os._exit(1)


def fill_streams() -> None:
    """Open the null device for each standard stream that is closed.

    A file opened later would get its number, and what a library prints would be written into that file.
    """
    for number in (0, 1, 2):
        if not is_open(number):
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free, which is this one
            os.set_inheritable(number, True)


def is_open(number: int) -> bool:
    """Whether this process has an open file of that number."""
    try:
        os.fstat(number)
    except OSError:
        return False
    return True
