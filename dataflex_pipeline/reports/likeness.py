"""Likeness of two runs or two score tables: rows selected in common, and the order given to the pool."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from dataflex_pipeline.reports.catalogue import RunTable
from dataflex_pipeline.reports.query import Queries, quoted
from dataflex_pipeline.reports.records import RunRecord
from dataflex_pipeline.store.stale import found_ingredients
from dataflex_pipeline.store.tables import TableFile, zip_blocks

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
    return ranked_alike(one, other)[1]


def ranked_alike(one: Path, other: Path) -> tuple[int, float | None]:
    """Return how many rows two score tables both scored, and their rank correlation over them.

    Ranks are over at most RANKED_ROWS rows; no more are in memory.
    """
    from scipy.stats import spearmanr

    pools = [(found_ingredients(path) or {}).get("pool") for path in (one, other)]
    if pools[0] != pools[1]:
        return 0, None
    tables = [TableFile(path) for path in (one, other)]
    every = -(-tables[0].n_rows // RANKED_ROWS) or 1
    kept: list[np.ndarray] = [np.empty((2, 0))]  # [2, rows of a block that count]
    n_both = start = 0
    for blocks in zip_blocks(*((table, ["score"]) for table in tables)):
        a, b = (block.column("score").to_numpy(zero_copy_only=False) for block in blocks)
        both = np.isfinite(a) & np.isfinite(b)
        n_both += int(both.sum())
        counted = both & ((start + np.arange(len(a))) % every == 0)
        kept.append(np.stack([a[counted], b[counted]]))
        start += len(a)
    a, b = np.concatenate(kept, axis=1)
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return n_both, None
    return n_both, float(spearmanr(a, b).statistic)


TOP = 0.1
"""Share of the scored rows that counts as a method's best."""


def alike(queries: Queries, scores: Sequence[RunTable], looks: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return, per pair of score tables, Spearman's rank correlation and the share of best rows in common.

    Pairs are methods of one round, and a method in rounds after each other; a table that gives every row the
    same score has no order and is in no pair. The best rows are the TOP with the highest scores, ties by row.

    Args:
        queries: over the run's tables. scores: its score tables. looks: what `look` found, by view.
    """
    ordered = [table for table in scores if not is_constant(looks[table.view])]
    found = []
    for one, other in combinations(ordered, 2):
        after_each_other = one.name == other.name and (other.round or 0) - (one.round or 0) == 1
        if one.round == other.round or after_each_other:
            found.append(
                {
                    "one": f"{one.name}, round {one.round}",
                    "other": f"{other.name}, round {other.round}",
                    "rank_correlation": rank_correlation(one.path, other.path),
                    "best_in_common": _best_in_common(queries, one, other, looks),
                }
            )
    return found


def is_constant(look: Mapping[str, Any]) -> bool:
    """Whether every scored row of a table has the same score, or none has one."""
    spread = next(each for each in look["numbers"] if each["column"] == "score")
    return bool(spread["minimum"] == spread["maximum"])


def _best_in_common(queries: Queries, one: RunTable, other: RunTable, looks: Mapping[str, Any]) -> float:
    scored = min(
        next(each["n"] for each in looks[table.view]["numbers"] if each["column"] == "score")
        for table in (one, other)
    )
    n: int = max(round(scored * TOP), 1)
    best = [
        queries.table(table.view)
        .filter("isfinite(score)")
        .order("score desc, row")
        .limit(n)
        .project(f"row as {quoted(name)}")
        for table, name in ((one, "one"), (other, "other"))
    ]
    counted = best[0].join(best[1], "one = other").aggregate("count(*)").fetchall()
    return int(counted[0][0]) / n
