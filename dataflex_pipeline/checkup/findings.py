"""The findings of a check."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from dataflex_pipeline.errors import DataflexError

State = Literal["ok", "warning", "problem"]
Area = Literal["environment", "configuration"]


@dataclass(frozen=True)
class Finding:
    """One line of a checkup.

    Attributes:
        check: what was looked at. state: ok; warning (it runs, and you may not want that); problem (it
            cannot work, or gives wrong results). found: in words. advice: what to do; empty where it is ok.
        area: the machine's environment, or the configuration.
    """

    check: str
    state: State
    found: str
    advice: str = ""
    area: Area = "environment"


def checked(check: str, look: Callable[[], Sequence[Finding]]) -> list[Finding]:
    """Return what a check of the configuration finds; an error that it meets is a problem found."""
    try:
        return list(look())
    except DataflexError as error:
        return [Finding(check, "problem", f"{error.what} {error.why}", error.fix, "configuration")]


def worst(findings: Sequence[Finding]) -> State:
    """Return the worst state of all."""
    states = {finding.state for finding in findings}
    return "problem" if "problem" in states else "warning" if "warning" in states else "ok"
