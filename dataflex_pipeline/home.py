"""Paths as people write them: ``~`` and ``~user`` stand for a home folder."""

from __future__ import annotations

from pathlib import Path

from dataflex_pipeline.errors import UserError


def expanded(name: str | Path) -> Path:
    """Return a path with the home folder in place of ``~``.

    Raises:
        UserError: it names the home of a user that this system does not know.
    """
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise UserError(
            f"The path '{name}' was named.",
            f"{Path(name).parts[0]} stands for a home folder, and this system knows of none by that name.",
            f"Write the path out, or ./{name} for what is called so here.",
        ) from error
