"""A table beside the prepared rows that its lines belong to: by source, and by length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dataflex_pipeline.reports.catalogue import RunTable
from dataflex_pipeline.reports.query import Queries, dictionaries, quoted

if TYPE_CHECKING:
    from duckdb import DuckDBPyRelation

LENGTH_BINS = 8
FROM_ROWS = ("source", "n_response_tokens")


@dataclass(frozen=True)
class Beside:
    """A table's lines with the source and the length of their rows.

    Attributes:
        relation: the lines, with ``row_source`` and ``row_length`` (response tokens).
        all_rows: the prepared rows themselves; None where the table has a line for each of them.
        has_lengths: whether lengths say anything beside the table's own column.
    """

    relation: DuckDBPyRelation
    all_rows: DuckDBPyRelation | None
    has_lengths: bool


def beside_rows(queries: Queries, table: RunTable, tables: Sequence[RunTable]) -> Beside | None:
    """Put a table beside its rows, or return None where the rows are not there.

    Tables with one line per row in row order are read side by side as streams; others are joined.
    """
    names = ", ".join(
        f"{name} as row_{new}" for name, new in zip(FROM_ROWS, ("source", "length"), strict=True)
    )
    if table.kind in ("pool", "target", "test"):
        own = queries.table(table.view).project(f"*, {names}")
        return Beside(own, None, False)
    rows = next((each for each in tables if each.kind == table.split), None)
    if rows is None or "row" not in table.schema.names:
        return None
    prepared = queries.table(rows.view)
    if rows.n_rows == table.n_rows:
        joined = queries.join_by_position(table.view, rows.view, FROM_ROWS)
        if not joined.filter("row is distinct from other_row").limit(1).fetchall():
            return Beside(joined.project(f"*, {names}"), None, True)
    other = prepared.project(f"row, {names}").set_alias("prepared")
    relation = queries.table(table.view).set_alias("lines").join(other, "row", how="inner")
    return Beside(relation, prepared if table.kind in ("index", "selection") else None, True)


def by_source(beside: Beside, main: str | None) -> dict[str, Any]:
    """Return, per source, the lines, the mean of the main column, and for an index the share in the pool."""
    mean = f", avg({quoted(main)}) as mean" if main is not None else ""
    counted = beside.relation.aggregate(f"row_source as source, count(*) as lines{mean}", "row_source")
    lines = dictionaries(counted.order("lines desc, source"))
    if beside.all_rows is not None:
        pool = beside.all_rows.filter("valid").aggregate("source, count(*) as rows", "source")
        sizes = dict(pool.fetchall())
        total, drawn = sum(sizes.values()), sum(line["lines"] for line in lines)
        for line in lines:
            line["share"] = line["lines"] / drawn
            line["share_of_pool"] = sizes.get(line["source"], 0) / total if total else 0.0
    return {"sources": lines}


def by_length(beside: Beside, main: str) -> dict[str, Any]:
    """Return the main column's mean by the length of the response, and their correlation (Pearson)."""
    value = f"{quoted(main)}::double"
    finite = beside.relation.filter(f"isfinite({value})")
    correlation = finite.aggregate(f"corr({value}, row_length)").fetchall()[0][0]
    numbers = f"row_length as length, count(*) as lines, sum({value}) as total"
    lengths = dictionaries(finite.aggregate(numbers, "row_length").order("length"))
    return {"length": {"correlation": correlation, "bins": merged_lengths(lengths, LENGTH_BINS)}}


def merged_lengths(lengths: Sequence[dict[str, Any]], bins: int) -> list[dict[str, Any]]:
    """Merge neighbouring lengths into at most ``bins`` groups of about as many lines each.

    Args:
        lengths: per length, rising: length, lines, total of the column. bins: groups at most.

    Returns:
        Per group: shortest, longest, lines, mean.
    """
    left = sum(each["lines"] for each in lengths)
    groups: list[dict[str, Any]] = []
    held: list[dict[str, Any]] = []
    for number, each in enumerate(lengths):
        held.append(each)
        lines = sum(one["lines"] for one in held)
        last = number == len(lengths) - 1
        if last or (len(groups) < bins - 1 and lines * (bins - len(groups)) >= left):
            total = sum(one["total"] for one in held)
            span = {"shortest": held[0]["length"], "longest": held[-1]["length"]}
            groups.append({**span, "lines": lines, "mean": total / lines})
            left -= lines
            held = []
    return groups
