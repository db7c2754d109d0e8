"""How a notebook shows a run: its objects as tables in HTML, and as charts.

A notebook asks for the HTML (``_repr_html_``) of what a cell ends with; plain Python never does. All text is
escaped: rows come from anywhere.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from dataflex_pipeline.errors import DataflexError, RunError, UserError, did_you_mean
from dataflex_pipeline.pipeline.output import shown
from dataflex_pipeline.pipeline.outputs import early_end, next_round, states
from dataflex_pipeline.reports import charts
from dataflex_pipeline.reports.catalogue import RunTable, run_above, table_at, tables_of
from dataflex_pipeline.reports.query import Queries, dictionaries, open_queries, quoted
from dataflex_pipeline.reports.records import RunRecord
from dataflex_pipeline.schemas import ORIGINAL, own_names
from dataflex_pipeline.store.parquet import read_whole
from dataflex_pipeline.store.run import RoundFolder

if TYPE_CHECKING:
    from dataflex_pipeline.pipeline.open_run import OpenRun
    from dataflex_pipeline.pipeline.output import Output, State
    from dataflex_pipeline.pipeline.table import Table
    from dataflex_pipeline.reports.comparison import Comparison

LINES = 10
"""Lines of a table that are shown."""
TEXT = 200
"""Characters of a row's text that are shown."""
WIDTH = 600
"""Pixels of a chart."""
GROUPS = 30
"""Groups of rows that a chart has room for."""
COLORS = {"done": "#2e8b57", "stale": "#b8860b", "damaged": "#c0392b", "unfinished": "#b8860b"}
"""Of the states that are to be seen from afar."""


def safely(show: Callable[[], str]) -> str:
    """Return what a display says, or in its place what keeps it from being shown."""
    try:
        return show()
    except DataflexError as error:
        return "".join(f"<p>{html.escape(part)}</p>" for part in (error.what, error.why, error.fix))


def run_html(run: OpenRun) -> str:
    """Return the outputs that a run has, with their states, and the call that goes on with it."""
    found = states(run)
    lines = [
        {
            "output": output.label,
            "state": state.name,
            "what": state.what,
            "file": shown(output.path, run.folder),
        }
        for output, state in found
        if state.name != "missing"
    ]
    missing = [output.label for output, state in found if state.name == "missing"]
    said = f"Not made yet: {html.escape(missing[0])}" if missing else ""
    said += f" and {len(missing) - 1} more outputs. " if len(missing) > 1 else ". " if missing else ""
    return _page(f"Run {run.folder}", run.given.component_name, lines, said + _next_call(run, found))


def _next_call(run: OpenRun, found: list[tuple[Output, State]]) -> str:
    """Return what to do next with a run, as HTML."""
    following = next_round(run, found)
    if following is not None:
        again = ", with overwrite=True" if following[1] else ""
        return f"Next: <code>run.round({following[0]})</code>{again}"
    if any(state.name not in ("done", "missing") for _, state in found):
        return "Set the old settings or files again, or make it anew with overwrite=True."
    number = early_end(run, run.given.last_round)
    if number is not None:
        return f"The run ended in round {number} by early stopping."
    return "The run is at its horizon." if run.given.trains_rounds else "The run is selected."


def table_html(table: Table) -> str:
    """Return the best lines of a table of scores or of a selection, with the beginning of their texts."""
    run = run_above(table.path)
    tables = tables_of(run) if run is not None else []
    this = table_at(table.path, tables)
    order = "rank" if "rank" in this.schema.names else f"{quoted(table.by)} desc, row"
    names = ", ".join(quoted(name) for name in this.schema.names if name not in ("valid", "reason"))
    pool = next((each for each in tables if each.kind == "pool"), None)
    with open_queries([each for each in (this, pool) if each is not None], this) as queries:
        best = queries.table("this").filter(f"{quoted(table.by)} is not null").order(order).limit(LINES)
        lines = dictionaries(best.project(names))
        ids = [line.pop("row_id") for line in lines]
        if pool is not None and lines:
            rows = ", ".join(str(line["row"]) for line in lines)
            found = queries.table(pool.view).filter(f"row in ({rows})").project("row_id, messages")
            texts = dict(found.fetchall())  # none of a row that the pool has no more
            lines = [
                {**line, "text": _beginning(texts.get(row_id) or [])}
                for line, row_id in zip(lines, ids, strict=True)
            ]
    ending = f"The best {len(lines)} of {this.n_rows:,} lines. <code>.to_pandas()</code> has all of them."
    return _page(table.path.name, table.summary, lines, ending)


