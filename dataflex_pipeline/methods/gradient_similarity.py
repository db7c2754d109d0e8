"""The base of less and nice: the pool's Adam updates compared with directions of the target.

    score(z) = max over groups g of  sum over terms i of  factor_i <u_i(z), mean over g's target rows of u_i'>

with u_i(z) the unit gradient of pool row z in the table of term i, and u_i' those of the target rows
(gradients/similarity.py). A method says which terms there are, and what their factors are: a checkpoint
each, weighed by its learning rate, or one alone. With ``accumulate`` the terms of the rounds before are
added, as they are in the ``similarity_<group>`` columns of the round before.
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
    group_columns,
    score_columns,
    similarities_before,
    similarity_columns,
    unit_vectors,
    votes,
)
from dataflex_pipeline.sampling.softmax import Softmax


@dataclass(frozen=True)
class Term:
    """One comparison of the pool with the target.

    Attributes:
        pool: name of the pool's table of gradients, as ``needs`` gave it.
        factor: what its similarities are weighed by.
        means: mean unit gradient of each target group that has one. [K] each
    """

    pool: str
    factor: float
    means: Mapping[str, np.ndarray]

    def stacked(self, groups: Sequence[str]) -> np.ndarray:
        """Return the groups' means, zeros for a group that has none. [G, K]"""
        nothing = np.zeros_like(next(iter(self.means.values())))
        return np.stack([self.means.get(group, nothing) for group in groups])


@dataclass(frozen=True)
class Target:
    """What the pool is compared with.

    Attributes:
        groups: names, sorted.
        terms: of each: the name of the pool's table, the factor, and the groups' means [G, K].
        adds: whether the terms of the rounds before are added.
    """

    groups: tuple[str, ...]
    terms: tuple[tuple[str, float, np.ndarray], ...]
    adds: bool


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
        self, terms: Sequence[Term], tables: Mapping[str, api.BlockTable], selection: api.Selection
    ) -> Target:
        """Return what to compare with; name target rows that are also in the pool, and where a sum begins."""
        say_leaks(tables["target"], tables["pool"], selection.say)
        if self.accumulates and selection.round > 1 and not selection.accumulates:
            selection.say(
                f"round {selection.round - 1} has no scores of this method: the sum over rounds starts here"
            )
        groups = tuple(sorted(set().union(*(term.means for term in terms))))
        stacked = tuple((term.pool, term.factor, term.stacked(groups)) for term in terms)
        return Target(groups, stacked, selection.accumulates)

    def own_columns(self, state: Target) -> tuple[pa.Field, ...]:
        """Return one column per group, and the votes where they are counted."""
        own = (VOTES,) if self.params.aggregate == "vote" else ()
        return (*similarity_columns(state.groups, self.meaning), *own)

    def group_columns(self, schema: pa.Schema) -> tuple[str, ...]:
        """Return the groups' columns."""
        return group_columns(schema)

    def score(self, block: api.Block, state: Target) -> Mapping[str, np.ndarray]:
        """Return the largest of the groups' similarities, and each of them."""
        similarity = sum(
            (factor * unit_vectors(block.features[pool]) @ means.T for pool, factor, means in state.terms),
            np.zeros((block.pool.num_rows, len(state.groups))),
        )  # [rows, G]
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
