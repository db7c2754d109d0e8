"""Cosines between the gradients of pool rows and of the target, exact or between projections.

With u_z the unit gradient of pool row z and u_z' those of the target rows z' (a cosine is then one dot
product; a zero vector has cosine 0):

    similarity_g(z) = mean over the rows z' of target group g of <u_z, u_z'> = <u_z, mean of u_z'>
    score(z) = max over g of similarity_g(z)

so the pool is compared with one vector per group, whatever the size of the target. Exact tables (influence)
have ``dots``, the inner products of the row's update with those vectors, and ``norm``, its length. Tables of
projected gradients have ``gradient`` (fixed-size list). Both have ``valid``, and for the target ``group``.

Source: Xia et al., LESS: Selecting Influential Data for Targeted Instruction Tuning (2024), sections 4.2-4.3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np
import pyarrow as pa

from dataflex_pipeline.api import BlockTable
from dataflex_pipeline.config.draw_rules import exact
from dataflex_pipeline.errors import DataError
from dataflex_pipeline.schemas import column
from dataflex_pipeline.store.ranks import column_values, count, order_statistics, places

Aggregate = Literal["max", "mean", "vote"]
VOTES = column("votes", pa.int32(), "target groups that have the row among their best rows")
PREFIX = "similarity_"
"""Score columns of target groups begin with it."""
DIRECTIONS = "directions.safetensors"
"""The file with a target's directions, in the folder of the target_directions feature."""
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
    return {group: sums[group] / sizes[group] for group in _usable(sizes, say)}


def valid_groups(target: BlockTable, say: Callable[[str], None]) -> list[str]:
    """Return the target groups that have a direction, sorted by name: those with a valid row.

    Args:
        target: a line per target row. say: is told which groups are left out.

    Raises:
        DataError: no target row has a gradient.
    """
    sizes: dict[str, int] = {}
    for block in target.blocks(["group", "valid"]):
        for name, valid in zip(block.column("group").to_pylist(), block.column("valid"), strict=True):
            sizes[name] = sizes.get(name, 0) + bool(valid.as_py())
    return _usable(sizes, say)


def _usable(sizes: Mapping[str, int], say: Callable[[str], None]) -> list[str]:
    """Return the groups with a valid row, sorted; ``sizes``: valid rows by group."""
    if not any(sizes.values()):
        raise DataError(
            "The target set has no row with a gradient.",
            "Rows are selected towards the gradients of the target.",
            "Give an eval_dataset with usable rows.",
        )
    for name in sorted(name for name, size in sizes.items() if not size):
        say(f"no row of the target group '{name}' has a gradient: the group is left out")
    return sorted(name for name, size in sizes.items() if size)


def cosines(batch: pa.RecordBatch, count: int) -> np.ndarray:
    """Return a block's exact cosines with the directions, zeros where there are none. [rows, count]

    Args:
        batch: of an influence table. count: directions.
    """
    valid = batch.column("valid").to_numpy(zero_copy_only=False)
    norms = batch.column("norm").to_numpy(zero_copy_only=False)[valid]  # [valid]
    dots = batch.column("dots").flatten().to_numpy(zero_copy_only=False).reshape(len(norms), count)
    found = np.zeros((batch.num_rows, count))
    found[valid] = np.divide(dots, norms[:, None], out=np.zeros_like(dots), where=norms[:, None] > 0)
    return found


def valid_target_rows(target: BlockTable) -> np.ndarray:
    """Return the numbers of the target rows that have a direction of their own, rising. [M] int64"""
    numbers = [block.column("row").filter(block.column("valid")) for block in target.blocks(["row", "valid"])]
    rows: np.ndarray = np.concatenate([each.to_numpy() for each in numbers])
    return rows


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


def group_columns(schema: pa.Schema) -> tuple[str, ...]:
    """Return the columns of a score table that hold one group's similarities each, in its order."""
    return tuple(name for name in schema.names if name.startswith(PREFIX))


def score_columns(
    similarity: np.ndarray, groups: Sequence[str], aggregate: Aggregate = "max"
) -> Mapping[str, np.ndarray]:
    """Return ``score``, and each group's column.

    Args:
        similarity: [rows, G]
        groups: their names. [G]
        aggregate: max: the largest similarity; mean: their mean; vote: the mean, until ``votes``.
    """
    columns = {PREFIX + group: similarity[:, i] for i, group in enumerate(groups)}
    if aggregate == "max":
        return {"score": similarity.max(axis=1), **columns}
    if aggregate == "mean":
        return {"score": similarity.mean(axis=1), **columns}
    return {"score": similarity.mean(axis=1), **columns, VOTES.name: np.zeros(len(similarity), np.int32)}


def votes(scores: BlockTable, share: float) -> Callable[[pa.RecordBatch], Mapping[str, np.ndarray]]:
    """Return the function from a block of a score table to its votes, and to scores that rank by them.

        votes(z) = number of groups that have z among the k best rows, by similarity, ties by row
        score(z) = votes(z) + (mean(z) - lowest mean) / (2 (highest - lowest mean))

    with k = ceil(share x scored rows) and mean(z) that of z's similarities, so that rows of equal votes
    follow their means.

    Args:
        scores: ``score``, which is the mean, and the groups' columns. share: see k.

    Source: Wu et al., ICONS: Influence Consensus for Vision-Language Data Selection (2024), where a task
    votes for the rows above a percentile of its scores. Breaking ties by the mean is ours.
    """
    groups, means = group_columns(scores.schema), column_values(scores, "score", descending=True)
    scored = count(means)
    k = math.ceil(exact(share) * scored)
    last = [places(column_values(scores, name, descending=True), [k - 1])[0] for name in groups]
    highest, lowest = (-value for value in order_statistics(means, [0, scored - 1]))
    width = 2 * (highest - lowest) or 1.0

    def replaced(block: pa.RecordBatch) -> Mapping[str, np.ndarray]:
        rows = block.column("row").to_numpy()
        given = np.zeros(block.num_rows, dtype=np.int32)
        for name, (negated, row) in zip(groups, last, strict=True):
            values = block.column(name).to_numpy(zero_copy_only=False)
            given += (values > -negated) | ((values == -negated) & (rows <= row))
        mean = block.column("score").to_numpy(zero_copy_only=False)
        return {"score": given + (mean - lowest) / width, VOTES.name: given}

    return replaced


def similarities_before(before: pa.RecordBatch, groups: Sequence[str]) -> np.ndarray:
    """Return the similarities in a block of the round before's scores, 0 where there is none. [rows, G]"""
    found = np.zeros((before.num_rows, len(groups)))
    for i, group in enumerate(groups):
        if PREFIX + group in before.schema.names:
            values = before.column(PREFIX + group).to_numpy(zero_copy_only=False)
            found[:, i] = np.nan_to_num(values.astype(np.float64))
    return found
