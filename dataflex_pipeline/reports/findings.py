"""Findings of a report on a run: rounds, curves, scores, what was selected, examples, overlaps, warnings.

Everything is plain values, counted over tables as streams, so that a run of any size gives a page of the
same size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import pyarrow as pa

from dataflex_pipeline.data.rows import rows_said
from dataflex_pipeline.reports.catalogue import RunTable, tables_of
from dataflex_pipeline.reports.likeness import alike
from dataflex_pipeline.reports.look import Wanted, look, shared_rows
from dataflex_pipeline.reports.numbers import spread
from dataflex_pipeline.reports.query import Queries, open_queries, quoted
from dataflex_pipeline.reports.records import PER_ROUND, RunRecord
from dataflex_pipeline.store.parquet import corrupt
from dataflex_pipeline.store.versions import changes_between_rounds

EXAMPLES = 3
CATEGORIES = 20
"""A column of the user's own counts as a category with at most so many different values."""


def findings(record: RunRecord) -> dict[str, Any]:
    """Return everything that a report shows of one run.

    Raises:
        CorruptError: a table of the run is damaged.
    """
    tables = tables_of(record.run)
    indexed = {table.round for table in tables if table.kind == "index"}
    for number in record.markers:
        if number not in indexed:
            raise corrupt(record.round(number).index, "it is not there, and the round was trained on it")
    with open_queries(tables) as queries:
        looks = {
            t.view: look(queries, t, tables, Wanted(EXAMPLES)) for t in tables if t.kind != "probabilities"
        }
        scores = [table for table in tables if table.kind == "scores"]
        chosen = _chosen(tables)
        return {
            "name": record.name,
            "facts": _facts(record, looks),
            "rounds": [_round(record, number, scores, looks) for number in record.rounds],
            "log": record.log,
            "first_steps": [record.step(number - 1) + 1 for number in record.markers if number],
            "scores": [looks[table.view] for table in scores],
            "selected": _selected(queries, tables, chosen),
            "lengths": _lengths(queries, chosen),
            "evaluations": [asdict(f) | {"round": n} for n in record.markers for f in record.evaluated(n)],
            "alike": alike(queries, scores, looks),
            "repeated": _repeated(queries, chosen),
            "warnings": _warnings(record, looks, {table.view: table.split for table in tables}),
            "settings": record.settings,
            "provenance": record.record,
        }


def _chosen(tables: Sequence[RunTable]) -> list[RunTable]:
    """Return, of each round, the table of the rows that it trained on, or else of those selected."""
    found = {t.round: t for t in tables if t.kind == "selection" and not t.name}
    found |= {t.round: t for t in tables if t.kind == "index"}
    return [found[number] for number in sorted(found, key=lambda number: number or 0)]


def _look_of(looks: Mapping[str, Any], number: int) -> Any:
    """Return the look at the rows of a round: its index, or where it has none its selection."""
    return looks.get(f"idx_{number}") or looks[f"selection_{number}"]


def _facts(record: RunRecord, looks: Mapping[str, Any]) -> dict[str, Any]:
    last = record.markers.get(record.last)
    by = [_look_of(looks, number)["facts"]["method"] for number in record.rounds if number]
    facts = {
        "selected by": ", ".join(dict.fromkeys(by)) or f"nothing yet; set to {record.method}",
        "model": record.settings["model_name_or_path"],
        "pool": f"{looks['pool']['valid']:,} usable rows of {looks['pool']['rows']:,}",
        "rounds": _rounds_said(record),
        "trained": "nothing" if last is None else f"{last.step:,} steps of {record.global_batch} rows",
        "seed": record.seed,
    }
    if "target" in looks:
        facts["target"] = f"{looks['target']['valid']:,} usable rows of {looks['target']['rows']:,}"
    best = ((last.result if last is not None else None) or {}).get("best")
    if best:
        facts["best"] = f"{best['metric']} {best['value']:.4f} in round {best['round']}, step {best['step']}"
    return facts


def _rounds_said(record: RunRecord) -> str:
    if not record.settings["update_times"] or not record.settings["update_step"]:
        return "scored and selected only"
    warmup = ", and the warm-up" if record.settings["warmup_step"] else ", without a warm-up"
    return f"{record.last} of {record.settings['update_times']}{warmup}"


def _round(
    record: RunRecord, number: int, scores: Sequence[RunTable], looks: Mapping[str, Any]
) -> dict[str, Any]:
    """Return a round as it went: what scored it, what was selected, how it trained, seconds of each."""
    marker = record.markers.get(number)
    result = (marker.result if marker is not None else None) or {}
    took: dict[str, float] = {}
    for entry in record.history:
        if entry.get("round") == number:  # a stage that was killed or repeated has several entries
            for what in (entry["stage"], f"{entry['stage']} {entry.get('method')}"):
                took[what] = took.get(what, 0.0) + entry["seconds"]
    index = _look_of(looks, number)
    return {
        "number": number,
        "scored": [(t.name, took.get(f"score {t.name}")) for t in scores if t.round == number],
        "selected_by": index["facts"].get("method"),
        "trained": marker is not None,
        "positions": index["rows"],
        "different": index["drawn"]["distinct"],
        "seconds": {stage: took.get(stage) for stage in PER_ROUND},
        "steps": result.get("steps"),
        "train_loss": result.get("train_loss"),
        "target_loss": result.get("metrics", {}).get("eval_loss"),
        "learning_rate": result.get("mean_learning_rate"),
        "stopped_early": result.get("stopped_early"),
    }


