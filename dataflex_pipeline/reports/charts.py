"""Charts of scores, selections and losses, as Vega-Altair objects: for the report's page and for notebooks.

Every function takes lines (a list of dictionaries, a pandas or an Arrow table) that are already counted, so
that a chart of any number of rows is of the same size, and returns a chart as wide as its place. Colours of
the series are of middle lightness, to be told apart on light and on dark; those of text and axes are left to
whoever shows the chart. A bar or point that stands for rows says which in its datum, for a page that shows
these rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from dataflex_pipeline.store.unseen import visible

Chart: TypeAlias = Any
"""An altair.Chart, or an altair.LayerChart."""
BLUE, ORANGE, GREEN, VIOLET, RED = "#3b82c4", "#d9733a", "#3a9a68", "#8b6fc9", "#c4506b"
FAINT = "#8a94a0"
SERIES = (BLUE, GREEN, VIOLET, RED)
SELECTED, REST, ALL = "selected", "the rest", "all rows"
POOL, TRAINING, TARGET = "pool", "training", "target"
COLORS = {REST: FAINT, SELECTED: ORANGE, ALL: BLUE, POOL: FAINT, TRAINING: FAINT, TARGET: ORANGE}
"""Colours of what is in several charts."""
BARS = 40
OUTER = 0.005
"""Share of the values at each end that the outermost bars of a histogram may hold all of."""
FADED = 0.12
HEIGHT = 240
TALL_BAR = 11
"""Pixels of a horizontal bar."""


def lines_of(table: Any) -> list[dict[str, Any]]:
    """Return the lines of a pandas or Arrow table, or of an iterable of mappings, as dictionaries."""
    lines = table
    if hasattr(table, "to_pylist"):
        lines = table.to_pylist()
    elif hasattr(table, "to_dict"):
        lines = table.to_dict("records")
    return [{name: _seen(value) for name, value in line.items()} for line in lines]


def _seen(value: Any) -> Any:
    """Return a value for a chart; a control character in a text could end an expression of Vega's."""
    return visible(value) if isinstance(value, str) else value


def score_bars(
    scores: np.ndarray, selected: np.ndarray | None = None, bars: int = BARS
) -> list[dict[str, Any]]:
    """Return the histogram of scores in memory, as `score_chart` takes it.

    Args:
        scores: of the rows; those that are not finite count for nothing. [n]
        selected: whether each row was selected; None: all bars are of one kind. [n] bool
        bars: their number.
    """
    finite = np.isfinite(scores)
    edges = bar_edges(*_ends(scores[finite]), bars) if finite.any() else np.empty(0)
    if len(edges) < 2:
        return []
    groups = {ALL: finite}
    if selected is not None:
        groups = {REST: finite & ~selected, SELECTED: finite & selected}
    return [
        line
        for of, chosen in groups.items()
        for line in bar_lines(of, np.histogram(np.clip(scores[chosen], edges[0], edges[-1]), edges)[0], edges)
    ]


def _ends(values: np.ndarray) -> tuple[float, float, float, float]:
    low, high = np.quantile(values, [OUTER, 1 - OUTER])
    return float(values.min()), float(low), float(high), float(values.max())


def bar_edges(least: float, low: float, high: float, most: float, bars: int = BARS) -> np.ndarray:
    """Return the ends of equally wide bars, rising; empty where all values are the same. [bars + 1]

    Args:
        least, most: of the values. low, high: quantiles OUTER and 1 - OUTER of them. Where the values beyond
            these would take more than half of the picture, the outermost bars stand for them too.
        bars: their number.
    """
    if not least < most:
        return np.empty(0)
    if low < high and most - least > 2 * (high - low):
        return np.linspace(low, high, bars + 1)
    return np.linspace(least, most, bars + 1)


def bar_lines(of: str, counts: Iterable[int], edges: np.ndarray) -> list[dict[str, Any]]:
    """Return the lines of a histogram of one kind of rows.

    Args:
        of: which rows. counts: rows in each bar. [bars] edges: ends of the bars. [bars + 1]
    """
    counted = [int(count) for count in counts]
    total = sum(counted) or 1
    return [
        {"of": of, "low": float(low), "high": float(high), "rows": count, "share": count / total}
        for low, high, count in zip(edges, edges[1:], counted, strict=False)
    ]


