"""Errors in three parts: what was set, why it cannot work, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DataflexError(Exception):
    """A failure that we can explain; the command line prints it without a traceback.

    Args:
        what: what was set or found, with its value and place.
        why: the reason why it cannot work.
        fix: what the user can do about it.
    """

    exit_code = 1

    def __init__(self, what: str, why: str, fix: str) -> None:
        super().__init__(f"{what}\n{why}\n{fix}")
        self.what = what
        self.why = why
        self.fix = fix


class UserError(DataflexError):
    """Something that the user set, gave or asked for cannot work (exit code 2)."""

    exit_code = 2


class ConfigError(UserError):
    """A configuration key or value that cannot be used."""


class DataError(UserError):
    """A data set that cannot be read, recognised or used."""


class StaleError(UserError):
    """An output on disk was made from other settings than the present ones."""


class CorruptError(UserError):
    """A file of the run is truncated, foreign or was changed after it was written."""


class RunError(UserError):
    """A command that does not fit the state of the run (order, lock, horizon)."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the nearest known word, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else ""
