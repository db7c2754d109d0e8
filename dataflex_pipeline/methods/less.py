"""LESS: rows whose Adam update points where the target's gradients point.

    score(z) = max over groups of  sum_i eta_i  mean over the group's target rows z' of
               cos(grad l(z'; theta_i), Gamma(z, theta_i))

with theta_i a checkpoint, eta_i the mean learning rate of the steps since the checkpoint before, Gamma(z,
theta) the update that Adam would make from row z, and the target's gradients plain (a zero vector has cosine
0). The mean of cosines is one inner product with the group's direction, the mean of its unit gradients, and
is taken exactly; with a ``projection`` both sides are stored as random projections instead. The sum runs over
the selections so far: each round adds its term to the ``similarity_<group>`` columns of the round before,
then takes the maximum; a round before that was not scored by this method ends the chain. A round's term is
that of the checkpoint at the end of the round before (``checkpoints: last``), or the sum over that one and
those kept inside it (``all``: ``keep_checkpoints``, every ``save_steps`` steps).

Source: Xia et al., LESS: Selecting Influential Data for Targeted Instruction Tuning (2024), sections 3.3,
4.1-4.3. Differences: nothing is projected by default; Adam's update is torch's own, with bias correction
(``adam_update: less`` is the published code's); the learning rate is the mean over the steps of a round
rather than of an epoch. Target rows that take turns (``round_robin_over: target_rows``, not in the paper)
rank the pool by this round's term alone: sums over rounds are kept by group.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field

from dataflex_pipeline import api
from dataflex_pipeline.errors import RunError
from dataflex_pipeline.features.gradients import Gradients
from dataflex_pipeline.features.influence import Influence
from dataflex_pipeline.features.params import DirectionParams, GradientParams
from dataflex_pipeline.features.target_directions import TargetDirections
from dataflex_pipeline.methods.gradient_similarity import GradientSimilarity, Side, Target


class Less(GradientSimilarity):
    """Influence by gradient similarity."""

    summary = "rows whose Adam update agrees with the gradients of the target"
    source = "Xia et al. 2024, LESS (ICML)"

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
    def every_checkpoint(self) -> bool:
        """Whether the checkpoints inside the round before count too."""
        return bool(self.params.checkpoints == "all")

    @property
    def meaning(self) -> str:
        """What a group's column holds."""
        return "sum over the checkpoints of mean learning rate x mean cosine with the group's target rows"

    def needs(self, selection: api.Selection) -> Mapping[str, api.Need]:
        """Ask for the comparison of pool and target at the checkpoints of the round before."""
        return self._needs(selection, DirectionParams())

    def ranking_needs(self, selection: api.Selection) -> Mapping[str, api.Need]:
        """Ask for the same with a direction for every target row."""
        return self._needs(selection, DirectionParams(per="row"))

    def _needs(self, selection: api.Selection, directions: DirectionParams) -> Mapping[str, api.Need]:
        params, seed = self.params, selection.shared_seed
        found: dict[str, api.Need] = {}
        for pool, target, one in _checkpoints(selection):
            at = (selection.round - 1, one.step)
            if params.exact:
                exact = Influence.Params.of_pool(params, directions)
                found[pool] = api.Need(Influence, "pool", at[0], exact, at[1])
                found[target] = api.Need(TargetDirections, "target", at[0], directions, at[1])
            else:
                found[pool] = api.Need(
                    Gradients, "pool", at[0], Gradients.Params.of_pool(params, seed), at[1]
                )
                plain = Gradients.Params.of_target(params, seed)
                found[target] = api.Need(Gradients, "target", at[0], plain, at[1])
        return found

    def begin(self, tables: Mapping[str, api.BlockTable], selection: api.Selection) -> Target:
        """Find the groups of the target at each checkpoint."""
        checkpoints = _checkpoints(selection)
        if all(one.learning_rate <= 0 for _, _, one in checkpoints):
            raise RunError(
                f"The mean learning rate of round {selection.round - 1} is {selection.learning_rate}.",
                "LESS weighs a checkpoint's similarities by it, so every score would be 0.",
                "Choose a schedule that has not reached 0 there (lr_scheduler_type, warmup_ratio).",
            )
        return self.towards(_sides(selection), tables, selection)

    def by_target_row(
        self, tables: Mapping[str, api.BlockTable], selection: api.Selection
    ) -> api.TargetRanking:
        """Rank the pool by this round's term with each target row alone."""
        if selection.accumulates:
            selection.say(
                "target rows take turns by this round's similarities alone: those of the rounds before are "
                "kept by group"
            )
        return self.ranked(_sides(selection), tables)


def _sides(selection: api.Selection) -> list[Side]:
    """Return the comparisons: one per checkpoint, weighed by its learning rate."""
    return [Side(pool, target, one.learning_rate) for pool, target, one in _checkpoints(selection)]


def _checkpoints(selection: api.Selection) -> list[tuple[str, str, api.Checkpoint]]:
    """Return the checkpoints to score with, each with the names of its tables of pool and target."""
    checkpoints = selection.checkpoints or (api.Checkpoint(None, selection.learning_rate),)
    ends = ["" if one.step is None else f"-step-{one.step}" for one in checkpoints]
    return [(f"pool{end}", f"target{end}", one) for end, one in zip(ends, checkpoints, strict=True)]
