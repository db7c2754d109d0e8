"""Locks between processes: a file that one of them holds, until it ends, however it ends.

The lock is the operating system's own (flock), so nothing has to be cleaned up after a crash. Beside it
lies a file that names its holder, for messages; it decides nothing.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from dataflex_pipeline.errors import UserError

POLL = 0.2
"""Seconds between two attempts while waiting."""
FOR_ALL = 0o666
"""Mode of a lock file, less the umask: users of a group may share what it guards."""


class InUseError(Exception):
    """Another process holds the lock; ``who`` names it."""

    def __init__(self, who: str) -> None:
        super().__init__(who)
        self.who = who


@contextlib.contextmanager
def held(path: Path, waiting: Callable[[str], object] | None = None) -> Iterator[None]:
    """Hold a lock.

    Args:
        path: the lock's file, made when missing.
        waiting: is told who holds it, once, before this process waits; None: it does not wait.

    Raises:
        InUseError: another process holds it, and this one is not to wait.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{path.parent} cannot be made.",
            f"{error.strerror}: something there is no folder, or may not be written to.",
            "Name a folder that can be: runs_dir, output_dir or features_dir.",
        ) from error
    owner = path.with_name(f"{path.name}-owner")
    for each in (path, owner):
        if each.is_symlink() or (each.exists() and not each.is_file()):
            raise UserError(
                f"{each} is no file of this program.",
                "Processes are kept apart by it, and something else has its name.",
                "Move it away, and run the same command again.",
            )
    lock = FileLock(path, timeout=0, mode=FOR_ALL)
    try:
        lock.acquire()
    except Timeout:
        who = _read(owner)
        if waiting is None:
            raise InUseError(who) from None
        waiting(who)
        lock.acquire(timeout=-1, poll_interval=POLL)
    try:
        owner.write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
        yield
    finally:
        # Nobody reads it once the lock is free; a folder that became read-only has an error of its own.
        with contextlib.suppress(OSError):
            owner.unlink(missing_ok=True)
        lock.release()


def _read(owner: Path) -> str:
    try:
        return owner.read_text().strip()
    except OSError:  # it is being written or removed
        return "unknown"
