"""The progress of long work: the object that it reports to."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Where long work reports to: a progress bar in a terminal, plain lines elsewhere."""

    def start(self, what: str, total: int | None, unit: str, done: int = 0) -> None:
        """Begin a phase of ``total`` units (None: unknown), of which ``done`` exist already."""

    def advance(self, n: int) -> None:
        """Count ``n`` more units as done."""

    def finish(self) -> None:
        """End the phase."""

    def say(self, line: str) -> None:
        """Print one line, whatever phase is running."""


class Silent:
    """A Progress that says nothing, for library use and tests."""

    def start(self, what: str, total: int | None, unit: str, done: int = 0) -> None:
        """Do nothing."""

    def advance(self, n: int) -> None:
        """Do nothing."""

    def finish(self) -> None:
        """Do nothing."""

    def say(self, line: str) -> None:
        """Do nothing."""
