"""Findings of a report on a run: headline, rounds, charts, single rows, overlaps, warnings.

Everything is counted over tables as streams, and rows that are shown one by one are few, so that a run of any
size gives a page of about the same size.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dataflex_pipeline.errors import CorruptError
from dataflex_pipeline.reports.catalogue import RunTable, tables_of
from dataflex_pipeline.reports.likeness import alike
from dataflex_pipeline.reports.look import Wanted, look, shared_rows
from dataflex_pipeline.reports.numbers import spread
from dataflex_pipeline.reports.page import pictures
from dataflex_pipeline.reports.page.browsed import Browsed, browsed
from dataflex_pipeline.reports.page.cautions import cautions
from dataflex_pipeline.reports.page.conversations import Conversations
from dataflex_pipeline.reports.page.headline import check_comparable, headline, what_changed
from dataflex_pipeline.reports.page.nearest import Nearest, nearest
from dataflex_pipeline.reports.query import Queries, open_queries
from dataflex_pipeline.reports.records import PER_ROUND, RunRecord
from dataflex_pipeline.reports.shares import Shares, round_name, shares, target_values


@dataclass(frozen=True)
class Drawn:
    """A chart of the page.

    Attributes:
        name: of its place on the page. title: above it. says: in words, what it shows.
        spec: the chart, as plain values for Vega-Lite.
        column: the category that its bars are of; empty for others.
    """

    name: str
    title: str
    says: str
    spec: dict[str, Any]
    column: str = ""


@dataclass(frozen=True)
class Rows:
    """The rows that are shown one by one.

    Attributes:
        rows: by number. tables: the score tables that they have scores of.
        nearest: the target rows that they are most like. notices: what could not be told of them.
        categories: columns to filter by. pool: number of all rows of the pool.
    """

    rows: Sequence[Browsed]
    tables: Sequence[RunTable]
    nearest: Nearest
    notices: Sequence[str]
    categories: Sequence[str]
    pool: int


def findings(record: RunRecord, other: RunRecord | None = None) -> dict[str, Any]:
    """Return everything that a report shows of one run.

    Args:
        record: of the run.
        other: a run to hold its target loss against; None for none.

    Raises:
        CorruptError: a table of the run is damaged.
        RunError: the other run differs in more than method and seed.
    """
    if other is not None:
        check_comparable(record, other)
    tables = tables_of(record.run)
    indexed = {table.round for table in tables if table.kind == "index"}
    for number in record.markers:
        if number not in indexed:
            raise _no_index(record, number)
    with open_queries(tables) as queries:
        looks = {t.view: look(queries, t, tables, Wanted(0)) for t in tables if t.kind != "probabilities"}
        return _found(record, other, _Opened(queries, tables, looks))


def _no_index(record: RunRecord, number: int) -> CorruptError:
    run = record.run
    by = f"dataflex {f'round {number}' if number else 'warmup'} output_dir={shlex.quote(str(run.folder))}"
    return CorruptError(
        f"{record.round(number).index} is not there, and round {number} was trained on it.",
        "It was written whole by this program, so something else removed it.",
        f"Run `{by}`: it is made again from the same selection, and nothing is trained again.",
    )


@dataclass(frozen=True)
class _Opened:
    """The tables of a run, open. looks: view -> what was found of it."""

    queries: Queries
    tables: Sequence[RunTable]
    looks: Mapping[str, Any]

    def of_kind(self, kind: str) -> list[RunTable]:
        """Return the tables of a kind, those of rounds in their order."""
        return [table for table in self.tables if table.kind == kind]

    @property
    def pool(self) -> RunTable:
        """The prepared pool."""
        return self.of_kind("pool")[0]

    @property
    def chosen(self) -> list[RunTable]:
        """Of each round, the table of the rows that it trained on, or else of those selected."""
        found = {t.round: t for t in self.of_kind("selection") if not t.name}
        found |= {t.round: t for t in self.of_kind("index")}
        return [found[number] for number in sorted(found, key=lambda number: number or 0)]


def _found(record: RunRecord, other: RunRecord | None, opened: _Opened) -> dict[str, Any]:
    queries, looks, chosen = opened.queries, opened.looks, opened.chosen
    scores = opened.of_kind("scores")
    rounds = [_round(record, number, scores, looks) for number in record.rounds]
    spread_over = shares(queries, opened.pool, chosen)
    target = next(iter(opened.of_kind("target")), None)
    last = next((each for each in reversed(rounds) if each["number"]), None)
    first = f"scores_{last['number']}_{last['selected_by']}" if last is not None else ""
    drawn = pictures.drawn_tables(scores, looks, first)
    rows = _rows(record, opened, drawn, spread_over)
    changed = what_changed(
        spread_over,
        [target_values(queries, each, target) for each in spread_over],
        None if last is None else last["number"],
    )
    return {
        "name": record.name,
        "headline": headline(record, _last_selected(last, looks), changed, other),
        "facts": _facts(record, looks, rounds),
        "rounds": rounds,
        "charts": list(_charts(record, other, opened, drawn, spread_over, rows)),
        "rows": rows,
        "scores": [looks[table.view] for table in scores],
        "selected": spread_over,
        "lengths": _lengths(queries, chosen),
        "evaluations": [asdict(f) | {"round": n} for n in record.markers for f in record.evaluated(n)],
        "alike": alike(queries, scores, looks),
        "repeated": _repeated(queries, chosen),
        "warnings": cautions(record, looks, {table.view: table.split for table in opened.tables}),
        "settings": record.settings,
        "provenance": record.record,
    }


def _last_selected(last: Mapping[str, Any] | None, looks: Mapping[str, Any]) -> dict[str, Any] | None:
    if last is None:
        return None
    return {
        "number": last["number"],
        "rows": last["different"],
        "pool": looks["pool"]["valid"],
        "by": last["selected_by"],
    }


def _rows(
    record: RunRecord, opened: _Opened, drawn: Sequence[RunTable], spread_over: Sequence[Shares]
) -> Rows:
    """Return the rows to show one by one, with all that is known of them."""
    conversations = Conversations(record.run)
    by = {(table.name, table.round): table for table in opened.of_kind("probabilities")}
    probabilities = {t.view: by[t.name, t.round] for t in drawn if (t.name, t.round) in by}
    ranked = {table.round: table for table in opened.of_kind("selection") if not table.name}
    rows = browsed(opened.queries, opened.pool, drawn, probabilities, opened.chosen, ranked, conversations.of)
    found = nearest(record.run, [each.facts["row"] for each in rows if each.facts["valid"]])
    notices = [*conversations.notices, *found.notices]
    return Rows(rows, drawn, found, notices, [each.column for each in spread_over], opened.pool.n_rows)


def _charts(
    record: RunRecord,
    other: RunRecord | None,
    opened: _Opened,
    drawn: Sequence[RunTable],
    spread_over: Sequence[Shares],
    rows: Rows,
) -> Iterator[Drawn]:
    queries, looks, chosen = opened.queries, opened.looks, opened.chosen
    for each in spread_over:
        says = "Share of rows in the pool and in what rounds selected. Click a bar to list its rows."
        yield Drawn("shares", f"By {each.title}", says, pictures.share_chart(each).to_dict(), each.column)
    if drawn:
        by_round = {table.round: table for table in chosen}
        chart = pictures.score_chart(queries, drawn, looks, by_round)
        says = "Share of rows by score, of those selected in the round and of the rest. "
        says += "Drag over a part, or click a bar, to list its rows."
        yield Drawn("scores", "Selected rows against the rest", says, chart.to_dict())
        says = "Each point is a row of the list below and opens when it is clicked; "
        says += "the line is the mean of all rows."
        chart = pictures.length_chart(rows.rows, drawn, looks)
        yield Drawn("length", "Score against length of the response", says, chart.to_dict())
        for each in spread_over:
            says = f"Where the scores of each {each.title} lie. Click a bar to list its rows."
            chart = pictures.range_chart(queries, drawn, opened.pool, each)
            yield Drawn("ranges", f"Scores by {each.title}", says, chart.to_dict(), each.column)
    if record.log:
        says = "Loss on the rows trained on, step by step, and on the target; dotted: a round begins."
        yield Drawn("losses", "Loss", says, pictures.loss_chart(record, other).to_dict())
        yield Drawn("rates", "Learning rate", "Over all rounds.", pictures.rate_chart(record).to_dict())
    overlaps = pictures.overlap_chart(chosen)
    if overlaps is not None:
        says = "Of the rows of the round on the left, the share that the round above had too."
        yield Drawn("overlaps", "Rows that rounds have in common", says, overlaps.to_dict())


def _look_of(looks: Mapping[str, Any], number: int) -> Any:
    """Return the look at the rows of a round: its index, or where it has none its selection."""
    return looks.get(f"idx_{number}") or looks[f"selection_{number}"]


def _facts(
    record: RunRecord, looks: Mapping[str, Any], rounds: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    last = record.markers.get(record.last)
    by = [each["selected_by"] for each in rounds if each["number"]]
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


def _lengths(queries: Queries, chosen: Sequence[RunTable]) -> list[dict[str, Any]]:
    """Return quantiles of the response tokens: of the pool, and of what each round selected."""
    pool = queries.table("pool").filter("valid").project("row, n_response_tokens")
    found = [{"of": "pool", **spread(pool, "n_response_tokens").plain()}]
    for table in chosen:
        rows = queries.table(table.view).project("row").distinct().join(pool, "row", how="inner")
        found.append({"of": round_name(table.round), **spread(rows, "n_response_tokens").plain()})
    return found


def _repeated(queries: Queries, chosen: Sequence[RunTable]) -> list[dict[str, Any]]:
    """Return how much of each round's rows the round before had too, and any before."""
    found = []
    for place, table in enumerate(chosen[1:], start=1):
        before = [each.view for each in chosen[:place]]
        shares = (shared_rows(queries, table.view, views)["share"] for views in (before[-1:], before))
        found.append({"round": table.round, **dict(zip(("before", "any_before"), shares, strict=True))})
    return found
