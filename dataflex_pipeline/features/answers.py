"""The model's own answers to a part of the target, weighed: what features of policy gradients share.

Answers and rewards are read from the generations and rewards tables of the same checkpoint; which answers
count and how much is in gradients/policy.py. Samples count by log p at the temperature that they were drawn
at, a row's own answer by log p at temperature 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from dataflex_pipeline import api
from dataflex_pipeline.features.params import JudgedParams, RewardParams, TargetPolicy
from dataflex_pipeline.gradients.policy import (
    SampleWeights,
    WeightedAnswers,
    answer_labels,
    last_answer,
    sample_weights,
)
from dataflex_pipeline.schemas import column

if TYPE_CHECKING:
    from dataflex_pipeline.store.parts import PartedTable

NOT_FINITE = "the loss of a sample or its gradient is not finite"
COLUMNS = (
    column("mean_reward", pa.float64(), "mean reward of the samples that have one"),
    column("min_reward", pa.float64(), "smallest reward of the samples that have one"),
    column("max_reward", pa.float64(), "largest reward of the samples that have one"),
    column("n_scored", pa.int32(), "samples that have a reward"),
    column("n_kept", pa.int32(), "samples that the policy keeps"),
    column("from_reference", pa.bool_(), "whether the row's own answer took the samples' place"),
    column("signal", pa.bool_(), "whether any sample has a weight other than 0"),
)
"""Columns that say what became of a row's samples."""


def answer_needs(policy: TargetPolicy, need: api.Need) -> Mapping[str, api.Need]:
    """Return the needs of the sampled answers and their rewards, at the checkpoint of ``need``."""
    rewards = JudgedParams(
        **policy.rewards.part(RewardParams),
        reference=policy.policy == "hard_rejection",
        generations=policy.generations,
    )
    return {
        "generations": replace(need, feature="generations", kind=None, params=policy.generations),
        "rewards": replace(need, feature="rewards", kind=None, params=rewards),
    }


@dataclass(frozen=True)
class PartAnswers:
    """The answers of the rows of a part.

    Attributes:
        weighing: what each sample weighs, and why a row has no gradient.
        samples, own: the answers that weigh anything, drawn ones and rows' own. temperature: of the samples.
        rewards: mean, smallest and largest reward of each row.
    """

    weighing: SampleWeights
    samples: WeightedAnswers
    own: WeightedAnswers
    temperature: float
    rewards: Mapping[str, pa.Array]

    @property
    def by_temperature(self) -> tuple[tuple[WeightedAnswers, float], ...]:
        """The answers with the temperature that log p is taken at."""
        return (self.samples, self.temperature), (self.own, 1.0)

    def outcome(self, finite: np.ndarray) -> tuple[np.ndarray, list[str | None]]:
        """Return which rows have a gradient, and why the others have none; ``finite``: of theirs. [rows]"""
        reasons = [
            reason or (None if sound else NOT_FINITE)
            for reason, sound in zip(self.weighing.reasons, finite, strict=True)
        ]
        return np.array([reason is None for reason in reasons], dtype=bool), reasons

    def columns(self, kept: np.ndarray) -> dict[str, pa.Array]:
        """Return the columns of `COLUMNS`; ``kept``: the rows that have a gradient. [rows]"""
        weighing = self.weighing
        return {
            **self.rewards,
            "n_scored": pa.array(weighing.n_scored.astype(np.int32)),
            "n_kept": pa.array(weighing.n_kept.astype(np.int32)),
            "from_reference": pa.array(weighing.reference, mask=~kept),
            "signal": pa.array(weighing.reference | (weighing.weights != 0).any(axis=1), mask=~kept),
        }


def read_answers(given: api.FeatureInput, rows: pa.Table, policy: TargetPolicy) -> PartAnswers:
    """Read and weigh the answers of the rows of a part.

    Args:
        given: has the tables ``generations`` and ``rewards``. rows: of the target. policy: what counts.
    """
    generations = _lines(given, "generations", rows, ["prompt", "token_ids", "valid", "reason"])
    rewards = _lines(given, "rewards", rows, ["reward", "reference_reward"])
    values = rewards.column("reward").to_numpy().reshape(rows.num_rows, -1)  # [rows, samples]
    own = rewards.column("reference_reward").to_numpy().reshape(rows.num_rows, -1)[:, 0]
    weighing = sample_weights(values, own, policy.policy, policy.baseline, policy.kept_samples)
    _refuse_invalid(weighing, rows, generations)
    return PartAnswers(
        weighing,
        _samples(weighing, generations),
        _own_answers(weighing, rows),
        policy.generations.policy_temperature,
        _reward_columns(values, weighing),
    )


def numbers(table: pa.Table, name: str, line: int) -> np.ndarray:
    """Return the list in one line of a column of lists of whole numbers. [n] int64"""
    values: np.ndarray = table.column(name)[line].values.to_numpy(zero_copy_only=False).astype(np.int64)
    return values


def _lines(given: api.FeatureInput, name: str, rows: pa.Table, columns: list[str]) -> pa.Table:
    """Return the lines of a table with several lines per row that belong to the rows of a part."""
    table: PartedTable = given.tables[name]
    per_row = table.n_rows // given.table.n_rows
    first = rows.column("row")[0].as_py()
    return table.rows(first * per_row, (first + rows.num_rows) * per_row, columns)


def _reward_columns(values: np.ndarray, weighing: SampleWeights) -> dict[str, pa.Array]:
    """Return mean, smallest and largest reward of each row's scored samples, null without any. [rows] each"""
    scored = ~np.isnan(values)
    none = ~scored.any(axis=1)
    columns = {
        "mean_reward": np.nansum(values, axis=1) / np.maximum(weighing.n_scored, 1),
        "min_reward": values.min(axis=1, where=scored, initial=np.inf),
        "max_reward": values.max(axis=1, where=scored, initial=-np.inf),
    }
    return {name: pa.array(column, mask=none) for name, column in columns.items()}


def _refuse_invalid(weighing: SampleWeights, rows: pa.Table, generations: pa.Table) -> None:
    """Give the rows that were not sent through the model the reason that the tables before had for it."""
    per_row = weighing.weights.shape[1]
    valid = rows.column("valid").to_pylist()
    answered = generations.column("valid").to_numpy().reshape(-1, per_row)
    why = generations.column("reason").to_pylist()
    for row, reason in enumerate(rows.column("reason").to_pylist()):
        if not valid[row] or not answered[row].any():
            weighing.reasons[row] = reason or why[row * per_row]
            weighing.weights[row] = 0.0
            weighing.reference[row] = False


def _samples(weighing: SampleWeights, generations: pa.Table) -> WeightedAnswers:
    """Return the samples that weigh anything: the gradient of one of weight 0 is never taken."""
    per_row = weighing.weights.shape[1]
    answers = []
    for row, sample in np.argwhere(weighing.weights).tolist():
        line = row * per_row + sample
        prompt, answer = (numbers(generations, name, line) for name in ("prompt", "token_ids"))
        answers.append((row, float(weighing.weights[row, sample]), *answer_labels(prompt, answer)))
    return WeightedAnswers.of(answers)


def _own_answers(weighing: SampleWeights, rows: pa.Table) -> WeightedAnswers:
    """Return the rows' own answers where they take the place of the samples."""
    answers = []
    for row in np.flatnonzero(weighing.reference).tolist():
        ids, labels = (numbers(rows, name, row) for name in ("input_ids", "labels"))
        answers.append((row, 1.0, ids, last_answer(labels)))
    return WeightedAnswers.of(answers)