def _beginning(turns: Sequence[Mapping[str, str]]) -> str:
    text = " | ".join(f"{turn['role']}: {turn['content']}" for turn in turns)
    return text if len(text) <= TEXT else f"{text[:TEXT]}..."


def comparison_html(comparison: Comparison) -> str:
    """Return a comparison's figures by method, as mean and range over the seeds, and its notes."""
    lines = []
    for name, by_method in comparison.figures.items():
        line: dict[str, Any] = {"figure": name}
        for method in comparison.methods:
            spread, paired = by_method.get(method), comparison.paired.get(name, {}).get(method)
            text = "" if spread is None else f"{spread.mean:.4g} ({spread.low:.4g} to {spread.high:.4g})"
            p = "" if paired is None or paired.p is None else f", p = {paired.p:.2g}"
            line[method] = text if paired is None else f"{text}; {paired.difference:+.4g}{p}"
        lines.append(line)
    title = f"Methods after round {comparison.round}, step {comparison.step}"
    against = "" if comparison.baseline is None else f"; the difference to {comparison.baseline} after it"
    notes = "".join(f"<br>{html.escape(note)}" for note in comparison.notes)
    return _page(title, f"mean (range) over the seeds{against}", lines, notes)


def _page(title: str, summary: str, lines: Sequence[Mapping[str, Any]], ending: str) -> str:
    """Return a title, a table and a last line; the last is HTML, all else is text."""
    head = f"<p><b>{html.escape(title)}</b><br>{html.escape(summary)}</p>"
    return f"<div>{head}{_table(lines)}<p>{ending}</p></div>"


def _table(lines: Sequence[Mapping[str, Any]]) -> str:
    if not lines:
        return ""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in lines[0])
    body = "".join(f"<tr>{_cells(line.items())}</tr>" for line in lines)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cells(items: Iterable[tuple[str, Any]]) -> str:
    return "".join(_cell(name, value) for name, value in items)