def score_chart(bars: Any, column: str = "score", pick: Sequence[str] = ()) -> Chart:
    """Return the distribution of scores: what share of each kind of rows lies in each bar.

    An interval drawn on it is its parameter ``scores``; a click into the legend keeps one kind.

    Args:
        bars: lines of `score_bars`: of, low, high, rows, share; with ``pick`` also ``table``.
        column: what the scores are called.
        pick: names of the tables to choose from (parameter ``table``), the first shown first.
    """
    import altair

    lines = lines_of(bars)
    legend = altair.selection_point(fields=["of"], bind="legend", name="kinds")
    interval = altair.selection_interval(encodings=["x"], name="scores")
    chart = (
        _of_table(altair.Chart(_data(lines), height=HEIGHT, width="container"), pick)
        .mark_bar(binSpacing=0.5)
        .encode(
            x=altair.X("low:Q", bin="binned", title=column, scale=altair.Scale(zero=False), axis=_plain()),
            x2="high:Q",
            y=altair.Y(
                "share:Q", stack=None, title="share of these rows", axis=altair.Axis(format="%", tickCount=5)
            ),
            color=_color("of", {kind: COLORS[kind] for kind in _kinds(lines)}),
            opacity=altair.condition(legend, altair.value(0.65), altair.value(FADED)),
            tooltip=[
                altair.Tooltip("of:N", title="rows"),
                altair.Tooltip("low:Q", title="from", format=".4g"),
                altair.Tooltip("high:Q", title="to", format=".4g"),
                altair.Tooltip("rows:Q", title="number", format=","),
                altair.Tooltip("share:Q", title="share", format=".1%"),
            ],
        )
        .add_params(legend, interval)
    )
    return _picked(chart, pick)


def share_chart(shares: Any, title: str = "share of rows") -> Chart:
    """Return bars of the share that every category has: in the pool, and in what each round selected.

    Args:
        shares: lines of name, of (the pool, or which round), rows, share (0 to 1), in the order to show.
        title: of the axis.
    """
    import altair

    lines = lines_of(shares)
    kinds, names = _kinds(lines), list(dict.fromkeys(line["name"] for line in lines))
    legend = altair.selection_point(fields=["of"], bind="legend", name="kinds")
    return (
        altair.Chart(_data(lines), height=len(names) * (len(kinds) + 1) * TALL_BAR, width="container")
        .mark_bar(cursor="pointer", cornerRadiusEnd=2)
        .encode(
            y=altair.Y(
                "name:N", sort=names, title=None, axis=altair.Axis(labelLimit=180, ticks=False, domain=False)
            ),
            yOffset=altair.YOffset("of:N", sort=kinds),
            x=altair.X("share:Q", title=title, axis=altair.Axis(format="%", tickCount=5)),
            color=_color("of", _shades(kinds)),
            opacity=altair.condition(legend, altair.value(1), altair.value(FADED)),
            tooltip=[
                altair.Tooltip("name:N", title="rows of"),
                altair.Tooltip("of:N", title="in"),
                altair.Tooltip("rows:Q", title="number", format=","),
                altair.Tooltip("share:Q", title="share", format=".1%"),
            ],
        )
        .add_params(legend)
    )


def range_chart(ranges: Any, column: str = "score", pick: Sequence[str] = ()) -> Chart:
    """Return, of every category, where its scores lie: 5 to 95 % as a line, 25 to 75 % as a bar, the median.

    Args:
        ranges: lines of name, rows, p05, p25, p50, p75, p95, in the order to show; with ``pick`` also
            ``table``.
        column: what the numbers are called.
        pick: names of the tables to choose from, the first shown first.
    """
    import altair

    lines = lines_of(ranges)
    names = list(dict.fromkeys(line["name"] for line in lines))
    quantiles = {"p05": "5 %", "p25": "25 %", "p50": "median", "p75": "75 %", "p95": "95 %"}
    base = _of_table(altair.Chart(_data(lines)), pick).encode(
        y=altair.Y(
            "name:N", sort=names, title=None, axis=altair.Axis(labelLimit=180, ticks=False, domain=False)
        ),
        tooltip=[
            altair.Tooltip("name:N", title="rows of"),
            altair.Tooltip("rows:Q", title="number", format=","),
            *(altair.Tooltip(f"{key}:Q", title=title, format=".4g") for key, title in quantiles.items()),
        ],
    )
    title = f"{column}: 5 to 95 % of rows, 25 to 75 %, median"
    axis = altair.X("p05:Q", title=title, scale=altair.Scale(zero=False), axis=_plain())
    chart = altair.layer(
        base.mark_rule(color=FAINT, strokeWidth=2).encode(x=axis, x2="p95:Q"),
        base.mark_bar(color=BLUE, height=TALL_BAR, opacity=0.8, cursor="pointer").encode(
            x="p25:Q", x2="p75:Q"
        ),
        base.mark_tick(color=ORANGE, thickness=3, height=TALL_BAR + 4).encode(x="p50:Q"),
    ).properties(height=2 * TALL_BAR * len(names), width="container")
    return _picked(chart, pick)


