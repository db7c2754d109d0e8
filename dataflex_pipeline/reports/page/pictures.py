"""The charts of a report: what they show, counted over the tables as streams, and their drawings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from dataflex_pipeline.reports import charts
from dataflex_pipeline.reports.catalogue import RunTable
from dataflex_pipeline.reports.charts import POOL, REST, SELECTED, TARGET, TRAINING
from dataflex_pipeline.reports.likeness import is_constant
from dataflex_pipeline.reports.page.browsed import Browsed
from dataflex_pipeline.reports.query import Queries, quoted
from dataflex_pipeline.reports.records import RunRecord
from dataflex_pipeline.reports.shares import Shares, round_name
from dataflex_pipeline.store.parquet import read_whole

TABLES = 8
"""Score tables that are drawn, the last ones."""
ROUNDS = 4
"""Rounds that a chart of shares has bars for."""
MATRIX = 12
"""Rounds that are held against each other, the last ones."""
POINTS = 250
"""Rows of each kind that are drawn as points, of every score table."""
STEPS = 600
"""Points of a curve; of more steps, neighbours are averaged."""
QUANTILES = {"p05": 0.05, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p95": 0.95}


def table_name(table: RunTable) -> str:
    """Return what a score table is called on the page."""
    return f"{table.name}, round {table.round}"


def drawn_tables(scores: Sequence[RunTable], looks: Mapping[str, Any], first: str) -> list[RunTable]:
    """Return the score tables to draw: the last ones whose rows differ, the one of view ``first`` first."""
    told = [table for table in reversed(scores) if not is_constant(looks[table.view])]
    return sorted(told, key=lambda table: table.view != first)[:TABLES]


def score_chart(
    queries: Queries, tables: Sequence[RunTable], looks: Mapping[str, Any], chosen: Mapping[Any, RunTable]
) -> Any:
    """Draw how scores are spread, of selected rows and of the rest.

    Args:
        queries: over the run's tables. tables: to draw. looks: view -> what was found of it.
        chosen: round -> the table of its rows.
    """
    lines = [
        line | {"table": table_name(table)}
        for table in tables
        for line in _score_bars(queries, table, _spread(looks[table.view]), chosen.get(table.round))
    ]
    return charts.score_chart(lines, pick=[table_name(table) for table in tables])


def _spread(look: Mapping[str, Any]) -> Mapping[str, Any]:
    found: Mapping[str, Any] = next(each for each in look["numbers"] if each["column"] == "score")
    return found


def _score_bars(
    queries: Queries, table: RunTable, spread: Mapping[str, Any], chosen: RunTable | None
) -> Iterator[dict[str, Any]]:
    quantiles = spread["quantiles"]
    ends = (spread["minimum"], quantiles["0.005"], quantiles["0.995"], spread["maximum"])
    edges = charts.bar_edges(*ends)
    low, width, last = float(edges[0]), float(edges[1] - edges[0]), len(edges) - 2
    place = f"least(greatest(floor((score - {low!r}) / {width!r}), 0), {last})::integer"
    relation = queries.table(table.view).filter("valid and isfinite(score)").project(f"row, {place} as place")
    kinds = {charts.ALL: relation.project("place, false as taken")}
    if chosen is not None:
        rows = queries.table(chosen.view).project("row as chosen_row").distinct()
        joined = relation.join(rows, "row = chosen_row", how="left")
        kinds = {REST: joined.filter("chosen_row is null"), SELECTED: joined.filter("chosen_row is not null")}
    for of, rows_of in kinds.items():
        counted = dict(rows_of.aggregate("place, count(*)", "place").fetchall())
        yield from charts.bar_lines(of, [counted.get(each, 0) for each in range(last + 1)], edges)


def range_chart(queries: Queries, tables: Sequence[RunTable], pool: RunTable, found: Shares) -> Any:
    """Draw where the scores of every value of a category lie.

    Args:
        queries: over the run's tables. tables: to draw. pool: the prepared rows. found: the category.
    """
    lines = [
        line | {"table": table_name(table), "column": found.column}
        for table in tables
        for line in _ranges(queries, table, pool, found)
    ]
    return charts.range_chart(lines, pick=[table_name(table) for table in tables])


def _ranges(queries: Queries, table: RunTable, pool: RunTable, found: Shares) -> Iterator[dict[str, Any]]:
    named = queries.table(pool.view).project(
        f"row, coalesce({quoted(found.column)}::varchar, '(none)') as name"
    )
    scored = queries.table(table.view).filter("valid and isfinite(score)").project("row, score")
    shares = list(QUANTILES.values())
    counted = scored.join(named, "row", how="inner").aggregate(
        f"name, count(*), quantile_disc(score, {shares})", "name"
    )
    by_name = {name: (rows, quantiles) for name, rows, quantiles in counted.fetchall()}
    for name in found.names:
        if name in by_name:
            rows, quantiles = by_name[name]
            yield {"name": name, "rows": rows, **dict(zip(QUANTILES, quantiles, strict=True))}


def length_chart(rows: Sequence[Browsed], tables: Sequence[RunTable], looks: Mapping[str, Any]) -> Any:
    """Draw scores against the length of the response, of rows on the page; the mean is over all rows."""
    points, means = [], []
    for place, table in enumerate(tables):
        name = table_name(table)
        counts = {SELECTED: 0, REST: 0}
        for each in rows:
            line = each.scores[place]
            of = SELECTED if (table.round or 0) in each.selected else REST
            counts[of] += 1
            if line is None or line[0] is None or not each.facts["n_response_tokens"]:
                continue
            if counts[of] <= POINTS and (of == SELECTED or "random" in each.lists):
                length, source = each.facts["n_response_tokens"], each.facts["source"]
                points.append(
                    {"row": each.facts["row"], "source": source, "length": length}
                    | {"score": float(f"{line[0]:.6g}"), "of": of, "table": name}
                )
        bins = looks[table.view].get("length", {}).get("bins", [])
        means += [
            {
                "length": (max(one["shortest"], 1) * max(one["longest"], 1)) ** 0.5,
                "mean": one["mean"],
                "table": name,
            }
            for one in bins
        ]
    return charts.length_chart(points, means, pick=[table_name(table) for table in tables])


def share_chart(found: Shares) -> Any:
    """Draw the shares of a category; of many rounds, ROUNDS of them, the first and the last included.

    The warm-up is drawn uniformly, so that beside other rounds it would only repeat the pool.
    """
    rounds = [name for name in found.counts if name not in (POOL, round_name(0))]
    rounds = rounds or [name for name in found.counts if name != POOL]
    if len(rounds) > ROUNDS:
        rounds = [rounds[round(place)] for place in np.linspace(0, len(rounds) - 1, ROUNDS)]
    return charts.share_chart(found.lines(rounds))


def overlap_chart(chosen: Sequence[RunTable]) -> Any:
    """Draw how much of each round's rows the others had too; None for fewer than two rounds."""
    if len(chosen) < 2:
        return None
    rows = {
        round_name(table.round): np.unique(read_whole(table.path, ["row"])["row"].to_numpy())
        for table in chosen[-MATRIX:]
    }
    lines = []
    for name, own in rows.items():
        for other, theirs in rows.items():
            both = len(np.intersect1d(own, theirs, assume_unique=True))
            lines.append({"round": name, "other": other, "rows": both, "share": both / (len(own) or 1)})
    return charts.overlap_chart(lines)


