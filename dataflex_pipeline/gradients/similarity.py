"""How alike the gradients of pool rows and of the target are: what methods on projected gradients share.

With u_z the unit projected gradient of pool row z and u_z' those of the target rows z' (a cosine is then one
dot product; a zero vector has cosine 0):

    similarity_g(z) = mean over the rows z' of target group g of <u_z, u_z'> = <u_z, mean of u_z'>
    score(z) = max over g of similarity_g(z)

so the pool is compared with one vector per group, whatever the size of the target. Tables of gradients have
the columns ``gradient`` (fixed-size list), ``valid``, and for the target ``group``.

Source: Xia et al., LESS: Selecting Influential Data for Targeted Instruction Tuning (2024), sections 4.2-4.3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dataflex_pipeline.api import BlockTable
from dataflex_pipeline.errors import DataError
from dataflex_pipeline.schemas import column
from dataflex_pipeline.store.ranks import column_values, count, order_statistics

PREFIX = "similarity_"
"""Score columns of target groups begin with it."""
LEAKS_SHOWN = 3
TARGET_BLOCK = 256
"""Target rows read at a time."""


def unit_vectors(batch: pa.RecordBatch) -> np.ndarray:
    """Return the unit gradients of a block, zeros where there is none. [rows, K] float64"""
    array = batch.column("gradient")
    flat = array.values.slice(array.offset * array.type.list_size, len(array) * array.type.list_size)
    stored: np.ndarray = flat.to_numpy(zero_copy_only=False).reshape(len(array), array.type.list_size)
    valid = batch.column("valid").to_numpy(zero_copy_only=False)
    return np.where(valid[:, None], stored.astype(np.float64), 0.0)


def group_means(target: BlockTable, say: Callable[[str], None]) -> dict[str, np.ndarray]:
    """Return the mean unit gradient of each target group, groups sorted by name. [K] each

    Args:
        target: gradients of the target rows.
        say: is told which groups are left out because none of their rows has a gradient.

    Raises:
        DataError: no target row has a gradient.
    """
    sums: dict[str, np.ndarray] = {}
    sizes: dict[str, int] = {}
    for block in target.blocks(["gradient", "group", "valid"], TARGET_BLOCK):
        rows = unit_vectors(block)
        names = block.column("group").to_pylist()
        sizes |= {name: 0 for name in names if name not in sizes}
        for position in np.flatnonzero(block.column("valid").to_numpy(zero_copy_only=False)):
            name = names[position]
            sums[name] = sums.get(name, 0.0) + rows[position]
            sizes[name] += 1
    if not sums:
        raise DataError(
            "The target set has no row with a gradient.",
            "Rows are selected towards the gradients of the target.",
            "Give an eval_dataset with usable rows.",
        )
    for name in sorted(set(sizes) - set(sums)):
        say(f"no row of the target group '{name}' has a gradient: the group is left out")
    return {group: sums[group] / sizes[group] for group in sorted(sums)}


def target_rows(target: BlockTable) -> tuple[np.ndarray, np.ndarray]:
    """Return the numbers of the target rows that have a gradient, and their unit gradients.

    Returns:
        Row numbers, rising. [M] int64
        Unit gradients. [M, K] float32
    """
    numbers, vectors = [], []
    for block in target.blocks(["row", "gradient", "valid"], TARGET_BLOCK):
        valid = block.column("valid").to_numpy(zero_copy_only=False)
        numbers.append(block.column("row").to_numpy(zero_copy_only=False)[valid])
        vectors.append(unit_vectors(block)[valid].astype(np.float32))
    return np.concatenate(numbers), np.concatenate(vectors)


def similarity_columns(groups: Sequence[str], meaning: str) -> tuple[pa.Field, ...]:
    """Return one score column per group; ``meaning`` says what it holds, the group's name follows."""
    return tuple(column(PREFIX + group, pa.float64(), f"{meaning} ({group})") for group in groups)


def score_columns(similarity: np.ndarray, groups: Sequence[str]) -> Mapping[str, np.ndarray]:
    """Return ``score``, the largest similarity, and each group's column. similarity: [rows, G]"""
    columns = {PREFIX + group: similarity[:, i] for i, group in enumerate(groups)}
    return {"score": similarity.max(axis=1), **columns}


def similarities_before(before: pa.RecordBatch, groups: Sequence[str]) -> np.ndarray:
    """Return the similarities in a block of the round before's scores, 0 where there is none. [rows, G]"""
    found = np.zeros((before.num_rows, len(groups)))
    for i, group in enumerate(groups):
        if PREFIX + group in before.schema.names:
            values = before.column(PREFIX + group).to_numpy(zero_copy_only=False)
            found[:, i] = np.nan_to_num(values.astype(np.float64))
    return found


@dataclass(frozen=True)
class Softmax:
    """Sampling weights exp(score / (largest |score| x temperature)), the largest weight being 1.

    Attributes:
        largest: the largest score. scale: largest |score| x temperature; 0 where that is too small for a
            float, and only the largest score has a weight.
    """

    largest: float
    scale: float

    @classmethod
    def fit(cls, scores: BlockTable, temperature: float) -> Softmax:
        """Read the extremes of a score table's scores."""
        values = column_values(scores, "score")
        low, high = order_statistics(values, [0, count(values) - 1])
        return cls(high, max(abs(low), abs(high), np.finfo(float).tiny) * temperature)

    def weigh(self, block: pa.RecordBatch) -> np.ndarray:
        """Return the weights of a block of the score table. [rows]"""
        scores = block.column("score").to_numpy(zero_copy_only=False)
        if self.scale == 0:
            return np.where(np.isnan(scores), np.nan, scores == self.largest)
        with np.errstate(over="ignore", under="ignore"):
            weights: np.ndarray = np.exp((scores - self.largest) / self.scale)
        return weights


def say_leaks(target: BlockTable, pool: BlockTable, say: Callable[[str], None]) -> None:
    """Name target rows that are also in the pool: selecting them would be training on the target."""
    by_id = {
        row_id.as_py(): row.as_py()
        for block in target.blocks(["row", "row_id"])
        for row, row_id in zip(block.column("row"), block.column("row_id"), strict=True)
    }
    ids = pa.array(list(by_id), pa.string())
    leaks: list[tuple[int, int]] = []
    for block in pool.blocks(["row", "row_id"]):
        found = block.filter(pc.is_in(block.column("row_id"), ids))
        leaks += [
            (by_id[i.as_py()], r.as_py())
            for r, i in zip(found.column("row"), found.column("row_id"), strict=True)
        ]
    if leaks:
        shown = ", ".join(f"target row {t} = pool row {p}" for t, p in leaks[:LEAKS_SHOWN])
        more = ", ..." if len(leaks) > LEAKS_SHOWN else ""
        say(f"{len(leaks)} rows of the pool are in the target too: {shown}{more}")