def _selected(
    queries: Queries, tables: Sequence[RunTable], chosen: Sequence[RunTable]
) -> list[dict[str, Any]]:
    """Return, for sources and for every category of the user's own, the shares in the pool and by round."""
    pool = next(table for table in tables if table.kind == "pool")
    found = []
    for column in _categories(queries, pool):
        by_round = {"pool": _shares(queries.table("pool").filter("valid").project(_named(column)))}
        for table in chosen:
            joined = (
                queries.table(table.view)
                .project("row")
                .join(queries.table("pool").project(f"row, {_named(column)}"), "row", how="inner")
            )
            by_round[f"round {table.round}" if table.round else "warm-up"] = _shares(joined.project("name"))
        names = sorted(by_round["pool"], key=lambda name: -by_round["pool"][name])
        found.append({"column": column, "names": names, "series": by_round})
    return found


def _named(column: str) -> str:
    return f"coalesce({quoted(column)}::varchar, '(none)') as name"


def _categories(queries: Queries, pool: RunTable) -> list[str]:
    """Return the text columns of the pool with a few different values, more than one."""
    texts = (pa.types.is_string, pa.types.is_large_string, pa.types.is_boolean)
    names = [
        field.name
        for field in pool.schema
        if (field.name == "source" or field.name.startswith("original_"))
        and any(is_text(field.type) for is_text in texts)
    ]
    counts = queries.table("pool").aggregate(", ".join(f"approx_count_distinct({quoted(n)})" for n in names))
    return [name for name, n in zip(names, counts.fetchall()[0], strict=True) if 1 < n <= CATEGORIES]


def _shares(relation: Any) -> dict[str, float]:
    lines = dict(relation.aggregate("name, count(*)", "name").fetchall())
    total = sum(lines.values())
    return {name: n / total for name, n in lines.items()}


def _lengths(queries: Queries, chosen: Sequence[RunTable]) -> list[dict[str, Any]]:
    """Return quantiles of the response tokens: of the pool, and of what each round selected."""
    pool = queries.table("pool").filter("valid").project("row, n_response_tokens")
    found = [{"of": "pool", **spread(pool, "n_response_tokens").plain()}]
    for table in chosen:
        rows = queries.table(table.view).project("row").distinct().join(pool, "row", how="inner")
        name = f"round {table.round}" if table.round else "warm-up"
        found.append({"of": name, **spread(rows, "n_response_tokens").plain()})
    return found


def _repeated(queries: Queries, chosen: Sequence[RunTable]) -> list[dict[str, Any]]:
    """Return how much of each round's rows the round before had too, and any before."""
    found = []
    for place, table in enumerate(chosen[1:], start=1):
        before = [each.view for each in chosen[:place]]
        shares = (shared_rows(queries, table.view, views)["share"] for views in (before[-1:], before))
        found.append({"round": table.round, **dict(zip(("before", "any_before"), shares, strict=True))})
    return found


def _warnings(record: RunRecord, looks: Mapping[str, Any], splits: Mapping[str, str]) -> list[str]:
    """Return what the tables noted and what was left out, in words.

    Args:
        record: of the run.
        looks: view -> what is to be said about the table.
        splits: view -> whose rows it has lines for.
    """
    rounds = {number: marker.versions for number, marker in record.markers.items()}
    found = changes_between_rounds(record.record.get("versions", {}), rounds)
    for view, seen in looks.items():
        found += [f"{view}: {line}" for line in seen["facts"].get("notices", [])]
    found += not_usable({view: seen.get("reasons", []) for view, seen in looks.items()}, splits)
    if record.settings["update_step"] and record.last < int(record.settings["update_times"]):
        found.append(f"the run is at round {record.last} of {record.settings['update_times']}")
    return found


VIEWS_NAMED = 3


def not_usable(found: Mapping[str, Sequence[Mapping[str, Any]]], splits: Mapping[str, str]) -> list[str]:
    """Return a line for every reason that rows are not usable for, with their number and the first of them.

    A row that is not valid in the pool is not valid in any table made from it: it is named once.

    Args:
        found: view -> its reasons: reason, rows, first.
        splits: view -> whose rows it has lines for.
    """
    views: dict[tuple[Any, ...], list[str]] = {}
    for view, reasons in found.items():
        for each in reasons:
            key = (splits[view], each["reason"], each["rows"], tuple(each["first"]))
            views.setdefault(key, []).append(view)
    return [
        f"{_views_said(split, named)}: {rows:,} row{'s' * (rows != 1)} not usable: {reason} "
        f"({rows_said(first, rows)})"
        for (split, reason, rows, first), named in views.items()
    ]


def _views_said(split: str, named: Sequence[str]) -> str:
    if split in named:
        return split
    more = f" and {len(named) - VIEWS_NAMED} more tables" if len(named) > VIEWS_NAMED else ""
    return ", ".join(named[:VIEWS_NAMED]) + more
