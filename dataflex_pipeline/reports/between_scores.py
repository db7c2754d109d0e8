"""How alike the score tables of one run are: of methods in one round, and of one method in two rounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from dataflex_pipeline.reports.catalogue import RunTable
from dataflex_pipeline.reports.likeness import rank_correlation
from dataflex_pipeline.reports.query import Queries, quoted

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
