"""The target rows that a row of the pool is most like, by embeddings and projected gradients of a run.

Both are kept as vectors of length 1, so a cosine is a dot product. Which table of the pool goes with which of
the target, the score tables and the features made from them say: the two stand in one list of what they were
made from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dataflex_pipeline.gradients.similarity import PREFIX, TARGET_BLOCK, unit_vectors
from dataflex_pipeline.neighbours.vectors import block_vectors
from dataflex_pipeline.pipeline.row_search import beginning
from dataflex_pipeline.store.parts import PartedTable
from dataflex_pipeline.store.run import RunFolder
from dataflex_pipeline.store.stale import found_ingredients
from dataflex_pipeline.store.tables import TableFile

NEAREST = 5
"""Target rows of each list."""
Kind = Literal["embeddings", "gradients"]
COLUMN: Mapping[Kind, str] = {"embeddings": "embedding", "gradients": "gradient"}
KINDS: Mapping[str, Kind] = {
    "embeddings": "embeddings",
    "model_embeddings": "embeddings",
    "gradients": "gradients",
    "policy_gradients": "gradients",
}
"""Features that are compared, by what they are."""


@dataclass(frozen=True)
class TargetRow:
    """A row of the target.

    Attributes:
        row: its number in the target.
        similarity: cosine, -1 to 1.
        group: target group.
        source: name of its data set.
        text: the beginning of its conversation.
    """

    row: int
    similarity: float
    group: str
    source: str
    text: str


@dataclass(frozen=True)
class Likeness:
    """The target rows that a row is most like.

    Attributes:
        kind: embeddings or gradients.
        used_by: the scores that compare them, such as "less, round 1".
        rows: the nearest first, ties by row; empty where the row has no vector.
        reason: why it has none; None where it has one.
    """

    kind: Kind
    used_by: tuple[str, ...]
    rows: tuple[TargetRow, ...]
    reason: str | None = None


@dataclass(frozen=True)
class Pair:
    """Two tables of vectors that are compared.

    Attributes:
        kind: embeddings or gradients.
        pool, target: folders of the tables.
    """

    kind: Kind
    pool: Path
    target: Path


def likenesses(run: RunFolder, row: int, notices: list[str], *, taken_anew: bool = False) -> list[Likeness]:
    """Return the target rows that a row is most like, by every pair of tables that the run has.

    Args:
        run: on disk.
        row: of the pool.
        notices: is told what is not there any more.
        taken_anew: gradients that were not kept will be taken.
    """
    users = _users(run, notices, taken_anew)
    return [_likeness(run, pair, labels, row) for pair, labels in users.items()]


def compared(run: RunFolder, notices: list[str]) -> dict[Pair, tuple[str, ...]]:
    """Return the pairs of tables that a run has, each with the scores that compare them.

    Args:
        run: on disk. notices: is told what is not there, or was not kept.
    """
    return _users(run, notices, False)


def _users(run: RunFolder, notices: list[str], taken_anew: bool) -> dict[Pair, tuple[str, ...]]:
    users: dict[Pair, list[str]] = {}
    for label, ingredients, has_groups in _scored(run):
        found = list(_pairs(run, ingredients, label))
        for pair, of in found:
            users.setdefault(pair, []).append(of)
        if has_groups and _is_exact(run, ingredients):
            if taken_anew:
                continue
            notices.append(
                f"{label} compared gradients without keeping any; --gradients (Run.row(N, gradients=True)) "
                "takes them anew and names the target rows that agree most"
            )
        elif has_groups and not any(pair.kind == "gradients" for pair, _ in found):
            notices.append(f"the gradients that {label} compared are not among the run's features")
    for folder in sorted(run.features.glob("*")):
        for pair, _ in _pairs(run, found_ingredients(folder) or {}, ""):
            users.setdefault(pair, [])
    return {pair: tuple(dict.fromkeys(labels)) for pair, labels in users.items()}


def _scored(run: RunFolder) -> Iterator[tuple[str, dict[str, Any], bool]]:
    """Yield name and ingredients of every score table, and whether it has similarities to target groups."""
    for number in run.rounds():
        for path in sorted((run.round(number).folder / "scores").glob("*.parquet")):
            names = TableFile(path).schema.names
            has_groups = any(name.startswith(PREFIX) for name in names)
            yield f"{path.stem}, round {number}", found_ingredients(path) or {}, has_groups


def _pairs(run: RunFolder, ingredients: Mapping[str, Any], label: str) -> Iterator[tuple[Pair, str]]:
    """Yield the pairs that something was made from, those of its features' features too."""
    features = ingredients.get("features") or {}
    for key, fingerprint in features.items():
        folder = _folder(run, fingerprint)
        if folder is None:
            continue
        other = _folder(run, features.get(key.replace("pool", "target", 1))) if "pool" in key else None
        kind = KINDS.get(str((found_ingredients(folder) or {}).get("feature")))
        if kind is not None and other is not None:
            yield Pair(kind, folder, other), label + key.removeprefix("pool").replace("-", " ")
        yield from _pairs(run, found_ingredients(folder) or {}, label)


