"""The folders of the finished runs that a command reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dataflex_pipeline.errors import UserError

from .words import split_subjects


def run_folders(arguments: Sequence[str]) -> list[Path]:
    """Return the folders of the runs that are named, each a folder or a name below ``runs_dir``.

    Raises:
        UserError: a setting other than runs_dir is given; it would change nothing.
    """
    from dataflex_pipeline.config.load import load_config

    names, settings = split_subjects(arguments)
    other = [text for text in settings if text.partition("=")[0].strip() != "runs_dir"]
    if other:
        raise UserError(
            f"The setting {other[0]} was given.",
            "This command reads finished runs; no setting changes what they are.",
            "Leave it out. runs_dir=FOLDER says where runs are named from.",
        )
    runs_dir = Path(load_config(None, settings).config.runs_dir)
    return [Path(name) if (Path(name) / "run.yaml").is_file() else runs_dir / name for name in names]


def run_folder(arguments: Sequence[str], what: str, fix: str) -> Path:
    """Return the folder of the one run that is named.

    Args:
        arguments: the words of the command.
        what: it makes of a run, as in "A report".
        fix: how to name one.

    Raises:
        UserError: none or several are named, or another setting than runs_dir is given.
    """
    folders = run_folders(arguments)
    if len(folders) != 1:
        raise UserError(f"{len(folders)} runs were named.", f"{what} is of one run.", fix)
    return folders[0]
