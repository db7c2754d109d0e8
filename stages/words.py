"""The words of a command without a dash: names of runs or tables, and settings given as key=value."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dataflex_pipeline.errors import UserError


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


def split_subjects(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split ``[NAME]... key=value ...`` into the names and the assignments."""
    names = [word for word in arguments if "=" not in word or _is_there(word)]
    return names, list(parse_assignments([word for word in arguments if word not in names]))


def _is_there(word: str) -> bool:
    """Whether a word is the path of something; a long setting is none that a system would look up."""
    try:
        return Path(word).exists()
    except (OSError, ValueError):
        return False


def with_run(arguments: Sequence[str], run: str | None, *, names: bool = True) -> list[str]:
    """Return the words of a command on one run, the run of --run among them.

    Args:
        arguments: the words without a dash.
        run: of --run.
        names: whether --run is put among the words.

    Raises:
        UserError: the run is named in both ways.
    """
    named, _ = split_subjects(arguments)
    if run is not None and named:
        raise UserError(
            f"The run is given twice: {named[0]} and --run {run}.",
            "The command works on one.",
            "Leave one of them out.",
        )
    return [*([run] if names and run is not None else []), *arguments]


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
