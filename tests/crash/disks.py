"""Disks that fill up or fail: file systems of the test's own, where mounting is permitted."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

REFUSALS = ("ermission denied", "not permitted", "superuser", "loop device")
"""What mount says where it may not mount, or has no device for a file to be mounted through."""


@contextlib.contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[Path]:
    """Mount a tmpfs of that size; skip where that is not permitted."""
    folder.mkdir()
    _permitted(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)])
    try:
        yield folder
    finally:
        _run("umount", str(folder))


def grow(disk: Path, kilobytes: int) -> None:
    """Give a small disk another size."""
    _run("mount", "-o", f"remount,size={kilobytes}k", str(disk))


@dataclass(frozen=True)
class FailingDisk:
    """A file system in a file.

    Attributes:
        image: the file. folder: where it is mounted.
    """

    image: Path
    folder: Path

    def fail(self) -> None:
        """Become read-only as the kernel does it when a disk fails, open files or not."""
        _run("mount", "-o", "remount,abort", str(self.folder))

    def repair(self) -> None:
        """Be mounted anew."""
        _run("umount", str(self.folder))
        _run(*self.mounting)

    @property
    def mounting(self) -> list[str]:
        """The command that mounts it."""
        return ["mount", "-o", "loop", str(self.image), str(self.folder)]


@contextlib.contextmanager
def failing_disk(folder: Path) -> Iterator[FailingDisk]:
    """Make and mount one in a folder; skip where that is not permitted."""
    disk = FailingDisk(folder / "image", folder / "disk")
    disk.folder.mkdir()
    with disk.image.open("wb") as stream:
        stream.truncate(30 << 20)
    _permitted(["mkfs.ext4", "-q", "-F", str(disk.image)])
    _permitted(disk.mounting)
    try:
        yield disk
    finally:
        _run("umount", str(disk.folder))


def _permitted(command: list[str]) -> None:
    """Run a command; skip where it is missing or not permitted."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except FileNotFoundError:
        pytest.skip(f"there is no {command[0]} to make a disk with")
    if any(refusal in done.stderr for refusal in REFUSALS):
        pytest.skip(f"a disk cannot be made: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr


def _run(*command: str) -> None:
    subprocess.run(command, check=True, timeout=20)
