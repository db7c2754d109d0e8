"""NICE: rows whose Adam update raises a reward that has no gradient.

    score(z) = max over groups of  mean over the group's target rows z' of
               cos(g(z'; theta), Gamma(z, theta))

with theta the checkpoint of the round before, Gamma(z, theta) the update that Adam would make from pool row z
(as in LESS), and g(z'; theta) the policy gradient of the reward: the model itself answers the target row's
prompt ``mc_samples`` times, each answer gets a reward, and

    g = (1/S) sum over kept s of A_s grad(- sum_t log p(y_st))

with log p at the temperature that the answers were drawn at and, by default, A_s = R_s minus the mean of the
row's other rewards (gradients/policy.py has the policies and baselines). The mean of cosines is taken
exactly, as one inner product, unless a ``projection`` is set. A target row whose weights are all 0 has no
signal: its cosines are 0, it counts in the mean, and how many there are is said; if no row has a signal, that
is an error.

No learning rate takes part: it would be one factor for all rows. ``accumulate: true`` adds the rounds up as
LESS does, each weighed by its mean learning rate. Answers drawn from a part of the distribution (``top_p``,
``top_k``) come from another one than is differentiated: g is then a biased estimate of the gradient of the
expected reward, which is said.

Source: Wang et al., NICE Data Selection for Instruction Tuning in LLMs with Non-differentiable Evaluation
Metric (ICML 2025). Differences: the round's own checkpoint answers (the model with its adapter, through its
chat template); one checkpoint per selection unless ``accumulate``; a baseline, and log p of the policy that
was drawn from (``baseline: none`` and ``generation_temperature: 1`` are the paper's plain form).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from dataflex_pipeline import api
from dataflex_pipeline.errors import DataError, RunError
from dataflex_pipeline.features.gradients import Gradients
from dataflex_pipeline.features.influence import Influence
from dataflex_pipeline.features.params import (
    DirectionParams,
    DrawnParams,
    GenerationParams,
    GradientParams,
    PolicyChoice,
    PolicyParams,
    ProjectionParams,
    RewardParams,
    TargetPolicy,
)
from dataflex_pipeline.features.policy_gradients import PolicyGradients
from dataflex_pipeline.features.target_directions import TargetDirections
from dataflex_pipeline.methods.gradient_similarity import GradientSimilarity, Side, Target

HARDLY = 0.05
"""Share of the range of all rewards that those of one target row should differ by, at least."""


class Nice(GradientSimilarity):
    """Influence on a reward, by the similarity of gradients and policy gradients."""

    summary = "rows whose Adam update raises the reward of the model's own answers to the target"
    source = "Wang et al. 2025, NICE (ICML)"

    class Params(GradientParams, PolicyParams):
        """Parameters of nice."""

        accumulate: bool = Field(
            False, description="add to the similarities of the rounds before, as LESS does"
        )

    @property
    def meaning(self) -> str:
        """What a group's column holds."""
        mean = "mean cosine with the policy gradients of the group's target rows"
        return f"sum over the selections of mean learning rate x {mean}" if self.accumulates else mean

    def needs(self, selection: api.Selection) -> Mapping[str, api.Need]:
        """Ask for the comparison of the pool with the target's policy gradients at the round before."""
        return self._needs(selection, "group")

    def ranking_needs(self, selection: api.Selection) -> Mapping[str, api.Need]:
        """Ask for the same with a direction for every target row."""
        return self._needs(selection, "row")

    def _needs(self, selection: api.Selection, per: Literal["group", "row"]) -> Mapping[str, api.Need]:
        params, checkpoint, seed = self.params, selection.round - 1, selection.shared_seed
        policy = TargetPolicy(
            **params.part(PolicyChoice),
            generations=DrawnParams(**params.part(GenerationParams), seed=selection.seed),
            rewards=RewardParams(**params.part(RewardParams)),
        )
        if params.exact:
            directions = DirectionParams(per=per, policy=policy)
            exact = Influence.Params.of_pool(params, directions)
            return {
                "pool": api.Need(Influence, "pool", checkpoint, exact),
                "target": api.Need(TargetDirections, "target", checkpoint, directions),
            }
        target = PolicyGradients.Params(
            **params.part(ProjectionParams), **policy.part(TargetPolicy), seed=seed
        )
        return {
            "pool": api.Need(Gradients, "pool", checkpoint, Gradients.Params.of_pool(params, seed)),
            "target": api.Need(PolicyGradients, "target", checkpoint, target),
        }

    def check_target(self, tables: Mapping[str, api.BlockTable]) -> None:
        """Refuse a target without any signal."""
        names = ["min_reward", "max_reward", "signal", "valid"]
        valid, silent = _silent(pa.Table.from_batches(list(tables["target"].blocks(names))))
        if valid.num_rows and silent.num_rows == valid.num_rows:
            raise self._no_signal(silent)

    def begin(self, tables: Mapping[str, api.BlockTable], selection: api.Selection) -> Target:
        """Find the groups of the target; say what the rewards were like."""
        if self.accumulates and selection.learning_rate <= 0:
            raise RunError(
                f"The mean learning rate of round {selection.round - 1} is {selection.learning_rate}.",
                "accumulate: true weighs a round's similarities by it, so they would all be 0.",
                "Set nice.accumulate=false, or choose a schedule that has not reached 0 there.",
            )
        self._say_rewards(tables["target"], selection)
        factor = selection.learning_rate if self.accumulates else 1.0
        return self.towards([Side("pool", "target", factor)], tables, selection)

    def _say_rewards(self, target: api.BlockTable, selection: api.Selection) -> None:
        names = ["mean_reward", "min_reward", "max_reward", "n_scored", "from_reference", "signal", "valid"]
        rows = pa.Table.from_batches(list(target.blocks(names)))
        for line in [*self._drawing_lines(), *self._reward_lines(rows, *_silent(rows))]:
            selection.say(line)

    def _drawing_lines(self) -> list[str]:
        """Return what has to be said of how the answers are drawn."""
        params, lines = self.params, []
        if params.mc_samples == 1 or params.generation_temperature == 0:
            why = (
                "mc_samples: 1 leaves no other answer to compare with"
                if params.mc_samples == 1
                else "generation_temperature: 0 draws the same answer every time (log p is at temperature 1)"
            )
            lines.append(f"baseline: none, since {why}")
        if params.top_p < 1 or params.top_k > 0:
            lines.append(
                f"top_p {params.top_p:g} and top_k {params.top_k} cut the distribution of the answers: the "
                "policy gradient is biased"
            )
        return lines

    def _reward_lines(self, rows: pa.Table, valid: pa.Table, silent: pa.Table) -> list[str]:
        """Return what has to be said of the rewards.

        Args:
            rows: of the target, all; valid: those with a gradient; silent: those of them whose gradient is 0.
        """
        lines, n = [], valid.num_rows
        n_scored = pc.sum(rows.column("n_scored")).as_py() or 0
        if n_scored:
            total = pc.sum(pc.multiply(rows.column("mean_reward"), rows.column("n_scored"))).as_py()
            asked = rows.num_rows * self.params.mc_samples
            lines.append(
                f"mean reward {total / n_scored:.4g} of {n_scored:,} of {asked:,} answers to the target's "
                f"{rows.num_rows:,} prompts"
            )
        own = pc.sum(valid.column("from_reference")).as_py() or 0
        if own:
            lines.append(
                f"{own:,} target rows take the gradient of their own answer: none of their samples passed "
                f"policy: {self.params.policy}"
            )
        if silent.num_rows:
            lines.append(
                f"{silent.num_rows:,} of {n:,} target rows have no signal ({_why_silent(silent)}): their "
                "similarity is 0 with every row, and counts in the mean"
            )
        few, least = _hardly_differing(valid)
        if few:
            lines.append(
                f"the rewards of {few:,} of {n:,} target rows differ by at most {least:.3g}, {HARDLY:.0%} of "
                "the range of all rewards: their directions say little of the reward; a reward that tells "
                "answers apart, more nice.mc_samples or a higher nice.generation_temperature would help"
            )
        return lines

    def _no_signal(self, silent: pa.Table) -> DataError:
        ways = (
            "Set nice.policy=rejection (it falls back to the target's own answers), draw more "
            "(nice.mc_samples), "
            if _n_zero(silent) == silent.num_rows
            else "Draw more (nice.mc_samples, nice.generation_temperature), "
        )
        return DataError(
            f"None of the {silent.num_rows:,} target rows has a signal: for each of them "
            f"{_why_silent(silent)}.",
            "Every policy gradient is then 0, and no row of the pool is better than another.",
            f"{ways}or choose a reward that tells answers apart; the reward table lists them.",
        )

    def by_target_row(
        self, tables: Mapping[str, api.BlockTable], selection: api.Selection
    ) -> api.TargetRanking:
        """Return each target row's cosines with the pool, of this round alone."""
        length = "norm" if self.params.exact else "projected_norm"

        def has_signal(name: str, rows: np.ndarray) -> np.ndarray:
            """A row without signal likes all rows alike."""
            blocks = [block.to_pydict() for block in tables[name].blocks(["row", length])]
            norms = {
                row: norm for each in blocks for row, norm in zip(each["row"], each[length], strict=True)
            }
            return np.array([norms[row] > 0 for row in rows.tolist()], dtype=bool)

        return self.ranked([Side("pool", "target", 1.0)], tables, has_signal)


