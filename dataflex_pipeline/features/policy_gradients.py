"""The policy gradients of target rows, projected: the direction in which a reward falls fastest.

The row's sampled answers come from the generations table and their rewards from the rewards table, both of
the same checkpoint; which answers count and how much is in gradients/policy.py. What is kept is what the
gradients feature keeps of a plain gradient: the random projection, scaled to length 1, in columns of the same
names, so that the same cosines can be taken with either. The length before projection is not known: each
answer is projected alone and the sum is over projections.

Samples count by log p at the temperature that they were drawn at, a row's own answer by log p at temperature
1. A row without signal (every weight is 0, such as equal rewards under a baseline, or all rewards 0) is valid
and has the gradient 0: its cosine with anything is 0, and it counts in the mean over the target.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa
from pydantic import Field

from dataflex_pipeline import api
from dataflex_pipeline.features.params import (
    DrawnParams,
    JudgedParams,
    PolicyChoice,
    RewardParams,
    SketchParams,
)
from dataflex_pipeline.gradients.policy import (
    SampleWeights,
    WeightedAnswers,
    answer_labels,
    last_answer,
    sample_weights,
    summed_gradients,
)
from dataflex_pipeline.models.room import Room
from dataflex_pipeline.models.source import number_ingredients
from dataflex_pipeline.models.weights import row_flops
from dataflex_pipeline.schemas import GROUP, REASON, ROW, ROW_ID, VALID, column

if TYPE_CHECKING:
    from dataflex_pipeline.gradients.capture import GradientCapture
    from dataflex_pipeline.gradients.stream import ProjectedGradients
    from dataflex_pipeline.store.parts import PartedTable


class PolicyGradients(api.Feature):
    """Projected policy gradient of every target row at one checkpoint."""

    version = 2
    of_trained_weights = True
    input_columns = ("row", "row_id", "input_ids", "labels", "valid", "reason", "group")

    class Params(SketchParams, PolicyChoice):
        """Parameters of policy_gradients."""

        generations: DrawnParams = Field(
            default_factory=DrawnParams, exclude=True, description="parameters of the generations feature"
        )
        rewards: RewardParams = Field(
            default_factory=RewardParams, exclude=True, description="what judges the answers"
        )

    params: Params

    DTYPES: ClassVar[dict[str, pa.DataType]] = {"float16": pa.float16(), "float32": pa.float32()}

    def __init__(self, params: Any, config: Any) -> None:
        super().__init__(params, config)
        vector = pa.list_(self.DTYPES[params.dtype], params.proj_dim)
        meaning = "projected policy gradient, scaled to length 1 (0 where there is no signal)"
        self.schema = pa.schema(
            [
                ROW,
                ROW_ID,
                column("gradient", vector, meaning),
                column("projected_norm", pa.float32(), "length after projection, before scaling"),
                column("mean_reward", pa.float64(), "mean reward of the samples that have one"),
                column("min_reward", pa.float64(), "smallest reward of the samples that have one"),
                column("max_reward", pa.float64(), "largest reward of the samples that have one"),
                column("n_scored", pa.int32(), "samples that have a reward"),
                column("n_kept", pa.int32(), "samples that the policy keeps"),
                column("from_reference", pa.bool_(), "whether the row's own answer took the samples' place"),
                column("signal", pa.bool_(), "whether any sample has a weight other than 0"),
                GROUP.with_nullable(True),
                VALID,
                REASON,
            ]
        )

    def needs(self, need: api.Need) -> Mapping[str, api.Need]:
        """Ask for the sampled answers and their rewards at the same checkpoint."""
        own = self.params
        rewards = JudgedParams(
            **own.rewards.part(RewardParams),
            reference=own.policy == "hard_rejection",
            generations=own.generations,
        )
        return {
            "generations": replace(need, feature="generations", kind=None, params=own.generations),
            "rewards": replace(need, feature="rewards", kind=None, params=rewards),
        }

    def ingredients(self) -> dict[str, Any]:
        """Return the precision and attention kernel, which move the last digits."""
        return number_ingredients(self.config)

    def row_flops(self, tokens: float) -> float:
        """Return those of a forward and a backward pass over each sample, taken as long as the row itself."""
        return row_flops(self.config, tokens, passes=3 * self.params.generations.mc_samples)

    @contextmanager
    def open(
        self, given: api.FeatureInput, progress: api.Progress
    ) -> Iterator[Callable[[pa.Table], pa.Table]]:
        """Load base and adapter once; yield the function from rows to projected policy gradients."""
        from dataflex_pipeline.gradients.capture import GradientCapture
        from dataflex_pipeline.gradients.projection import make_projection
        from dataflex_pipeline.gradients.stream import ProjectedGradients
        from dataflex_pipeline.models.adapters import load_for_gradients
        from dataflex_pipeline.models.base import resolve_device

        device = resolve_device(self.config.device)
        model = load_for_gradients(self.config, given.checkpoint, device, progress.say)
        projection = make_projection(
            self.params.projection, self.params.proj_dim, self.params.seed, device=device
        )
        consumer = ProjectedGradients(projection)
        with GradientCapture(
            model, consumer, progress.say, checkpointing=self.config.gradient_checkpointing is True
        ) as capture:
            room = Room(self.config.score_batch_tokens, progress.say, capture.save_memory, given.folder)

            def compute(rows: pa.Table) -> pa.Table:
                generations = _lines(given, "generations", rows, ["prompt", "token_ids", "valid", "reason"])
                rewards = _lines(given, "rewards", rows, ["reward", "reference_reward"])
                weighing = self._weigh(rows.num_rows, rewards)
                _refuse_invalid(weighing, rows, generations)
                samples = _samples(weighing, generations)
                own = _own_answers(weighing, rows)
                sums, finite = self._sums(model, capture, consumer, samples, own, rows.num_rows, room)
                return self._table(rows, weighing, _reward_columns(rewards, weighing), sums, finite)

            yield compute

    def _weigh(self, n_rows: int, rewards: pa.Table) -> SampleWeights:
        values = rewards.column("reward").to_numpy().reshape(n_rows, -1)  # [rows, samples]
        own = rewards.column("reference_reward").to_numpy().reshape(n_rows, -1)[:, 0]
        params = self.params
        return sample_weights(values, own, params.policy, params.baseline, params.kept_samples)

    def _sums(
        self,
        model: Any,
        capture: GradientCapture,
        consumer: ProjectedGradients,
        samples: WeightedAnswers,
        own: WeightedAnswers,
        n_rows: int,
        room: Room,
    ) -> tuple[np.ndarray, np.ndarray]:
        shape = (n_rows, self.params.proj_dim)
        sums, finite = np.zeros(shape), np.ones(n_rows, dtype=bool)
        for answers, temperature in ((samples, self.params.generations.policy_temperature), (own, 1.0)):
            part, sound = summed_gradients(
                model, capture, consumer, answers, shape, room, self.params.token_mean, temperature
            )
            sums += part
            finite &= sound
        return sums, finite

    def _table(
        self,
        rows: pa.Table,
        weighing: SampleWeights,
        rewards: dict[str, pa.Array],
        sums: np.ndarray,
        finite: np.ndarray,
    ) -> pa.Table:
        reasons = [
            reason or (None if sound else "the loss of a sample or its gradient is not finite")
            for reason, sound in zip(weighing.reasons, finite, strict=True)
        ]
        kept = np.array([reason is None for reason in reasons], dtype=bool)
        norms = np.linalg.norm(sums, axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            unit = np.where((kept & (norms > 0))[:, None], sums / norms[:, None], 0.0)
        flat = pa.array(unit.astype(np.dtype(self.params.dtype)).reshape(-1), self.DTYPES[self.params.dtype])
        missing = ~kept
        columns = {
            "row": rows.column("row"),
            "row_id": rows.column("row_id"),
            "gradient": pa.FixedSizeListArray.from_arrays(flat, self.params.proj_dim, mask=pa.array(missing)),
            "projected_norm": pa.array(norms.astype(np.float32), mask=missing),
            **rewards,
            "n_scored": pa.array(weighing.n_scored.astype(np.int32)),
            "n_kept": pa.array(weighing.n_kept.astype(np.int32)),
            "from_reference": pa.array(weighing.reference, mask=missing),
            "signal": pa.array(weighing.reference | (weighing.weights != 0).any(axis=1), mask=missing),
            "group": rows.column("group"),
            "valid": pa.array(kept),
            "reason": pa.array(reasons, pa.string()),
        }
        return pa.table([columns[name] for name in self.schema.names], schema=self.schema)


def _lines(given: api.FeatureInput, name: str, rows: pa.Table, columns: list[str]) -> pa.Table:
    """Return the lines of a table with several lines per row that belong to the rows of a part."""
    table: PartedTable = given.tables[name]
    per_row = table.n_rows // given.table.n_rows
    first = rows.column("row")[0].as_py()
    return table.rows(first * per_row, (first + rows.num_rows) * per_row, columns)


def _reward_columns(rewards: pa.Table, weighing: SampleWeights) -> dict[str, pa.Array]:
    """Return mean, smallest and largest reward of each row's scored samples, null without any. [rows] each"""
    values = rewards.column("reward").to_numpy().reshape(weighing.weights.shape)
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
        prompt, answer = (_numbers(generations, name, line) for name in ("prompt", "token_ids"))
        answers.append((row, float(weighing.weights[row, sample]), *answer_labels(prompt, answer)))
    return WeightedAnswers.of(answers)


def _own_answers(weighing: SampleWeights, rows: pa.Table) -> WeightedAnswers:
    """Return the rows' own answers where they take the place of the samples."""
    answers = []
    for row in np.flatnonzero(weighing.reference).tolist():
        ids, labels = (_numbers(rows, name, row) for name in ("input_ids", "labels"))
        answers.append((row, 1.0, ids, last_answer(labels)))
    return WeightedAnswers.of(answers)


def _numbers(table: pa.Table, name: str, line: int) -> np.ndarray:
    values: np.ndarray = table.column(name)[line].values.to_numpy(zero_copy_only=False).astype(np.int64)
    return values
