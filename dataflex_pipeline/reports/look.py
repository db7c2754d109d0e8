"""One look at a table: what it is, how its numbers are spread, and what belongs to its kind.

Everything comes as plain values, ready for JSON; a key that does not apply to the table is not there.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from dataflex_pipeline.reports.catalogue import RunTable
from dataflex_pipeline.reports.examples import examples
from dataflex_pipeline.reports.numbers import effective_size, histogram, reasons, spread
from dataflex_pipeline.reports.query import Queries, dictionaries, quoted
from dataflex_pipeline.reports.side_by_side import beside_rows, by_length, by_source

if TYPE_CHECKING:
    from duckdb import DuckDBPyRelation

PLACES = ("row", "position")
"""Whole numbers that say which line it is; their spread says nothing."""
MAIN = {"scores": "score", "probabilities": "probability", "pool": "n_tokens", "target": "n_tokens"}
FACTS = ("method", "round", "feature", "split", "params", "draw", "learning_rate", "update_times", "sources")
"""Ingredients that tell a reader something; the others are fingerprints."""


@dataclass(frozen=True)
class Wanted:
    """How much to show. n_examples: rows of each kind. seed: of the random ones."""

    n_examples: int = 3
    seed: int = 0


def look(queries: Queries, table: RunTable, tables: list[RunTable], wanted: Wanted) -> dict[str, Any]:
    """Return all that is to be said about one table.

    Args:
        queries: over the run's tables. table: the one to look at. tables: all of the run's.
        wanted: how much to show.
    """
    relation = queries.table(table.view)
    schema = table.schema
    spreads = [spread(relation, name) for name in numeric_columns(schema)]
    found: dict[str, Any] = {
        "kind": table.kind,
        "view": table.view,
        "name": table.name,
        "path": str(table.path),
        "rows": table.n_rows,
        "bytes": table.n_bytes,
        "facts": _facts(table),
        "columns": _columns(schema),
        "numbers": [each.plain() for each in spreads],
    }
    if "valid" in schema.names:
        found["valid"] = relation.filter("valid").aggregate("count(*)").fetchall()[0][0]
        found["reasons"] = reasons(relation)
    main = main_column(table, [each.column for each in spreads if each.n])
    if main is not None:
        shape = next(each for each in spreads if each.column == main)
        found["histogram"] = {
            "column": main,
            "bins": [asdict(each) for each in histogram(relation, shape)],
        }
    found |= _of_kind(queries, relation, table, tables)
    rows = beside_rows(queries, table, tables)
    if rows is not None:
        found |= by_source(rows, main)
        if main is not None and rows.has_lengths:
            found |= by_length(rows, main)
    return found | examples(queries, table, tables, main, wanted.n_examples, wanted.seed)


def numeric_columns(schema: pa.Schema) -> list[str]:
    """Return the columns that hold numbers and do not only say which line it is."""
    return [
        field.name
        for field in schema
        if (pa.types.is_floating(field.type) or pa.types.is_integer(field.type)) and field.name not in PLACES
    ]


def main_column(table: RunTable, filled: list[str]) -> str | None:
    """Return the column that the table is about: of those with a finite value, or None."""
    if table.kind == "index":
        return next((name for name in ("score", "probability") if name in filled), None)
    floating = [field.name for field in table.schema if pa.types.is_floating(field.type)]
    candidates = [MAIN.get(table.kind, ""), *floating, *filled]
    return next((name for name in candidates if name in filled), None)


def _facts(table: RunTable) -> dict[str, Any]:
    notes, ingredients = table.notes(), table.ingredients()
    facts: dict[str, Any] = {name: ingredients[name] for name in FACTS if name in ingredients}
    if table.kind in ("pool", "target", "test"):
        sources = ingredients.get("sources", [])
        facts["sources"] = [{key: each.get(key) for key in ("name", "format", "rows")} for each in sources]
    facts |= {name: notes[name] for name in ("method", "round") if name in notes}
    if table.kind == "feature":
        facts["checkpoint"] = "of no round here" if table.round is None else f"of round {table.round}"
    if notes.get("notices"):
        facts["notices"] = notes["notices"].splitlines()
    facts |= {name: notes[name] for name in ("fingerprint", "version") if name in notes}
    return facts


def _columns(schema: pa.Schema) -> list[dict[str, str]]:
    meaning = b"description"
    return [
        {
            "column": field.name,
            "type": str(field.type),
            "meaning": (field.metadata or {}).get(meaning, b"").decode(),
        }
        for field in schema
    ]


def _of_kind(
    queries: Queries, relation: DuckDBPyRelation, table: RunTable, tables: list[RunTable]
) -> dict[str, Any]:
    if table.kind == "probabilities":
        return _probabilities(relation)
    if table.kind == "index":
        return _index(relation) | _overlaps(queries, table, tables)
    if table.kind == "target":
        groups = relation.aggregate('"group", count(*) as rows, count(*) filter (valid) as valid', '"group"')
        return {"groups": dictionaries(groups.order('rows desc, "group"'))}
    return {}


def _probabilities(relation: DuckDBPyRelation) -> dict[str, Any]:
    numbers = "sum(probability), max(probability), count(*) filter (probability > 0)"
    total, largest, positive = relation.aggregate(numbers).fetchall()[0]
    return {
        "probability": {
            "sum": total,
            "largest": largest,
            "positive": positive,
            "effective_sample_size": effective_size(relation, "probability"),
        }
    }


def _index(relation: DuckDBPyRelation) -> dict[str, Any]:
    counted = relation.aggregate("row, count(*) as times", "row")
    distinct, most = counted.aggregate("count(*), max(times)").fetchall()[0]
    size = effective_size(relation, "weight")
    return {"drawn": {"distinct": distinct, "most_repeated": most, "effective_sample_size": size}}


def _overlaps(queries: Queries, table: RunTable, tables: list[RunTable]) -> dict[str, Any]:
    """Return how many of the index's different rows each earlier round, and any of them, already had."""
    before = [each for each in tables if each.kind == "index" and (each.round or 0) < (table.round or 0)]
    lines = [
        {"round": each.round, **shared_rows(queries, table.view, [each.view])}
        for each in sorted(before, key=lambda each: -(each.round or 0))
    ]
    if len(before) > 1:
        lines.append({"round": "any before", **shared_rows(queries, table.view, [e.view for e in before])})
    return {"overlap": lines} if lines else {}


def shared_rows(queries: Queries, view: str, others: list[str]) -> dict[str, Any]:
    """Return how many of an index's different rows are in at least one of the others, and their share."""
    seen = " union ".join(f"select row from {quoted(other)}" for other in others)  # noqa: S608
    rows = queries.table(view).project("row").distinct()
    n_rows = rows.aggregate("count(*)").fetchall()[0][0]
    shared = rows.filter(f"row in ({seen})").aggregate("count(*)").fetchall()[0][0]
    return {"rows": shared, "share": shared / n_rows if n_rows else 0.0}