def _is_exact(run: RunFolder, ingredients: Mapping[str, Any]) -> bool:
    """Whether scores were made without a projection: from tables of influence."""
    folders = [_folder(run, fingerprint) for fingerprint in (ingredients.get("features") or {}).values()]
    made = [found_ingredients(folder) or {} for folder in folders if folder is not None]
    return any(each.get("feature") == "influence" for each in made)


def _folder(run: RunFolder, fingerprint: str | None) -> Path | None:
    """Return the finished feature table of a fingerprint, if it is there."""
    if fingerprint is None:
        return None
    complete = (each for each in run.features.glob(f"*-{fingerprint[:16]}") if PartedTable.is_complete(each))
    return next(complete, None)


def _likeness(run: RunFolder, pair: Pair, used_by: tuple[str, ...], row: int) -> Likeness:
    pool = PartedTable.open(pair.pool)
    line = pool.take(np.array([row]), [COLUMN[pair.kind], "valid", "reason"])
    [batch] = line.combine_chunks().to_batches()
    if not batch.column("valid")[0].as_py():
        return Likeness(pair.kind, used_by, (), batch.column("reason")[0].as_py())
    target = PartedTable.open(pair.target)
    rows, similarities = _nearest(target, pair.kind, _vectors(batch, pair.kind)[0])
    return Likeness(pair.kind, used_by, tuple(described(run, rows, similarities)))


def nearest_target_rows(pair: Pair, rows: np.ndarray, nearest: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the target rows that many rows of the pool are most like.

    Args:
        pair: tables of the pool's vectors and the target's.
        rows: of the pool. [n]
        nearest: how many target rows of each.

    Returns:
        Target rows, the nearest first, ties by row, -1 where there is none; and their cosines. [n, nearest]
    """
    line = PartedTable.open(pair.pool).take(rows, [COLUMN[pair.kind], "valid"])
    [batch] = line.combine_chunks().to_batches()
    valid = batch.column("valid").to_numpy(zero_copy_only=False)
    vectors = np.where(valid[:, None], _vectors(batch, pair.kind), 0).astype(np.float32)  # [n, D]
    found = np.full((len(rows), nearest), -1)
    best = np.full((len(rows), nearest), -np.inf, np.float32)
    for block in PartedTable.open(pair.target).blocks(["row", COLUMN[pair.kind], "valid"], TARGET_BLOCK):
        there = block.column("valid").to_numpy(zero_copy_only=False)
        numbers = block.column("row").to_numpy()[there]
        cosines = vectors @ _vectors(block, pair.kind)[there].astype(np.float32).T  # [n, target rows]
        all_rows = np.concatenate([found, np.broadcast_to(numbers, cosines.shape)], axis=1)
        all_cosines = np.concatenate([best, cosines], axis=1)
        kept = np.argsort(-all_cosines, axis=1, kind="stable")[:, :nearest]
        found = np.take_along_axis(all_rows, kept, axis=1)
        best = np.take_along_axis(all_cosines, kept, axis=1)
    found[~valid] = -1
    return found, best


def _vectors(batch: Any, kind: Kind) -> np.ndarray:
    """Return the vectors of a block; those of rows that are not valid hold anything. [rows, D]"""
    return block_vectors(batch) if kind == "embeddings" else unit_vectors(batch)


def _nearest(target: PartedTable, kind: Kind, vector: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the target rows of the largest cosines and these, the largest first, ties by row."""
    rows, best = np.empty(0, np.int64), np.empty(0)
    for block in target.blocks(["row", COLUMN[kind], "valid"], TARGET_BLOCK):
        valid = block.column("valid").to_numpy(zero_copy_only=False)
        cosines = _vectors(block, kind)[valid].astype(np.float64) @ vector.astype(np.float64)
        numbers = block.column("row").to_numpy()[valid]
        rows, best = best_rows(np.concatenate([rows, numbers]), np.concatenate([best, cosines]))
    return rows, best


def best_rows(rows: np.ndarray, similarities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of the largest similarities and these, the largest first, ties by row."""
    kept = np.lexsort((rows, -similarities))[:NEAREST]
    return rows[kept], similarities[kept]


def described(run: RunFolder, rows: np.ndarray, similarities: np.ndarray) -> Iterator[TargetRow]:
    """Yield target rows with their texts. rows, similarities: [n]"""
    columns = ["row", "source", "group", "messages"]
    target = PartedTable.open(run.split("target"))
    for found, similarity in zip(target.take(rows, columns).to_pylist(), similarities.tolist(), strict=True):
        text = beginning(found["messages"])
        yield TargetRow(found["row"], similarity, found["group"], found["source"], text)
