"""LESS: rows whose Adam update points where the target's gradients point.

    score(z) = max over groups of  sum_i eta_i  mean over the group's target rows z' of
               cos(grad l(z'; theta_i), Gamma(z, theta_i))

with theta_i the checkpoint of selection i, eta_i the mean learning rate of the steps since the selection
before, Gamma(z, theta) the update that Adam would make from row z, and the target's gradients plain. Both
sides are projected by the same random projection and scaled to length 1 (a zero vector has cosine 0). The
sum runs over the selections so far: each round adds its term to the ``similarity_<group>`` columns of the
round before, then takes the maximum; a round before that was not scored by this method ends the chain.

Source: Xia et al., LESS: Selecting Influential Data for Targeted Instruction Tuning (2024), sections 3.3,
4.1-4.3. Differences: Adam's update is torch's own, with bias correction (``adam_update: less`` is the
published code's); the learning rate is the mean over the steps of a round rather than of an epoch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from dataflex_pipeline import api
from dataflex_pipeline.errors import DataError, RunError
from dataflex_pipeline.schemas import column
from dataflex_pipeline.store.ranks import column_values, count, order_statistics

PREFIX = "similarity_"
LEAKS_SHOWN = 3


@dataclass(frozen=True)
class Target:
    """What the pool is compared with.

    Attributes:
        groups: names, sorted. means: mean of each group's unit gradients. [G, K]
        learning_rate: eta of this selection. adds: whether the terms of the rounds before are added.
    """

    groups: tuple[str, ...]
    means: np.ndarray
    learning_rate: float
    adds: bool


class Less(api.Method):
    """Influence by gradient similarity."""

    summary = "rows whose Adam update agrees with the gradients of the target"
    source = "Xia et al. 2024, LESS (ICML)"
    default_strategy = "top_k"

    class Params(api.Params):
        """Parameters of less."""

        gradient_type: Literal["adam", "sgd"] = Field(
            "adam",
            description="the pool's side: Adam's update of each row's gradient, or the gradient itself",
        )
        adam_update: Literal["torch", "less"] = Field(
            "torch",
            description="torch: what the optimizer's next step would do; less: the published code's form",
        )
        proj_dim: int = Field(4096, ge=1, description="dimensions that gradients are projected to")
        projection: Literal["countsketch", "rademacher", "trak"] = Field(
            "countsketch",
            description="the random projection: one signed bucket per coordinate, or dense signs",
        )
        dtype: Literal["float16", "float32"] = Field(
            "float16", description="number format of projected gradients on disk"
        )
        accumulate: bool = Field(
            True, description="add to the similarities of the rounds before, as the paper does"
        )
        temperature: float = Field(
            0.1,
            gt=0,
            description="for strategy: sample, which draws by exp(score / (largest |score| x temperature))",
        )

    @property
    def accumulates(self) -> bool:
        """Whether the terms of the rounds before are added."""
        return bool(self.params.accumulate)

    def needs(self, selection: api.Selection) -> Mapping[str, api.Need]:
        """Ask for the gradients of pool and target at the checkpoint of the round before."""
        shared = {
            "proj_dim": self.params.proj_dim,
            "projection": self.params.projection,
            "dtype": self.params.dtype,
            "seed": selection.seed,
        }
        pool_side = {"side": self.params.gradient_type}
        if self.params.gradient_type == "adam":
            pool_side["adam_update"] = self.params.adam_update
        checkpoint = selection.round - 1
        return {
            "pool": api.Need("gradients", "pool", checkpoint, shared | pool_side),
            "target": api.Need("gradients", "target", checkpoint, shared | {"side": "sgd"}),
        }

    def begin(self, tables: Mapping[str, api.BlockTable], selection: api.Selection) -> Target:
        """Average the target's unit gradients by group; name target rows that are also in the pool."""
        if selection.learning_rate <= 0:
            raise RunError(
                f"The mean learning rate of round {selection.round - 1} is {selection.learning_rate}.",
                "LESS weighs a checkpoint's similarities by it, so every score would be 0.",
                "Choose a schedule that has not reached 0 there (lr_scheduler_type, warmup_ratio).",
            )
        groups, means = group_means(tables["target"])
        _say_leaks(tables, selection)
        if self.accumulates and selection.round > 1 and not selection.accumulates:
            selection.say(
                f"round {selection.round - 1} has no scores of this method: the sum over rounds starts here"
            )
        return Target(groups, means, selection.learning_rate, selection.accumulates)

    def own_columns(self, state: Target) -> tuple[pa.Field, ...]:
        """Return one column per group."""
        meaning = "sum over the selections of mean learning rate x mean cosine with the group's target rows"
        return tuple(column(PREFIX + group, pa.float64(), f"{meaning} ({group})") for group in state.groups)

    def score(self, block: api.Block, state: Target) -> Mapping[str, np.ndarray]:
        """Return the largest of the groups' similarities, and each of them."""
        similarity = state.learning_rate * vectors(block.features["pool"]) @ state.means.T  # [rows, G]
        if state.adds:
            similarity = similarity + _before(block, state.groups)
        columns = {PREFIX + group: similarity[:, i] for i, group in enumerate(state.groups)}
        return {"score": similarity.max(axis=1), **columns}

    def fit(self, scores: api.BlockTable, selection: api.Selection) -> tuple[float, float]:
        """Return the largest score and the scale of the softmax."""
        values = column_values(scores, "score")
        low, high = order_statistics(values, [0, count(values) - 1])
        return high, max(abs(low), abs(high), np.finfo(float).tiny) * self.params.temperature

    def weigh(self, block: pa.RecordBatch, fitted: tuple[float, float]) -> np.ndarray:
        """Return exp((score - largest) / scale)."""
        largest, scale = fitted
        scores = block.column("score").to_numpy(zero_copy_only=False)
        weights: np.ndarray = np.exp((scores - largest) / scale)
        return weights