def loss_chart(record: RunRecord, other: RunRecord | None) -> Any:
    """Draw training and target loss over all rounds, beside the target loss of another run."""
    lines = [
        {"step": step, "loss": loss, "of": TRAINING} for step, loss in thinned(_series(record.log, "loss"))
    ]
    lines += [
        {"step": step, "loss": loss, "of": TARGET} for step, loss in thinned(_series(record.log, "eval_loss"))
    ]
    if other is not None:
        name = f"{TARGET}, of {other.name}"
        series = thinned(_series(other.log, "eval_loss"))
        lines += [{"step": step, "loss": loss, "of": name} for step, loss in series]
    begun = {number: number - 1 for number in record.markers if number - 1 in record.markers}
    starts = {number: record.step(before) + 1 for number, before in begun.items()}
    return charts.loss_chart(lines, starts)


def rate_chart(record: RunRecord) -> Any:
    """Draw the learning rate over all rounds."""
    series = thinned(_series(record.log, "learning_rate"))
    return charts.rate_chart([{"step": step, "learning_rate": rate} for step, rate in series])


def _series(log: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    found = [(float(entry["step"]), float(entry[name])) for entry in log if entry.get(name) is not None]
    return [(step, value) for step, value in found if np.isfinite(value)]


def thinned(series: Sequence[tuple[float, float]], most: int = STEPS) -> list[tuple[float, float]]:
    """Return a curve of at most so many points; of more, each is the mean of as many neighbours."""
    every = -(-len(series) // most) or 1
    if every == 1:
        return list(series)
    pieces = [np.array(series[start : start + every]) for start in range(0, len(series), every)]
    return [(float(piece[:, 0].mean()), float(piece[:, 1].mean())) for piece in pieces]
