"""Settings of a draw, and its result."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal

import pyarrow as pa

from dataflex_pipeline.errors import ConfigError
from dataflex_pipeline.sampling.uniforms import Integers

Strategy = Literal["sample", "top_k", "round_robin"]
Weights = Literal["uniform", "importance", "probability"]


@dataclass(frozen=True)
class DrawSettings:
    """How rows are selected and laid out as an index.

    Attributes:
        strategy: ``sample`` by probability, ``top_k`` by score, ``round_robin`` over score columns or over
            target rows.
        positions: lines of the index, ``update_step`` x ``global_batch``.
        num_samples: rows to select. fraction: ceil(fraction x valid rows). token_budget: rows in the order
            of selection while the sum of their ``n_tokens`` stays within it. At most one of the three; none
            means ``positions`` rows.
        replacement: draw with replacement (``sample`` only).
        weights: see ``sampling.weights``.
        source_quotas: share of the selected rows (of the tokens, with a budget) per source; the rest comes
            from the sources that are not named.
        shuffle: lay the rows out in a seeded random order; otherwise first selected first.
        seed: of this round and purpose; every stream inside is derived from it.
        group_columns: for ``round_robin``, the score columns that take turns, higher is better.
        over_target_rows: for ``round_robin``, that target rows take turns instead.

    Raises:
        ConfigError: settings that contradict each other or are out of range.
    """

    strategy: Strategy
    positions: int
    num_samples: int | None = None
    fraction: float | None = None
    token_budget: int | None = None
    replacement: bool = False
    weights: Weights = "uniform"
    source_quotas: Mapping[str, float] = field(default_factory=dict)
    shuffle: bool = True
    seed: int = 0
    group_columns: tuple[str, ...] = ()
    over_target_rows: bool = False

    def __post_init__(self) -> None:
        self._check_amounts()
        self._check_quotas()
        self._check_strategy()

    def _check_amounts(self) -> None:
        given = {
            name: getattr(self, name)
            for name in ("num_samples", "fraction", "token_budget")
            if getattr(self, name) is not None
        }
        if len(given) > 1:
            raise ConfigError(
                "Set together: " + ", ".join(f"{name}={value}" for name, value in given.items()) + ".",
                "Each of them says how many rows to select, so only one can hold.",
                "Keep one of num_samples, fraction and token_budget.",
            )
        if self.positions < 1:
            raise ValueError(f"an index needs at least one position, got {self.positions}")
        for name, value in given.items():
            if not value > 0 or (name == "fraction" and value > 1):
                raise ConfigError(
                    f"{name}={value}.",
                    "A selection needs at least one row, and a fraction is a share of the valid rows.",
                    "Set fraction in (0, 1]; num_samples and token_budget to at least 1.",
                )

    def _check_quotas(self) -> None:
        for name, share in self.source_quotas.items():
            if not (math.isfinite(share) and 0 <= share <= 1):
                raise ConfigError(
                    f"source_quotas: {name}={share}.",
                    "A quota is the share of the selected rows that come from this source.",
                    "Give each source a number between 0 and 1.",
                )
        total = sum(map(exact, self.source_quotas.values()), Fraction(0))
        if total > 1 + Fraction(1, 10**9):
            raise ConfigError(
                f"source_quotas sum to {float(total):.6g}.",
                "They are shares of one selection, so they cannot be more than the whole of it.",
                "Lower them to a sum of at most 1; the rest comes from the sources that are not named.",
            )

    def _check_strategy(self) -> None:
        if self.strategy == "sample":
            return
        if self.weights != "uniform":
            raise ConfigError(
                f"weights={self.weights} with strategy={self.strategy}.",
                "That selection is not random: a row is in it for sure or not at all, "
                "so there is no drawing probability to weigh by.",
                "Set weights=uniform, or strategy=sample.",
            )
        if self.replacement:
            raise ConfigError(
                f"replacement=true with strategy={self.strategy}.",
                "That selection takes each row once; only a random draw can return rows.",
                "Set replacement=false, or strategy=sample.",
            )
        if self.strategy == "round_robin" and not self.group_columns and not self.over_target_rows:
            raise ConfigError(
                "strategy=round_robin on scores without group columns.",
                "Groups take turns by their own score columns, and this method has one score only.",
                "Set strategy=top_k, or score with a method that has groups and a target with groups.",
            )


@dataclass(frozen=True)
class Drawn:
    """An index and what there is to say about it.

    Attributes:
        index: ``schemas.INDEX``, ``positions`` lines.
        notices: sentences for the user: what was repeated, cut, or drawn otherwise than asked.
        selected: rows selected, before repeating or cutting, first selected first; a row drawn more than
            once stands here as often. [selected] int64
        n_distinct: different rows in the index.
        tau: the key of the first row not drawn, for one draw without replacement (infinity if every row
            with a probability was drawn); None with replacement, quotas or another strategy.
    """

    index: pa.Table
    notices: tuple[str, ...]
    selected: Integers
    n_distinct: int
    tau: float | None


def exact(share: float) -> Fraction:
    """Return the decimal number that a share was written as, so that 0.07 of 100 is 7 and not a bit more."""
    return Fraction(repr(float(share)))
