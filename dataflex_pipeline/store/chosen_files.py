"""Files at a place that the user chose: never inside what a run wrote, never over what is not our own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dataflex_pipeline.errors import UserError
from dataflex_pipeline.store.run import RunFolder


def check_folder(file: Path) -> None:
    """Refuse a file in a folder that is not there, or among the files that a run is made of.

    At the top of a run's folder, beside those, a file does no harm. It holds with --overwrite too: call it
    before anything is set aside.

    Raises:
        UserError: there is no such folder, or a run made it.
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
