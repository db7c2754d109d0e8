"""Files at a place that the user chose: never inside what a run wrote, never over what is not our own."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

from dataflex_pipeline.errors import UserError
from dataflex_pipeline.store.run import RunFolder

LONGEST_NAME = 200
"""Bytes of a file's name: systems take 255, and while it is written it has a longer one."""


def check_folder(file: Path) -> None:
    """Refuse a file that cannot be made where it was named, or that is among the files of a run.

    Its folder is not there or takes no file, its name is too long, or what is there is a folder or a device.

    At the top of a run's folder, beside those, a file does no harm. It holds with --overwrite too: call it
    before anything is set aside.

    Raises:
        UserError: one of these is so.
    """
    if not file.absolute().parent.is_dir():
        raise UserError(
            f"{file} was named.",
            f"There is no folder {file.parent}.",
            "Make it first, or name a file in a folder that is there.",
        )
    place = file.resolve()
    if RunFolder(place.parent).exists() and place in RunFolder(place.parent).records():
        raise UserError(
            f"{file} was named, a file of the run {place.parent} itself.",
            "Without it the run cannot be read.",
            "Name another file.",
        )
    for folder in list(place.parents)[1:]:
        if RunFolder(folder).exists():
            raise UserError(
                f"{file} was named, in a folder of the run {folder}.",
                "What is there was made by the run, and is only read.",
                "Name a file elsewhere, or directly in the run's folder.",
            )
    _check_name(file)
    check_writable(file.absolute().parent)


def _check_name(file: Path) -> None:
    """Refuse a name that is too long, and one that a folder, a device or a pipe has."""
    length = len(os.fsencode(file.name))
    if length > LONGEST_NAME:
        raise UserError(
            f"A file was named whose name has {length:,} bytes: {file.name[:40]}...",
            f"A name may have {LONGEST_NAME} bytes.",
            "Name it shorter.",
        )
    if file.exists() and not stat.S_ISREG(file.stat().st_mode):
        raise UserError(
            f"{file} was named, a folder, a device or a pipe.",
            "A file appears whole or not at all: it is written beside its place, and then put there.",
            "Name a new file.",
        )


def check_writable(folder: Path) -> None:
    """Refuse a folder in which no file can be made; of one that is not there yet, the nearest that is.

    Raises:
        UserError: the system makes none there.
    """
    there = next(place for place in (folder, *folder.absolute().parents) if place.is_dir())
    try:
        tempfile.TemporaryFile(dir=there).close()  # it has no name where the system can, so nothing changes
    except OSError as error:
        raise UserError(
            f"A file or folder was named in {there}.",
            f"Nothing can be made there: {error.strerror}.",
            "Name a place in a folder that you may write to.",
        ) from error


def check_free(file: Path, is_ours: Callable[[Path], bool]) -> None:
    """Refuse a place where a file would be written over that this program did not make.

    Args:
        file: the place.
        is_ours: whether a file that is there was made for the same purpose, so that its successor may take
            its place.

    Raises:
        UserError: something else is there, or the place is none for a file.
    """
    check_folder(file)
    if (file.exists() or file.is_symlink()) and not (file.is_file() and is_ours(file)):
        raise in_the_way(file)


def in_the_way(final: Path) -> UserError:
    """Return the error for a file that is there with another content."""
    return UserError(
        f"{final} exists, and holds something else.",
        "What is there is never written over.",
        "Name another file, or use --overwrite (overwrite=True), which keeps the old one beside it.",
    )
