"""The page of the viewer: which charts it begins with, over which columns of the joined table.

Everything is a chart of Embedding Atlas in its own JSON; a reader can change, add and remove any of them.
"""

from __future__ import annotations

from typing import Any

from dataflex_pipeline.reports.joined import Joined

TABLE = "dataset"
"""The name that the page knows the table by."""
SEARCHED = 200_000
"""Rows up to which the page's text search has the prompts; it reads all of them into the browser."""

Chart = dict[str, Any]


def properties(joined: Joined, run: str) -> dict[str, Any]:
    """Return what the page is told about the table.

    Args:
        joined: the table. run: the run's name.
    """
    charts = dict(enumerate(_charts(joined, run), start=1))
    named = {str(number): chart for number, chart in charts.items()}
    data: dict[str, Any] = {"id": "row", "text": "prompt" if joined.n_rows <= SEARCHED else "source"}
    if joined.mapped:
        data["projection"] = {"x": "map_x", "y": "map_y"}
    full = {"display": "full"}
    return {
        "data": data,
        "initialState": {
            "charts": named,
            "layouts": {
                "1": {"type": "list", "name": run, "chartIds": list(named), "chartsOrder": list(named)}
            },
            "columnStyles": {"prompt": full, "response": full, "source": {"display": "badge"}},
        },
    }


def _charts(joined: Joined, run: str) -> list[Chart]:
    charts: list[Chart] = [_summary(joined, run)]
    if joined.mapped:
        charts += [_map(joined), _heat("map_x", "map_y", "Map: rows per cell")]
    charts.append({"type": "predicates", "title": "Filter by SQL"})
    charts.append(_rows(joined))
    counted = [*(["selected"] if joined.chosen else []), "source", *joined.own]
    charts += [{"type": "count-plot", "title": name, "data": {"field": name}} for name in counted]
    charts += [_histogram(each.score) for each in reversed(joined.ranked)]
    charts += [_histogram("n_response_tokens"), _histogram("n_tokens")]
    charts.append({"type": "count-plot", "title": "valid", "data": {"field": "valid"}})
    return charts


def _summary(joined: Joined, run: str) -> Chart:
    lines = [f"{joined.n_rows:,} rows of {run}, read only."]
    if joined.n_rows > SEARCHED:
        lines.append("For words in a text, filter by SQL: prompt ilike '%translate%'.")
    return {"type": "markdown", "title": "DataFlex Pipeline", "content": "\n\n".join(lines)}


def _map(joined: Joined) -> Chart:
    colour = "selected" if joined.chosen else "source"
    data = {"x": "map_x", "y": "map_y", "text": "prompt", "category": colour}
    labels = {"autoLabelEnabled": joined.n_rows <= SEARCHED}
    return {"type": "embedding", "title": "Map of the embeddings", "data": data, "config": labels}


def _rows(joined: Joined) -> Chart:
    first = joined.ranked[-1].rank if joined.ranked else "row"
    order = [{"column": first, "direction": "ascending"}]
    return {"type": "instances", "title": "Rows", "sort": order, "pageSize": 50}


def _histogram(name: str) -> Chart:
    bars = {"mark": "bar", "encoding": {"x": {"field": name}, "y": {"aggregate": "count"}}}
    return {
        "title": name,
        "layers": [bars | {"style": {"fillColor": "$markColorFade"}}, bars | {"filter": "$filter"}],
        "selection": {"brush": {"encoding": "x"}},
        "widgets": [
            {"type": "scale.type", "channel": "x"},
            {"type": "encoding.normalize", "attribute": "y", "layer": [0, 1], "options": ["x"]},
        ],
    }


def _heat(x: str, y: str, title: str) -> Chart:
    cells = {"x": {"field": x}, "y": {"field": y}, "color": {"aggregate": "count"}}
    return {
        "title": title,
        "layers": [
            {"mark": "rect", "filter": "$filter", "zIndex": -1, "encoding": cells},
            {"mark": "rect", "zIndex": -2, "encoding": {"color": {"value": 0}}},
        ],
        "selection": {"brush": {"encoding": "xy"}},
        "widgets": [{"type": "encoding.normalize", "attribute": "color", "layer": 0, "options": ["x", "y"]}],
    }
