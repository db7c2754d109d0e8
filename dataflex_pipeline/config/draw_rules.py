"""Rules between the settings of a draw, for a configuration and for the draw itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from fractions import Fraction

from dataflex_pipeline.errors import ConfigError

AMOUNTS = ("num_samples", "fraction", "token_budget")

Said = Callable[[str], str]
"""Names a setting with its value, and where it was set if that is known."""


def check_amounts(amounts: Mapping[str, float | None], said: Said) -> None:
    """Refuse two amounts at once.

    Raises:
        ConfigError: more than one of ``num_samples``, ``fraction`` and ``token_budget`` is set.
    """
    given = [name for name in AMOUNTS if amounts[name] is not None]
    if len(given) > 1:
        raise ConfigError(
            "Set together: " + "; ".join(said(name) for name in given) + ".",
            "Each of them says how many rows to select, so only one can hold.",
            f"Keep one; {given[0]}=null takes one back that a file sets.",
        )


def check_quotas(shares: Mapping[str, float], said: Said) -> None:
    """Refuse quotas that are no shares of one selection.

    Raises:
        ConfigError: one is not from 0 to 1, or together they are more than 1.
    """
    wrong = {name: share for name, share in shares.items() if not (math.isfinite(share) and 0 <= share <= 1)}
    if wrong:
        name, share = next(iter(wrong.items()))
        raise ConfigError(
            f"source_quotas.{name}: {share} cannot be used; set was {said('source_quotas')}.",
            "A quota is the share of the selected rows that come from this source.",
            "Give each source a number from 0 to 1.",
        )
    total = sum(map(exact, shares.values()), Fraction(0))
    if total > 1 + Fraction(1, 10**9):
        raise ConfigError(
            f"The shares sum to {float(total):.6g} in {said('source_quotas')}.",
            "They are shares of one selection, so they cannot be more than the whole of it.",
            "Lower them to a sum of at most 1; the rest comes from the sources that are not named.",
        )


def check_balance(balanced: str | None, shares: Mapping[str, float], said: Said) -> None:
    """Refuse equal shares beside shares that are given.

    Raises:
        ConfigError: both are set.
    """
    if balanced is not None and shares:
        raise ConfigError(
            f"Set together: {said('balanced')}; {said('source_quotas')}.",
            "Both say how many rows each source gives, so only one can hold.",
            "Keep one of them.",
        )


def check_strategy(strategy: str, replacement: bool | None, weights: str, said: Said) -> None:
    """Refuse what only a random draw can do, for a strategy that is none.

    Raises:
        ConfigError: replacement or weights with another strategy than ``sample``.
    """
    if strategy == "sample":
        return
    for name, wrong in (("replacement", replacement), ("weights", weights != "uniform")):
        if wrong:
            raise ConfigError(
                f"Set together: {said('strategy')}; {said(name)}.",
                "That selection is not random: it takes each row once or not at all.",
                f"Set strategy to sample, or leave {name} out.",
            )


def check_similarity(limit: float | None, replacement: bool | None, weights: str, said: Said) -> None:
    """Refuse what a selection of different rows cannot be.

    Raises:
        ConfigError: draws with replacement, or importance weights, beside ``max_similarity``.
    """
    if limit is None:
        return
    if replacement:
        raise ConfigError(
            f"Set together: {said('max_similarity')}; {said('replacement')}.",
            "With replacement a row may come again, and it is like itself.",
            "Leave one of them out.",
        )
    if weights == "importance":
        raise ConfigError(
            f"Set together: {said('max_similarity')}; {said('weights')}.",
            "Importance weights undo how likely a row was drawn, and that is not known where a row can be "
            "passed over for another.",
            "Set weights to uniform or probability, or leave max_similarity out.",
        )


def check_order(order: str, disable_shuffling: bool, said: Said) -> None:
    """Refuse two orders at once.

    Raises:
        ConfigError: an order by score beside ``disable_shuffling``.
    """
    if order != "shuffled" and disable_shuffling:
        raise ConfigError(
            f"Set together: {said('order')}; {said('disable_shuffling')}.",
            "disable_shuffling keeps the order of selection, so only one of them can hold.",
            "Keep one of them.",
        )


def exact(share: float) -> Fraction:
    """Return the decimal number that a share was written as, so that 0.07 of 100 is 7 and not a bit more."""
    return Fraction(repr(float(share)))