def length_chart(points: Any, means: Any = (), column: str = "score", pick: Sequence[str] = ()) -> Chart:
    """Return scores against the length of the response: single rows, and the mean over all of them.

    Args:
        points: lines of row, source, length (tokens, at least 1), score, of (SELECTED or REST), table.
        means: lines of length and mean (of all rows of about that length), table; empty for none.
        column: what the scores are called.
        pick: names of the tables to choose from, the first shown first.
    """
    import altair

    lines = lines_of(points)
    legend = altair.selection_point(fields=["of"], bind="legend", name="kinds")
    x = altair.X(
        "length:Q", title="response tokens", scale=altair.Scale(type="log", nice=False), axis=_whole()
    )
    y = altair.Y("score:Q", title=column, scale=altair.Scale(zero=False), axis=_plain())
    dots = (
        _of_table(altair.Chart(_data(lines)), pick)
        .mark_circle(size=42, cursor="pointer")
        .encode(
            x=x,
            y=y,
            color=_color("of", {kind: COLORS[kind] for kind in _kinds(lines)}),
            opacity=altair.condition(legend, altair.value(0.6), altair.value(0.06)),
            tooltip=[
                altair.Tooltip("row:Q", title="row", format=","),
                altair.Tooltip("source:N"),
                altair.Tooltip("length:Q", title="response tokens", format=","),
                altair.Tooltip("score:Q", title=column, format=".4g"),
                altair.Tooltip("of:N", title="is"),
            ],
        )
        .add_params(legend)
    )
    layers: list[Any] = [dots]
    averages = lines_of(means)
    if averages:
        tooltip = [altair.Tooltip("length:Q", format=",.0f", title="about so many tokens")]
        tooltip.append(altair.Tooltip("mean:Q", format=".4g", title="mean of all rows"))
        line = _of_table(altair.Chart(_data(averages)), pick).mark_line(
            color=BLUE, strokeWidth=2, point={"color": BLUE, "size": 40}
        )
        layers.append(line.encode(x="length:Q", y="mean:Q", tooltip=tooltip))
    chart = altair.layer(*layers).properties(width="container", height=HEIGHT)
    return _picked(chart, pick)


def overlap_chart(overlaps: Any) -> Chart:
    """Return how much of each round's rows another round had too, as a matrix.

    Args:
        overlaps: lines of round and other (their names, in order), rows in both, share of the round's rows.
    """
    import altair

    lines = lines_of(overlaps)
    names = list(dict.fromkeys(line["round"] for line in lines))
    base = altair.Chart(_data(lines)).encode(
        x=altair.X("other:N", sort=names, title="were in", axis=altair.Axis(labelAngle=0, orient="top")),
        y=altair.Y("round:N", sort=names, title="rows of"),
        tooltip=[
            altair.Tooltip("round:N", title="rows of"),
            altair.Tooltip("other:N", title="were in"),
            altair.Tooltip("rows:Q", title="number", format=","),
            altair.Tooltip("share:Q", title="share", format=".1%"),
        ],
    )
    full = altair.Scale(domain=[0, 1], range=["#3b82c418", BLUE])
    cells = base.mark_rect(cornerRadius=3).encode(color=altair.Color("share:Q", scale=full, legend=None))
    texts = base.mark_text(fontSize=13).encode(text=altair.Text("share:Q", format=".0%"))
    return altair.layer(cells, texts).properties(height=44 * len(names), width="container")


