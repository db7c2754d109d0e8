"""Atomic writes: the only renames of the program; a durable file appears whole or not at all.

A file or folder is written under a temporary name in the folder where it will live, flushed to the
disk, and renamed. A reader therefore sees the old state or the new one, and a process killed at any
moment leaves at most a temporary name behind, which the next writer removes.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dataflex_pipeline.errors import CorruptError

TEMPORARY = ".partial"


def fsync_path(path: Path) -> None:
    """Flush one file or folder entry to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def commit(temporary: Path, final: Path) -> None:
    """Make a finished temporary file or folder visible under its final name.

    Every durable write of the package goes through this function. The temporary path and its contents
    are flushed first, then renamed, then the rename itself is flushed.
    """
    if temporary.is_dir():
        for path in sorted(temporary.rglob("*")):
            fsync_path(path)
    fsync_path(temporary)
    os.replace(temporary, final)  # noqa: PTH105 (the tests intercept this very call)
    fsync_path(final.parent)


@contextlib.contextmanager
def atomic_file(final: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``final``; on success it becomes ``final``, on failure it goes away."""
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.with_name(final.name + TEMPORARY)
    try:
        yield temporary
        commit(temporary, final)
    except BaseException:
        with contextlib.suppress(OSError):  # of a folder that became read-only; the first error says it
            temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def atomic_folder(final: Path) -> Iterator[Path]:
    """Yield an empty temporary folder beside ``final``; on success it becomes ``final``."""
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.with_name(final.name + TEMPORARY)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        commit(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def first_wins(final: Path, text: str) -> None:
    """Write a small text file, unless another process has written it first."""
    temporary = final.with_name(f"{final.name}.{socket.gethostname()}.{os.getpid()}{TEMPORARY}")
    temporary.write_text(text, "utf-8")
    fsync_path(temporary)
    try:
        os.link(temporary, final)
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links
        if not final.exists():
            commit(temporary, final)
    temporary.unlink(missing_ok=True)
    fsync_path(final.parent)


def write_json(final: Path, value: Any) -> None:
    """Write a JSON file atomically, keys sorted, so that equal values are equal bytes."""
    with atomic_file(final) as temporary:
        temporary.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", "utf-8")


def write_text(final: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_file(final) as temporary:
        temporary.write_text(text, "utf-8")


def read_json(path: Path) -> Any:
    """Read a JSON file that this package wrote.

    Raises:
        CorruptError: the file is not valid JSON (it was cut off or edited).
    """
    try:
        return json.loads(path.read_text("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CorruptError(
            f"{path} is not valid JSON ({error}).",
            "It was written whole by this program, so something else changed or truncated it.",
            "Delete it, or use --overwrite, and run the same command again.",
        ) from error


def set_aside(path: Path) -> Path | None:
    """Rename an existing file or folder to ``<name>.old-<time>`` so that an overwrite loses nothing.

    Returns:
        The new path, or None if there was nothing to set aside.
    """
    if not path.exists():
        return None
    stamp = time.strftime("%Y%m%d-%H%M%S")
    aside = path.with_name(f"{path.name}.old-{stamp}")
    count = 1
    while aside.exists():
        count += 1
        aside = path.with_name(f"{path.name}.old-{stamp}-{count}")
    os.replace(path, aside)  # noqa: PTH105
    fsync_path(path.parent)
    return aside
