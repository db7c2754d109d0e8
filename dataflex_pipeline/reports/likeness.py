"""How alike two runs are: rows selected in common, and the order that their scores give to the pool."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import combinations
from pathlib import Path

import numpy as np

from dataflex_pipeline.reports.records import RunRecord
from dataflex_pipeline.store.parquet import read_whole
from dataflex_pipeline.store.stale import found_ingredients

RANKED_ROWS = 1_000_000
"""Scores are ranked over at most so many rows of the pool, evenly spaced."""


def between_methods(
    groups: Mapping[str, Mapping[int, RunRecord]], measure: Callable[[RunRecord, RunRecord], float | None]
) -> dict[tuple[str, str], float]:
    """Return the mean of a measure between runs of two methods with the same seed."""
    found: dict[tuple[str, str], float] = {}
    for one, other in combinations(groups, 2):
        values = [
            value
            for seed in groups[one]
            if seed in groups[other]
            and (value := measure(groups[one][seed], groups[other][seed])) is not None
        ]
        if values:
            found[one, other] = float(np.mean(values))
    return found


def overlap(one: RunRecord, other: RunRecord, number: int) -> float | None:
    """Return |A and B| / |A or B| over the rows selected in rounds 1..number.

    None where it does not exist: before round 1, or where the runs are of different pools.
    """
    if one.pool(number) != other.pool(number):
        return None
    a, b = (_union(record.selected(r) for r in range(1, number + 1)) for record in (one, other))
    together = len(np.union1d(a, b))
    return len(np.intersect1d(a, b)) / together if together else None


def _union(arrays: Iterable[np.ndarray]) -> np.ndarray:
    pieces = list(arrays)
    return np.unique(np.concatenate(pieces)) if pieces else np.empty(0, dtype=np.int64)


def correlation(one: RunRecord, other: RunRecord, number: int) -> float | None:
    """Return the rank correlation of the scores of a round, each run's by its method; None without both."""
    paths = [record.round(number).scores(record.selected_by(number)) for record in (one, other)]
    return rank_correlation(*paths) if all(path.is_file() for path in paths) else None


def rank_correlation(one: Path, other: Path) -> float | None:
    """Return Spearman's rank correlation of two score tables over the rows that both scored.

    None where it does not exist: a table is constant, or they are of different pools.
    """
    from scipy.stats import spearmanr

    pools = [(found_ingredients(path) or {}).get("pool") for path in (one, other)]
    if pools[0] != pools[1]:
        return None
    a, b = (read_whole(path, ["score"])["score"].to_numpy() for path in (one, other))
    every = -(-len(a) // RANKED_ROWS)
    a, b = a[::every], b[::every]
    both = np.isfinite(a) & np.isfinite(b)
    if both.sum() < 2 or np.ptp(a[both]) == 0 or np.ptp(b[both]) == 0:
        return None
    return float(spearmanr(a[both], b[both]).statistic)
