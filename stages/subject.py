"""The run or table that a command names as its first word, among settings given as key=value."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dataflex_pipeline.errors import UserError
from stages.context import parse_assignments


def split_subject(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """Split ``[NAME] key=value ...`` into the name, None where there is none, and the assignments.

    A word with an equals sign is a setting, unless there is a file or folder of that name.

    Raises:
        UserError: there is more than one name.
    """
    names = [word for word in arguments if "=" not in word or Path(word).exists()]
    if len(names) > 1:
        raise UserError(
            f"Two things are named: {names[0]} and {names[1]}.",
            "The command works on one at a time; settings are given as key=value.",
            "Run it once for each.",
        )
    return (names[0] if names else None), list(
        parse_assignments([word for word in arguments if word not in names])
    )
