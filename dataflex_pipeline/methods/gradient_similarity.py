"""The base of less and nice: the pool's Adam updates compared with directions of the target.

    score(z) = max over groups g of  sum over terms i of  factor_i <u_i(z), mean over g's target rows of u_i'>

with u_i(z) the unit gradient of pool row z at the checkpoint of term i, and u_i' those of the target rows
(gradients/similarity.py). With ``projection: none`` the inner products are there, taken exactly while the
gradients existed; else both sides are stored projections. A method says which terms there are, and what their
factors are: a checkpoint each, weighed by its learning rate, or one alone. With ``accumulate`` the terms of
the rounds before are added, as they are in the ``similarity_<group>`` columns of the round before.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from dataflex_pipeline import api
from dataflex_pipeline.data.leaks import say_leaks
from dataflex_pipeline.gradients.similarity import (
    VOTES,
    cosines,
    group_columns,
    group_means,
    score_columns,
    similarities_before,
    similarity_columns,
    target_rows,
    unit_vectors,
    valid_groups,
    valid_target_rows,
    votes,
)
from dataflex_pipeline.sampling.softmax import Softmax


@dataclass(frozen=True)
class Side:
    """One comparison of the pool with the target.

    Attributes:
        pool, target: names of the two tables, as ``needs`` gave them.
        factor: what the similarities are weighed by.
    """

    pool: str
    target: str
    factor: float


@dataclass(frozen=True)
class Term:
    """A comparison, ready to be made.

    Attributes:
        pool: name of the pool's table. factor: what the similarities are weighed by.
        places: where each of its directions stands among those of all terms. [D]
        means: mean unit projected gradient of each; None where the pool's table has the products. [D, K]
    """

    pool: str
    factor: float
    places: np.ndarray
    means: np.ndarray | None

    def add_to(self, total: np.ndarray, block: api.Block) -> None:
        """Add the term of a block's rows. [rows, all directions]"""
        batch = block.features[self.pool]
        if self.means is None:
            total[:, self.places] += self.factor * cosines(batch, len(self.places))
        else:
            total[:, self.places] += self.factor * (unit_vectors(batch) @ self.means.T)


@dataclass(frozen=True)
class Target:
    """What the pool is compared with.

    Attributes:
        groups: names, sorted. terms: the comparisons.
        adds: whether the terms of the rounds before are added.
    """

    groups: tuple[str, ...]
    terms: tuple[Term, ...]
    adds: bool

    def similarities(self, block: api.Block) -> np.ndarray:
        """Return the sum of the terms of a block's rows. [rows, G]"""
        total = np.zeros((block.pool.num_rows, len(self.groups)))
        for term in self.terms:
            term.add_to(total, block)
        return total


class GradientSimilarity(api.Method):
    """What less and nice share.

    The tables ``pool`` and ``target`` are among its needs, ``accumulate`` and ``temperature`` among its
    parameters.
    """

    default_strategy = "top_k"

    @property
    @abstractmethod
    def meaning(self) -> str:
        """What a group's column holds; the group's name follows."""

    @property
    def accumulates(self) -> bool:
        """Whether the terms of the rounds before are added."""
        return bool(self.params.accumulate)

    def towards(
        self, sides: Sequence[Side], tables: Mapping[str, api.BlockTable], selection: api.Selection
    ) -> Target:
        """Return what to compare with; name target rows that are also in the pool, and where a sum begins."""
        say_leaks(tables["target"], tables["pool"], selection.say)
        if self.accumulates and selection.round > 1 and not selection.accumulates:
            selection.say(
                f"round {selection.round - 1} has no scores of this method: the sum over rounds starts here"
            )
        found = [self._by_group(tables[side.target], selection.say) for side in sides]
        groups = tuple(sorted(set().union(*(names for names, _ in found))))
        terms = [
            Term(side.pool, side.factor, np.array([groups.index(name) for name in names]), means)
            for side, (names, means) in zip(sides, found, strict=True)
        ]
        return Target(groups, tuple(terms), selection.accumulates)

    def _by_group(
        self, target: api.BlockTable, say: Callable[[str], None]
    ) -> tuple[list[str], np.ndarray | None]:
        """Return the groups of a table, and their mean unit gradients where they are projected. [D, K]"""
        if self.params.exact:
            return valid_groups(target, say), None
        means = group_means(target, say)
        return list(means), np.stack(list(means.values()))

    def ranked(
        self,
        sides: Sequence[Side],
        tables: Mapping[str, api.BlockTable],
        counts: Callable[[str, np.ndarray], np.ndarray] = lambda target, rows: np.ones(len(rows), dtype=bool),
    ) -> api.TargetRanking:
        """Return how each target row ranks the pool: by the sum of its own terms.

        Args:
            sides: the comparisons. tables: of ``ranking_needs``.
            counts: takes the name of a target table and its rows; says which of them take turns. [M] bool
        """
        found = []
        for side in sides:
            target = tables[side.target]
            numbers, means = (valid_target_rows(target), None) if self.params.exact else target_rows(target)
            found.append((side, numbers, means))
        rows = np.unique(np.concatenate([numbers for _, numbers, _ in found]))
        kept = np.ones(len(rows), dtype=bool)
        terms = []
        for side, numbers, means in found:
            places = np.searchsorted(rows, numbers)
            kept[places] &= counts(side.target, numbers)
            terms.append(Term(side.pool, side.factor, places, means))

        def values(block: api.Block) -> np.ndarray:
            total = np.zeros((block.pool.num_rows, len(rows)))
            for term in terms:
                term.add_to(total, block)
            return total[:, kept]

        return api.TargetRanking(rows[kept], values)

    def own_columns(self, state: Target) -> tuple[pa.Field, ...]:
        """Return one column per group, and the votes where they are counted."""
        own = (VOTES,) if self.params.aggregate == "vote" else ()
        return (*similarity_columns(state.groups, self.meaning), *own)

    def group_columns(self, schema: pa.Schema) -> tuple[str, ...]:
        """Return the groups' columns."""
        return group_columns(schema)

    def score(self, block: api.Block, state: Target) -> Mapping[str, np.ndarray]:
        """Return the largest of the groups' similarities, and each of them."""
        similarity = state.similarities(block)  # [rows, G]
        if state.adds and block.before is not None:
            similarity = similarity + similarities_before(block.before, state.groups)
        return score_columns(similarity, state.groups, self.params.aggregate)

    @property
    def rescores(self) -> bool:
        """Whether votes are counted, once all similarities are there."""
        return bool(self.params.aggregate == "vote")

    def rescore(
        self, scores: api.BlockTable, selection: api.Selection
    ) -> Callable[[pa.RecordBatch], Mapping[str, np.ndarray]]:
        """Count the votes of the groups."""
        return votes(scores, self.params.vote_share)

    def fit(self, scores: api.BlockTable, selection: api.Selection) -> Softmax:
        """Look at the extremes of the scores."""
        return Softmax.fit(scores, self.params.temperature)

    def weigh(self, block: pa.RecordBatch, fitted: Softmax) -> np.ndarray:
        """Return the softmax weights of a block."""
        return fitted.weigh(block)