def loss_chart(losses: Any, starts: Mapping[int, int] | None = None) -> Chart:
    """Return training loss and target loss over the optimizer steps of all rounds.

    Args:
        losses: lines of step, loss (nats per token), of (TRAINING, TARGET, or another run's target).
        starts: number of a round -> the step that it begins with.
    """
    import altair

    lines = lines_of(losses)
    legend = altair.selection_point(fields=["of"], bind="legend", name="kinds")
    near = altair.selection_point(
        fields=["step"], nearest=True, on="pointerover", clear="pointerout", empty=False
    )
    base = altair.Chart(_data(lines)).encode(
        x=altair.X("step:Q", title="optimizer step", axis=_whole(), scale=altair.Scale(nice=False)),
        y=altair.Y(
            "loss:Q",
            title="loss, nats per token",
            scale=altair.Scale(zero=False),
            axis=altair.Axis(tickCount=6),
        ),
        color=_color("of", {kind: COLORS.get(kind, VIOLET) for kind in _kinds(lines)}),
        opacity=altair.condition(legend, altair.value(1), altair.value(FADED)),
        tooltip=[
            altair.Tooltip("of:N", title="loss"),
            altair.Tooltip("step:Q", format=","),
            altair.Tooltip("loss:Q", title="nats per token", format=".4f"),
        ],
    )
    layers = [base.mark_line(strokeWidth=2).add_params(legend)]
    if any(line["of"] != TRAINING for line in lines):
        layers.append(base.transform_filter(altair.datum.of != TRAINING).mark_circle(size=50))
    shown = altair.condition(near, altair.value(1), altair.value(0))
    layers.append(base.mark_circle(size=90).encode(opacity=shown).add_params(near))
    rounds = [{"step": step - 0.5, "round": f"round {number}"} for number, step in (starts or {}).items()]
    if rounds:
        rules = altair.Chart(_data(rounds)).mark_rule(color=FAINT, strokeDash=[3, 3])
        layers.insert(0, rules.encode(x="step:Q", tooltip="round:N"))
    return altair.layer(*layers).properties(width="container", height=HEIGHT)


def rate_chart(rates: Any) -> Chart:
    """Return the learning rate over the optimizer steps. rates: lines of step and learning_rate."""
    import altair

    return (
        altair.Chart(_data(lines_of(rates)), width="container", height=HEIGHT / 2)
        .mark_line(color=GREEN, strokeWidth=2, point={"size": 12, "opacity": 0, "color": GREEN})
        .encode(
            x=altair.X("step:Q", title="optimizer step", axis=_whole(), scale=altair.Scale(nice=False)),
            y=altair.Y("learning_rate:Q", title="learning rate", axis=altair.Axis(format="~e", tickCount=3)),
            tooltip=[altair.Tooltip("step:Q", format=","), altair.Tooltip("learning_rate:Q", format=".3e")],
        )
    )


def _data(lines: Sequence[Mapping[str, Any]]) -> Any:
    import altair

    return altair.Data(values=[dict(line) for line in lines])


def _kinds(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(str(line["of"]) for line in lines))


def _color(field: str, colors: Mapping[str, str]) -> Any:
    import altair

    scale = altair.Scale(domain=list(colors), range=list(colors.values()))
    return altair.Color(
        f"{field}:N", scale=scale, title=None, legend=altair.Legend(orient="top", symbolOpacity=1)
    )


def _shades(kinds: Sequence[str]) -> dict[str, str]:
    """Return colours of the pool and of rounds after each other; the last is the one that stands out."""
    others = [kind for kind in kinds if kind != POOL]
    found = {kind: SERIES[place % len(SERIES)] for place, kind in enumerate(others)}
    return {kind: COLORS[POOL] for kind in kinds if kind == POOL} | found | dict.fromkeys(others[-1:], ORANGE)


def _plain() -> Any:
    """Return an axis of numbers of any size, without zeros behind their last digit."""
    import altair

    return altair.Axis(format=".3~g", tickCount=6)


def _whole() -> Any:
    """Return an axis of whole numbers."""
    import altair

    return altair.Axis(tickMinStep=1, format=",d", tickCount=8)


def _of_table(chart: Any, pick: Sequence[str]) -> Any:
    """Return a chart of one table's lines, where there are tables to choose from."""
    return chart.transform_filter("datum.table == table") if pick else chart


def _picked(chart: Any, pick: Sequence[str]) -> Any:
    """Return a chart with a list of tables to choose from, where there is more than one."""
    import altair

    if not pick:
        return chart
    menu = altair.binding_select(options=list(pick), name="Scores of ") if len(pick) > 1 else altair.Undefined
    return chart.add_params(altair.param(name="table", value=pick[0], bind=menu))
