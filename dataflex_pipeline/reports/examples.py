"""Rows of a table with their text: the best, the worst, and some by chance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dataflex_pipeline.reports.catalogue import RunTable
from dataflex_pipeline.reports.query import Queries, dictionaries, quoted

if TYPE_CHECKING:
    from duckdb import DuckDBPyRelation

RANKED = ("scores", "probabilities", "feature", "table")
FROM_ROWS = ("row", "source", "n_tokens", "messages")


def examples(
    queries: Queries, table: RunTable, tables: Sequence[RunTable], main: str | None, n: int, seed: int
) -> dict[str, Any]:
    """Return example rows under top, bottom and random.

    Args:
        queries: over the run's tables. table: whose rows. tables: of the run, the prepared rows among them.
        main: the column to rank by. n: rows of each kind. seed: which random rows.
    """
    if "row" not in table.schema.names or n < 1:
        return {}
    relation = queries.table(table.view)
    if "valid" in table.schema.names:
        relation = relation.filter("valid")
    columns = ["row", *([quoted(main)] if main is not None else [])]
    relation = relation.project(", ".join(columns))
    chosen: dict[str, Any] = {}
    if table.kind in RANKED and main is not None:
        ranked = relation.filter(f"isfinite({quoted(main)}::double)")
        chosen["top"] = _first(ranked, f"{quoted(main)} desc, row", n)
        chosen["bottom"] = _first(ranked, f"{quoted(main)}, row", n)
    if table.kind == "index":
        relation = relation.distinct()
    chosen["random"] = _first(relation, f"hash(row + {seed}), row", n)
    texts = _texts(queries, table, tables, {line["row"] for lines in chosen.values() for line in lines})
    return {"examples": {name: [_shown(line, main, texts) for line in chosen[name]] for name in chosen}}


def _first(relation: DuckDBPyRelation, order: str, n: int) -> list[dict[str, Any]]:
    return dictionaries(relation.order(order).limit(n))


def _texts(
    queries: Queries, table: RunTable, tables: Sequence[RunTable], rows: set[int]
) -> Mapping[int, dict[str, Any]]:
    split = table.kind if table.kind in ("pool", "target", "test") else table.split
    prepared = next((each for each in tables if each.kind == split), None)
    if prepared is None or not rows:
        return {}
    listed = ", ".join(map(str, sorted(rows)))
    found = queries.table(prepared.view).filter(f"row in ({listed})").project(", ".join(FROM_ROWS))
    return {line["row"]: line for line in dictionaries(found)}


def _shown(line: Mapping[str, Any], main: str | None, texts: Mapping[int, dict[str, Any]]) -> dict[str, Any]:
    value = {} if main is None else {main: line[main]}
    return {
        "row": line["row"],
        **value,
        **{k: v for k, v in texts.get(line["row"], {}).items() if k != "row"},
    }
