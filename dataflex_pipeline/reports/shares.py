"""Shares of every source, group and category of the user's own: in the pool, and in what rounds selected."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from dataflex_pipeline.reports.catalogue import RunTable
from dataflex_pipeline.reports.charts import POOL
from dataflex_pipeline.reports.query import Queries, quoted
from dataflex_pipeline.schemas import ORIGINAL

CATEGORIES = 20
"""A column of the user's own counts as a category with at most so many different values."""
NONE = "(none)"


@dataclass(frozen=True)
class Shares:
    """How the rows are spread over the values of one column.

    Attributes:
        column: of the prepared pool.
        names: its values, the most frequent in the pool first.
        counts: the pool and every round, by name -> value -> rows.
    """

    column: str
    names: tuple[str, ...]
    counts: dict[str, dict[str, int]]

    @property
    def title(self) -> str:
        """The column as the user wrote it."""
        return self.column.removeprefix(ORIGINAL)

    def share(self, of: str, names: Sequence[str]) -> float:
        """Return the share that some values have in the pool or in a round; 0 to 1."""
        counts = self.counts[of]
        return sum(counts.get(name, 0) for name in names) / (sum(counts.values()) or 1)

    def lines(self, rounds: Sequence[str]) -> list[dict[str, Any]]:
        """Return lines for `charts.share_chart`, of the pool and of some rounds."""
        return [
            {
                "column": self.column,
                "name": name,
                "of": of,
                "rows": self.counts[of].get(name, 0),
                "share": self.share(of, [name]),
            }
            for name in self.names
            for of in (POOL, *rounds)
        ]


def round_name(number: int | None) -> str:
    """Return what a round is called on the page."""
    return f"round {number}" if number else "warm-up"


def shares(queries: Queries, pool: RunTable, chosen: Sequence[RunTable]) -> list[Shares]:
    """Count every category's rows in the pool and in what each round selected.

    Args:
        queries: over the run's tables. pool: the prepared rows.
        chosen: of each round, the table of its rows.
    """
    found = []
    for column in categories(queries, pool):
        named = f"coalesce({quoted(column)}::varchar, '{NONE}') as name"
        counts = {POOL: _counts(queries.table(pool.view).filter("valid").project(named))}
        for table in chosen:
            rows = queries.table(table.view).project("row")
            joined = rows.join(queries.table(pool.view).project(f"row, {named}"), "row", how="inner")
            counts[round_name(table.round)] = _counts(joined.project("name"))
        names = sorted(counts[POOL], key=lambda name: (-counts[POOL][name], name))
        found.append(Shares(column, tuple(names), counts))
    return found


def categories(queries: Queries, table: RunTable) -> list[str]:
    """Return the text columns of prepared rows with a few different values, more than one."""
    names = [name for name in text_columns(table) if name in ("source", "group") or name.startswith(ORIGINAL)]
    if not names:
        return []
    counts = queries.table(table.view).aggregate(
        ", ".join(f"approx_count_distinct({quoted(n)})" for n in names)
    )
    return [name for name, n in zip(names, counts.fetchall()[0], strict=True) if 1 < n <= CATEGORIES]


def text_columns(table: RunTable) -> list[str]:
    """Return the names of a table's columns of text, and of yes and no."""
    tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_boolean)
    return [field.name for field in table.schema if any(test(field.type) for test in tests)]


def _counts(relation: Any) -> dict[str, int]:
    return dict(relation.aggregate("name, count(*)", "name").fetchall())


def target_values(queries: Queries, found: Shares, target: RunTable | None) -> tuple[str, ...]:
    """Return the values of a category that the target is made of; empty where that says nothing.

    It says something where the target has the column, all of its values are in the pool, and the pool has
    others too.
    """
    if target is None or found.column not in text_columns(target):
        return ()
    rows = queries.table(target.view).filter("valid").project(f"{quoted(found.column)}::varchar as name")
    names = {name for (name,) in rows.distinct().limit(CATEGORIES + 1).fetchall()}
    if not names or not names < set(found.names):
        return ()
    return tuple(name for name in found.names if name in names)