def _cell(name: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        color = COLORS.get(str(value)) if name == "state" else None
        style = "text-align:left" + (f";color:{color}" if color else "")
        return f'<td style="{style}"><bdi>{html.escape("" if value is None else str(value))}</bdi></td>'
    return f"<td>{value:.5g}</td>" if isinstance(value, float) else f"<td>{value}</td>"


def table_chart(table: Table, by: str | None = None) -> charts.Chart:
    """Return the chart of a table of scores or of a selection; see `Table.plot`.

    Raises:
        RunError: the pool is needed, and the table lies in no run that has it.
        UserError: the pool has no such column, or one of too many different values.
    """
    run = run_above(table.path)
    tables = tables_of(run) if run is not None else []
    this = table_at(table.path, tables)
    if this.kind == "selection":
        return _sized(charts.share_chart(_shares(this, tables, by or "source")))
    name = f"{table.by} of {this.name}" if this.name else table.by
    if by is not None:
        return _sized(charts.range_chart(_ranges(this, tables, by), name))
    columns = read_whole(table.path, ["row", table.by])
    scores = columns.column(table.by).to_numpy(zero_copy_only=False).astype(float)
    selected = None
    if run is not None and this.round is not None:
        selected = _is_selected(run.round(this.round), columns.column("row").to_numpy())
    return _sized(charts.score_chart(charts.score_bars(scores, selected), name))


def _sized(chart: charts.Chart) -> charts.Chart:
    """Return a chart of a fixed width: a notebook's cell has none that the chart could take."""
    return chart.properties(width=WIDTH)


def _is_selected(where: RoundFolder, rows: np.ndarray) -> np.ndarray | None:
    """Return whether the round selected each row; None where it has not selected. [n] bool"""
    if not where.selection.is_file():
        return None
    return np.isin(rows, read_whole(where.selection, ["row"]).column("row").to_numpy())


def _pool_and_column(this: RunTable, tables: Sequence[RunTable], by: str) -> tuple[RunTable, str]:
    """Return the pool, and its column that a reader calls so: with or without ``original_``."""
    pool = next((each for each in tables if each.kind == "pool"), None)
    if pool is None:
        raise RunError(
            f"{this.path} lies in no run with a prepared pool.",
            "Sources and other columns of its rows are in the pool.",
            "Open it where it was made.",
        )
    names = pool.schema.names
    column = by if by in names else ORIGINAL + by
    if column not in names or pa.types.is_nested(pool.schema.field(column).type):
        own = own_names(names)
        raise UserError(
            f"by is '{by}', which is no column of the pool that rows can be grouped by.",
            f"Those of the data's own are: {', '.join(own) or 'none'}; and source.",
            f"Name one of them.{did_you_mean(by, ['source', *own])}",
        )
    return pool, column


def _groups(queries: Queries, pool: RunTable, column: str) -> list[str]:
    """Return the different values of a column, those of most rows first.

    Raises:
        UserError: they are too many for a chart.
    """
    named = queries.table(pool.view).filter("valid").project(_named(column))
    counted = (
        named.aggregate("name, count(*) as n", "name").order("n desc, name").limit(GROUPS + 1).fetchall()
    )
    if len(counted) > GROUPS:
        raise UserError(
            f"by is '{column.removeprefix(ORIGINAL)}', which has more than {GROUPS} different values.",
            "A chart of so many groups shows nothing.",
            "Name a column of a few values, such as source.",
        )
    return [name for name, _ in counted]


def _named(column: str) -> str:
    return f"coalesce({quoted(column)}::varchar, '(none)') as name"


def _shares(this: RunTable, tables: Sequence[RunTable], by: str) -> list[dict[str, Any]]:
    """Return the lines of `charts.share_chart`: groups of rows in the pool, and in a selection."""
    pool, column = _pool_and_column(this, tables, by)
    name = f"round {this.round}" + (f": {this.name}" if this.name else "")
    with open_queries([pool, this]) as queries:
        groups = _groups(queries, pool, column)
        every = queries.table(pool.view).filter("valid").project(f"row, {_named(column)}")
        chosen = queries.table(this.view).project("row").distinct().join(every, "row", how="inner")
        counts = {
            of: dict(rows.aggregate("name, count(*) as n", "name").fetchall())
            for of, rows in ((charts.POOL, every), (name, chosen))
        }
    return [
        {"name": group, "of": of, "rows": n.get(group, 0), "share": n.get(group, 0) / max(1, sum(n.values()))}
        for group in groups
        for of, n in counts.items()
    ]


def _ranges(this: RunTable, tables: Sequence[RunTable], by: str) -> list[dict[str, Any]]:
    """Return the lines of `charts.range_chart`: quantiles of the scores of each group of rows."""
    pool, column = _pool_and_column(this, tables, by)
    shares = {"p05": 0.05, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p95": 0.95}
    quantiles = ", ".join(f"quantile_cont(score, {share}) as {key}" for key, share in shares.items())
    with open_queries([pool, this]) as queries:
        groups = _groups(queries, pool, column)
        scored = queries.table(this.view).filter("isfinite(score)").project("row, score")
        joined = scored.join(queries.table(pool.view).project(f"row, {_named(column)}"), "row", how="inner")
        found = dictionaries(joined.aggregate(f"name, count(*) as rows, {quantiles}", "name"))
    return sorted(found, key=lambda line: groups.index(line["name"]))


def loss_curves(record: RunRecord) -> charts.Chart:
    """Return the chart of a run's training and target loss over its steps."""
    kinds = {"loss": charts.TRAINING, "eval_loss": charts.TARGET}
    lines = [
        {"step": entry["step"], "loss": entry[key], "of": of}
        for key, of in kinds.items()
        for entry in record.log
        if key in entry
    ]
    return _sized(charts.loss_chart(lines))
