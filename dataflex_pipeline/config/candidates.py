"""Candidates of a cascade: the cheaper method that scores all rows first, and how many of its best."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dataflex_pipeline.config.draw_rules import Said, exact
from dataflex_pipeline.errors import ConfigError, did_you_mean

ENTRIES = ("method", "fraction", "num_samples")
EXAMPLE = "Write candidates: {method: near, fraction: 0.1}, or num_samples in place of fraction."


@dataclass(frozen=True)
class CandidateRule:
    """How candidates are chosen.

    Attributes:
        method: configuration name of the method whose best rows they are.
        fraction: share of the rows that it scored. num_samples: rows. One of the two is None.
    """

    method: str
    fraction: float | None
    num_samples: int | None

    def count(self, n_scored: int) -> int:
        """Return how many of so many scored rows are candidates: at most all of them."""
        if self.num_samples is not None:
            return min(self.num_samples, n_scored)
        return math.ceil(exact(self.fraction or 1.0) * n_scored)

    def plain(self) -> dict[str, Any]:
        """Return what is set, as plain values."""
        if self.num_samples is not None:
            return {"method": self.method, "num_samples": self.num_samples}
        return {"method": self.method, "fraction": self.fraction}


def candidate_rule(candidates: Mapping[str, Any]) -> CandidateRule | None:
    """Return the rule of a checked setting ``candidates``; None where it is empty."""
    if not candidates:
        return None
    return CandidateRule(str(candidates["method"]), candidates.get("fraction"), candidates.get("num_samples"))


def without_other_amount(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return a setting without the amount that gives way to another one laid over it."""
    amounts = {"fraction", "num_samples"}
    return {key: value for key, value in under.items() if not (key in amounts and amounts & set(over))}


def check_candidates(
    candidates: Mapping[str, Any], method: str, amounts: Mapping[str, float | None], said: Said
) -> None:
    """Refuse candidates that cannot be chosen, or that are too few for the selection.

    Args:
        candidates: the setting. method: that scores them.
        amounts: how many rows are to be selected. said: names a setting with its value and place.

    Raises:
        ConfigError: an unknown entry, no method, not exactly one amount, one that is out of range, the method
            itself, or fewer candidates than rows to select.
    """
    if not candidates:
        return
    what = f"{said('candidates')} cannot be used."
    unknown = [name for name in candidates if name not in ENTRIES]
    if unknown:
        hint = did_you_mean(unknown[0], ENTRIES)
        raise ConfigError(what, f"It takes {', '.join(ENTRIES)}, and not '{unknown[0]}'.{hint}", EXAMPLE)
    if not isinstance(candidates.get("method"), str):
        raise ConfigError(what, "It does not name the method whose best rows are the candidates.", EXAMPLE)
    if ("fraction" in candidates) == ("num_samples" in candidates):
        raise ConfigError(what, "Exactly one of fraction and num_samples says how many they are.", EXAMPLE)
    _check_amount(what, candidates)
    _check_method(what, str(candidates["method"]), method)
    _check_enough(candidates, amounts, said)


def _check_amount(what: str, candidates: Mapping[str, Any]) -> None:
    share, rows = candidates.get("fraction", 1.0), candidates.get("num_samples", 1)
    if isinstance(share, str) or not 0 < share <= 1:
        raise ConfigError(what, "Its fraction is a share of the scored rows: above 0, at most 1.", EXAMPLE)
    if not isinstance(rows, int) or rows < 1:
        raise ConfigError(what, "Its num_samples is a whole number of at least 1.", EXAMPLE)


def _check_method(what: str, cheaper: str, method: str) -> None:
    if cheaper == method:
        raise ConfigError(
            what,
            f"{method} scores the rows anyway: it cannot choose its own candidates.",
            "Name a cheaper method in candidates, or leave candidates out.",
        )
    if cheaper == "random":
        raise ConfigError(
            what,
            "random gives every row the same score, so none of them is among its best.",
            "Name a method that ranks rows, such as near or loss.",
        )


def _check_enough(candidates: Mapping[str, Any], amounts: Mapping[str, float | None], said: Said) -> None:
    for name in ("fraction", "num_samples"):
        there, wanted = candidates.get(name), amounts.get(name)
        if there is not None and wanted is not None and wanted > there:
            raise ConfigError(
                f"Set together: {said('candidates')}; {said(name)}.",
                "Rows are selected among the candidates, and there would be fewer of them than that.",
                f"Raise {name} of candidates (several times that of the selection leaves a choice), or lower "
                f"{name}.",
            )