def _silent(rows: pa.Table) -> tuple[pa.Table, pa.Table]:
    """Return the target rows with a gradient, and those of them whose gradient is 0."""
    valid = rows.filter(rows.column("valid"))
    return valid, valid.filter(pc.invert(valid.column("signal")))


def _n_zero(rows: pa.Table) -> int:
    """Return for how many target rows all rewards are 0."""
    lowest, highest = (rows.column(name).to_numpy() for name in ("min_reward", "max_reward"))
    return int(((lowest == 0) & (highest == 0)).sum())


def _why_silent(silent: pa.Table) -> str:
    """Return why target rows have no signal."""
    zero = _n_zero(silent)
    if zero == silent.num_rows:
        return "all their rewards are 0"
    return "all their rewards are equal" + (f", for {zero:,} of them 0" if zero else "")


def _hardly_differing(valid: pa.Table) -> tuple[int, float]:
    """Return for how many target rows with a signal the rewards hardly differ, and what counts as that."""
    lowest, highest = (valid.column(name).to_numpy() for name in ("min_reward", "max_reward"))
    compared = (valid.column("n_scored").to_numpy() > 1) & valid.column("signal").to_numpy()
    if not len(lowest):
        return 0, 0.0
    least = HARDLY * float(highest.max() - lowest.min())
    return int((compared & (highest - lowest <= least)).sum()), least
