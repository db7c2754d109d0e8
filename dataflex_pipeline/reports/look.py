"""Overview of a table or a run: its kind, the spread of its numbers, examples with their text.

Everything comes as plain values, ready for JSON; a key that does not apply to the table is not there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from dataflex_pipeline.pipeline.base_model import is_base
from dataflex_pipeline.pipeline.output import shown
from dataflex_pipeline.reports.catalogue import RunTable, rounds_of
from dataflex_pipeline.reports.numbers import effective_size, histogram, reasons, spread
from dataflex_pipeline.reports.query import Queries, dictionaries, quoted
from dataflex_pipeline.reports.side_by_side import beside_rows, by_length, by_source
from dataflex_pipeline.store.run import RunFolder
from dataflex_pipeline.training.marker import read_marker

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
    if table.kind == "scores":  # rows that are no candidates of a cascade are valid, without a score
        relation = relation.filter("score is not null")
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


PLACES = ("row", "position", "rank", "line")
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
    if table.kind == "scores":
        found["scored"] = relation.filter("score is not null").aggregate("count(*)").fetchall()[0][0]
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
    if table.kind in ("index", "selection"):
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
        if is_base(ingredients.get("checkpoint")):
            facts["checkpoint"] = "none: of the base model"
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
            "meaning": (field.metadata or {}).get(meaning, b"").decode(errors="replace"),
        }
        for field in schema
    ]


def _of_kind(
    queries: Queries, relation: DuckDBPyRelation, table: RunTable, tables: list[RunTable]
) -> dict[str, Any]:
    if table.kind == "probabilities":
        return _probabilities(relation)
    if table.kind == "selection":
        return _drawn(relation)
    if table.kind == "index":
        return _drawn(relation) | _overlaps(queries, table, tables)
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


def _drawn(relation: DuckDBPyRelation) -> dict[str, Any]:
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


SETTINGS = ("model_name_or_path", "dataset", "eval_dataset", "component_name", "update_times", "seed")


def overview(queries: Queries, run: RunFolder, tables: Sequence[RunTable]) -> dict[str, Any]:
    """Return what a run is, its rounds and its tables, as plain values.

    Args:
        queries: over the tables. run: the run. tables: all of its finished ones.
    """
    configuration, record = run.read()
    return {
        "run": run.folder.name,
        "created": record.get("created"),
        "settings": {name: configuration.get(name) for name in SETTINGS},
        "versions": record.get("versions", {}),
        "rounds": [_round(queries, run, number, tables) for number in rounds_of(run)],
        "tables": [
            {
                "view": table.view,
                "lines": table.n_rows,
                "bytes": table.n_bytes,
                "path": shown(table.path, run.folder),
            }
            for table in tables
        ],
    }


def _round(queries: Queries, run: RunFolder, number: int, tables: Sequence[RunTable]) -> dict[str, Any]:
    of_round = [table for table in tables if table.round == number]
    found: dict[str, Any] = {
        "round": number,
        "scored": [table.name for table in of_round if table.kind == "scores"],
    }
    selection = next((table for table in of_round if table.kind == "selection" and not table.name), None)
    if selection is not None:
        found["method"], found["selected"] = selection.notes().get("method"), selection.n_rows
    index = next((table for table in of_round if table.kind == "index"), None)
    if index is not None:
        found["method"] = index.notes().get("method", "uniform")
        found["positions"] = index.n_rows
        rows = queries.table(index.view).project("row").distinct()
        found["rows"] = rows.aggregate("count(*)").fetchall()[0][0]
        before = next((t for t in tables if t.kind == "index" and t.round == number - 1), None)
        if before is not None:
            found["already_in_round_before"] = shared_rows(queries, index.view, [before.view])["share"]
    probabilities = (t for t in of_round if t.kind == "probabilities" and t.name == found.get("method"))
    for table in probabilities:
        found["effective_sample_size"] = effective_size(queries.table(table.view), "probability")
    marker = read_marker(run.round(number).checkpoint)
    if marker is not None and marker.result is not None:
        found["train_loss"] = marker.result["train_loss"]
        found["target_loss"] = marker.result["metrics"].get("eval_loss")
    return found