def vectors(batch: pa.RecordBatch) -> np.ndarray:
    """Return the unit gradients of a block, zeros where there is none. [rows, K] float64"""
    array = batch.column("gradient")
    flat = array.values.slice(array.offset * array.type.list_size, len(array) * array.type.list_size)
    stored: np.ndarray = flat.to_numpy(zero_copy_only=False).reshape(len(array), array.type.list_size)
    valid = batch.column("valid").to_numpy(zero_copy_only=False)
    return np.where(valid[:, None], stored.astype(np.float64), 0.0)


def group_means(target: api.BlockTable) -> tuple[tuple[str, ...], np.ndarray]:
    """Return the group names, sorted, and the mean unit gradient of each. [G, K]

    Raises:
        DataError: no target row has a gradient.
    """
    sums: dict[str, np.ndarray] = {}
    sizes: dict[str, int] = {}
    for block in target.blocks(["gradient", "group", "valid"], 256):
        rows = vectors(block)
        names = block.column("group").to_pylist()
        for position in np.flatnonzero(block.column("valid").to_numpy(zero_copy_only=False)):
            name = names[position]
            sums[name] = sums.get(name, 0.0) + rows[position]
            sizes[name] = sizes.get(name, 0) + 1
    if not sums:
        raise DataError(
            "The target set has no row with a gradient.",
            "LESS selects towards the gradients of the target.",
            "Give an eval_dataset with usable rows.",
        )
    groups = tuple(sorted(sums))
    return groups, np.stack([sums[group] / sizes[group] for group in groups])


def _before(block: api.Block, groups: tuple[str, ...]) -> np.ndarray:
    """Return the accumulated similarities of the round before; 0 where a row had none. [rows, G]"""
    assert block.before is not None  # noqa: S101 (Target.adds says so)
    return np.stack(
        [
            np.nan_to_num(block.before.column(PREFIX + group).to_numpy(zero_copy_only=False))
            for group in groups
        ],
        axis=1,
    )


def _say_leaks(tables: Mapping[str, api.BlockTable], selection: api.Selection) -> None:
    """Name target rows that are also in the pool: selecting them would be training on the target."""
    target = {
        row_id.as_py(): row.as_py()
        for block in tables["target"].blocks(["row", "row_id"])
        for row, row_id in zip(block.column("row"), block.column("row_id"), strict=True)
    }
    ids = pa.array(list(target), pa.string())
    leaks: list[tuple[int, int]] = []
    for block in tables["pool"].blocks(["row", "row_id"]):
        found = block.filter(pc.is_in(block.column("row_id"), ids))
        leaks += [
            (target[i.as_py()], r.as_py())
            for r, i in zip(found.column("row"), found.column("row_id"), strict=True)
        ]
    if leaks:
        shown = ", ".join(f"target row {t} = pool row {p}" for t, p in leaks[:LEAKS_SHOWN])
        more = ", ..." if len(leaks) > LEAKS_SHOWN else ""
        selection.say(f"{len(leaks)} rows of the pool are in the target too: {shown}{more}")
