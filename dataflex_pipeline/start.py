"""First moments of a process: Ctrl-C and closed standard streams, before anything else is imported."""

import errno
import os
import signal
from types import FrameType

INTERRUPTED = 130
_NO_MEMORY = (
    b"error: There is not enough memory to start.\n"
    b"The machine has no more, or a limit of this process was reached (ulimit -v, a control group).\n"
    b"-> Raise the limit, and run the same command again: finished work is kept.\n"
)
LEAST, PER_THREAD = 160 << 20, 24 << 20
"""Bytes of address space below which numpy cannot be imported, and more of them for each of its threads.

Its BLAS tries again for ever where it gets no buffers: below 135 MiB on 2 threads, 115 MiB on one.
"""
MOST_THREADS = 64
_TOLD = b"interrupted; nothing was begun\n"


def begin() -> None:
    """Set up signals and streams of a process that runs one command.

    Its imports take a third of a second, in which nothing can catch a Ctrl-C in order; one ends it at once
    then. A process that the shell keeps from interrupts stays so.
    """
    if too_little_address_space():
        ends_without_memory()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, ends_at_once)
    fill_streams()


def too_little_address_space(least: int = LEAST) -> bool:
    """Whether a limit of this process (ulimit -v) is too low to import what computes.

    Args:
        least: bytes that it takes on a machine of one core, threads aside.
    """
    try:
        import resource
    except ImportError:  # Windows
        return False
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    cores = min(os.cpu_count() or 1, MOST_THREADS)
    given = [os.environ.get(name, "") for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS")]
    threads = min(
        [cores, *(int(text) for text in given if text.isascii() and text.isdecimal() and int(text))]
    )
    return limit != resource.RLIM_INFINITY and limit < least + PER_THREAD * threads


def lacks_memory(error: BaseException) -> bool:
    """Whether an error, or what caused it, is that the system gave no more memory, or none to map a file."""
    seen: BaseException | None = error
    while seen is not None:
        mapping = isinstance(seen, ImportError) and "failed to map segment" in str(seen)
        if mapping or isinstance(seen, MemoryError) or getattr(seen, "errno", None) == errno.ENOMEM:
            return True
        seen = seen.__cause__
    return False


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
