"""The run or table that a command names as its first word, among settings given as key=value."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dataflex_pipeline.errors import UserError

if TYPE_CHECKING:
    from dataflex_pipeline.pipeline.locate import Options


def split_subject(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """Split ``[NAME] key=value ...`` into the name, None where there is none, and the assignments.

    A word with an equals sign is a setting, unless there is a file or folder of that name.

    Raises:
        UserError: there is more than one name.
    """
    names, settings = split_subjects(arguments)
    if len(names) > 1:
        raise UserError(
            f"Two things are named: {names[0]} and {names[1]}.",
            "The command works on one at a time; settings are given as key=value.",
            "Run it once for each.",
        )
    return (names[0] if names else None), settings


def run_options(
    config: Path | None,
    arguments: Sequence[str],
    run: str | None,
    method: str | None,
    overwrite: bool,
    *,
    begins: bool = False,
) -> Options:
    """Return the options of a command whose first word may be a run: its name, or its folder.

    Args:
        config, run, method, overwrite: as they were given.
        arguments: the words without a dash.
        begins: whether the command can begin a run; the first word then has to be one that is there, so that
            a slip of the pen begins none.

    Raises:
        UserError: the run is named twice, or is none.
    """
    from dataflex_pipeline.pipeline.locate import Options

    named, settings = split_subject(arguments)
    if named is not None:
        if run is not None:
            raise UserError(
                f"The run is given twice: {named} and --run {run}.",
                "The command works on one.",
                "Leave one of them out.",
            )
        if begins and not _is_run(named, settings):
            raise UserError(
                f"The argument '{named}' is not understood.",
                "It is neither a run that is there (a name or a folder) nor a setting, such as "
                "learning_rate=1e-4.",
                f"Write key=value; to begin a run of that name: --run {named}.",
            )
        if Path(named).is_dir():
            settings.append(f"output_dir={named}")
        else:
            run = named
    return Options(config, tuple(settings), run, method, overwrite)


def _is_run(named: str, settings: Sequence[str]) -> bool:
    from dataflex_pipeline.config.load import load_config

    naming = [text for text in settings if text.partition("=")[0].strip() == "runs_dir"]
    below = Path(load_config(None, naming).config.runs_dir) / named
    return any((folder / "run.yaml").is_file() for folder in (Path(named), below))


def split_subjects(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split ``[NAME]... key=value ...`` into the names and the assignments."""
    names = [word for word in arguments if "=" not in word or Path(word).exists()]
    return names, list(parse_assignments([word for word in arguments if word not in names]))


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


def parse_assignments(arguments: Sequence[str]) -> tuple[str, ...]:
    """Check that the free arguments of a command are key=value pairs."""
    for argument in arguments:
        if "=" not in argument:
            raise UserError(
                f"The argument '{argument}' is not understood.",
                "Settings are given as key=value, for example learning_rate=1e-4.",
                "Write key=value, or see --help for the options of this command.",
            )
    return tuple(arguments)
