"""LESS: rows whose Adam update points where the target's gradients point.

    score(z) = max over groups of  sum_i eta_i  mean over the group's target rows z' of
               cos(grad l(z'; theta_i), Gamma(z, theta_i))

with theta_i a checkpoint, eta_i the mean learning rate of the steps since the checkpoint before, Gamma(z,
theta) the update that Adam would make from row z, and the target's gradients plain. Both sides are projected
by the same random projection and scaled to length 1 (a zero vector has cosine 0). The sum runs over the
selections so far: each round adds its term to the ``similarity_<group>`` columns of the round before, then
takes the maximum; a round before that was not scored by this method ends the chain. A round's term is that of
the checkpoint at the end of the round before (``checkpoints: last``), or the sum over that one and those kept
inside it (``all``: ``keep_checkpoints``, every ``save_steps`` steps).

Source: Xia et al., LESS: Selecting Influential Data for Targeted Instruction Tuning (2024), sections 3.3,
4.1-4.3. Differences: Adam's update is torch's own, with bias correction (``adam_update: less`` is the
published code's); the learning rate is the mean over the steps of a round rather than of an epoch. Target
rows that take turns (``round_robin_over: target_rows``, not in the paper) rank the pool by this round's term
alone: sums over rounds are kept by group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from dataflex_pipeline import api
from dataflex_pipeline.errors import RunError
from dataflex_pipeline.features.gradients import Gradients
from dataflex_pipeline.features.params import GradientParams
from dataflex_pipeline.gradients.similarity import (
    Softmax,
    group_means,
    say_leaks,
    score_columns,
    similarities_before,
    similarity_columns,
    target_rows,
    unit_vectors,
)


@dataclass(frozen=True)
class Target:
    """What the pool is compared with.

    Attributes:
        groups: names, sorted.
        terms: per checkpoint: the name of the pool's table, eta, and the mean of each group's unit
            gradients [G, K].
        adds: whether the terms of the rounds before are added.
    """

    groups: tuple[str, ...]
    terms: tuple[tuple[str, float, np.ndarray], ...]
    adds: bool


class Less(api.Method):
    """Influence by gradient similarity."""

    summary = "rows whose Adam update agrees with the gradients of the target"
    source = "Xia et al. 2024, LESS (ICML)"
    default_strategy = "top_k"

    class Params(GradientParams):
        """Parameters of less."""

        accumulate: bool = Field(
            True, description="add to the similarities of the rounds before, as the paper does"
        )
        checkpoints: Literal["last", "all"] = Field(
            "last",
            exclude=True,  # the score table names the checkpoints themselves, where there are several
            description="of the round before: its end, or those inside it too (keep_checkpoints, save_steps)",
        )

    @property
    def accumulates(self) -> bool:
        """Whether the terms of the rounds before are added."""
        return bool(self.params.accumulate)

    @property
    def every_checkpoint(self) -> bool:
        """Whether the checkpoints inside the round before count too."""
        return bool(self.params.checkpoints == "all")

    def needs(self, selection: api.Selection) -> Mapping[str, api.Need]:
        """Ask for the gradients of pool and target at the checkpoints of the round before."""
        seed = selection.shared_seed
        pool_side = Gradients.Params.of_pool(self.params, seed)
        target_side = Gradients.Params.of_target(self.params, seed)
        found: dict[str, api.Need] = {}
        for pool, target, one in _checkpoints(selection):
            at = (selection.round - 1, one.step)
            found[pool] = api.Need(Gradients, "pool", at[0], pool_side, at[1])
            found[target] = api.Need(Gradients, "target", at[0], target_side, at[1])
        return found

    def begin(self, tables: Mapping[str, api.BlockTable], selection: api.Selection) -> Target:
        """Average the target's unit gradients by group; name target rows that are also in the pool."""
        checkpoints = _checkpoints(selection)
        if all(one.learning_rate <= 0 for _, _, one in checkpoints):
            raise RunError(
                f"The mean learning rate of round {selection.round - 1} is {selection.learning_rate}.",
                "LESS weighs a checkpoint's similarities by it, so every score would be 0.",
                "Choose a schedule that has not reached 0 there (lr_scheduler_type, warmup_ratio).",
            )
        means = [group_means(tables[target], selection.say) for _, target, _ in checkpoints]
        groups = sorted(set().union(*means))
        terms = [
            (pool, one.learning_rate, _stacked(found, groups))
            for (pool, _, one), found in zip(checkpoints, means, strict=True)
        ]
        say_leaks(tables["target"], tables["pool"], selection.say)
        if self.accumulates and selection.round > 1 and not selection.accumulates:
            selection.say(
                f"round {selection.round - 1} has no scores of this method: the sum over rounds starts here"
            )
        return Target(tuple(groups), tuple(terms), selection.accumulates)

    def own_columns(self, state: Target) -> tuple[pa.Field, ...]:
        """Return one column per group."""
        meaning = "sum over the checkpoints of mean learning rate x mean cosine with the group's target rows"
        return similarity_columns(state.groups, meaning)

    def score(self, block: api.Block, state: Target) -> Mapping[str, np.ndarray]:
        """Return the largest of the groups' similarities, and each of them."""
        similarity = sum(
            (eta * unit_vectors(block.features[pool]) @ means.T for pool, eta, means in state.terms),
            np.zeros((block.pool.num_rows, len(state.groups))),
        )  # [rows, G]
        if state.adds and block.before is not None:
            similarity = similarity + similarities_before(block.before, state.groups)
        return score_columns(similarity, state.groups)

    def fit(self, scores: api.BlockTable, selection: api.Selection) -> Softmax:
        """Look at the extremes of the scores."""
        return Softmax.fit(scores, self.params.temperature)

    def weigh(self, block: pa.RecordBatch, fitted: Softmax) -> np.ndarray:
        """Return the softmax weights of a block."""
        return fitted.weigh(block)

    def by_target_row(
        self, tables: Mapping[str, api.BlockTable], selection: api.Selection
    ) -> api.TargetRanking:
        """Rank the pool by this round's term with each target row alone."""
        if selection.accumulates:
            selection.say(
                "target rows take turns by this round's similarities alone: those of the rounds before are "
                "kept by group"
            )
        found = [
            (pool, one.learning_rate, *target_rows(tables[t])) for pool, t, one in _checkpoints(selection)
        ]
        rows = np.unique(np.concatenate([numbers for _, _, numbers, _ in found]))
        places = [np.searchsorted(rows, numbers) for _, _, numbers, _ in found]

        def values(block: api.Block) -> np.ndarray:
            total = np.zeros((block.pool.num_rows, len(rows)))
            for (pool, eta, _, vectors), at in zip(found, places, strict=True):
                total[:, at] += eta * (unit_vectors(block.features[pool]) @ vectors.T)
            return total

        return api.TargetRanking(rows, values)


def _checkpoints(selection: api.Selection) -> list[tuple[str, str, api.Checkpoint]]:
    """Return the checkpoints to score with, each with the names of its tables of pool and target."""
    checkpoints = selection.checkpoints or (api.Checkpoint(None, selection.learning_rate),)
    ends = ["" if one.step is None else f"-step-{one.step}" for one in checkpoints]
    return [(f"pool{end}", f"target{end}", one) for end, one in zip(ends, checkpoints, strict=True)]


def _stacked(means: Mapping[str, np.ndarray], groups: Sequence[str]) -> np.ndarray:
    """Return the groups' mean vectors, zeros for a group that has none. [G, K]"""
    nothing = np.zeros_like(next(iter(means.values())))
    return np.stack([means.get(group, nothing) for group in groups])
