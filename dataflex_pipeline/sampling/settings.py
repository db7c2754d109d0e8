"""Settings of a draw, and its result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import pyarrow as pa

from dataflex_pipeline.config.draw_rules import (
    AMOUNTS,
    check_amounts,
    check_quotas,
    check_similarity,
    check_strategy,
)
from dataflex_pipeline.errors import ConfigError
from dataflex_pipeline.sampling.uniforms import Integers

Strategy = Literal["sample", "top_k", "round_robin"]
Order = Literal["shuffled", "ascending", "descending", "folded"]
Weights = Literal["uniform", "importance", "probability"]


@dataclass(frozen=True)
class DrawSettings:
    """How rows are selected and laid out as an index.

    Attributes:
        strategy: ``sample`` by probability, ``top_k`` by score, ``round_robin`` over score columns or over
            target rows.
        positions: lines of the index, ``update_step`` x ``global_batch``; 0 where nothing is trained, and
            then one of the three that follow says how many rows to select.
        num_samples: rows to select. fraction: ceil(fraction x valid rows). token_budget: rows in the order
            of selection while the sum of their ``n_tokens`` stays within it. At most one of the three; none
            means ``positions`` rows.
        replacement: draw with replacement (``sample`` only).
        weights: see ``sampling.weights``.
        source_quotas: share of the selected rows (of the tokens, with a budget) per source; the rest comes
            from the sources that are not named.
        balanced: the same share for every source, in place of ``source_quotas``; a source that has too few
            rows gives all of them, and the others share the rest.
        shuffle: lay the rows out in a seeded random order; otherwise first selected first.
        seed: of this round and purpose; every stream inside is derived from it.
        group_columns: for ``round_robin``, the score columns that take turns, higher is better.
        over_target_rows: for ``round_robin``, that target rows take turns instead.
        order: of the rows within each pass; by score in place of the random order.
        max_similarity: rows whose embedding has a higher cosine with one already taken are passed over.
        embeddings: fingerprint of those embeddings.

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
    balanced: bool = False
    shuffle: bool = True
    seed: int = 0
    group_columns: tuple[str, ...] = ()
    over_target_rows: bool = False
    order: Order = "shuffled"
    max_similarity: float | None = None
    embeddings: str = ""

    def __post_init__(self) -> None:
        amounts = {name: getattr(self, name) for name in AMOUNTS}
        check_amounts(amounts, self._said)
        check_quotas(self.source_quotas, self._said)
        check_strategy(self.strategy, self.replacement, self.weights, self._said)
        check_similarity(self.max_similarity, self.replacement, self.weights, self._said)
        if self.positions < 0:
            raise ValueError(f"an index has no {self.positions} positions")
        if not self.positions and not any(amounts.values()):
            raise ConfigError(
                "Nothing says how many rows to select.",
                "No round is trained, so there are no training positions to fill.",
                "Set fraction=0.1 (a share of the valid rows), num_samples=N or token_budget=N.",
            )
        for name, value in amounts.items():
            if value is not None and (not value > 0 or (name == "fraction" and value > 1)):
                raise ConfigError(
                    f"{name}={value}.",
                    "A selection needs at least one row, and a fraction is a share of the valid rows.",
                    "Set fraction in (0, 1]; num_samples and token_budget to at least 1.",
                )
        if self.strategy == "round_robin" and not self.group_columns and not self.over_target_rows:
            raise ConfigError(
                "strategy=round_robin on scores without group columns.",
                "Groups take turns by their own score columns, and this method has one score only.",
                "Set strategy=top_k, or score with a method that has groups and a target with groups.",
            )

    def _said(self, name: str) -> str:
        return f"{name}={getattr(self, name)}"


@dataclass(frozen=True)
class Drawn:
    """A selection, the index made from it, and what there is to say about them.

    Attributes:
        selection: ``schemas.SELECTION``, a line per row selected, first selected first.
        index: ``schemas.INDEX``, ``positions`` lines.
        notices: sentences for the user: what was repeated, cut, or drawn otherwise than asked.
        selected: rows selected, before repeating or cutting, first selected first; a row drawn more than
            once stands here as often. [selected] int64
        n_distinct: different rows in the index.
        passed_over: ``schemas.PASSED_OVER`` with ``max_similarity``, else None.
        tau: the key of the first row not drawn, for one draw without replacement (infinity if every row
            with a probability was drawn); None with replacement, quotas or another strategy.
    """

    selection: pa.Table
    index: pa.Table
    notices: tuple[str, ...]
    selected: Integers
    n_distinct: int
    tau: float | None
    passed_over: pa.Table | None = None
