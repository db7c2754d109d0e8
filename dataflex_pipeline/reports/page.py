"""A report as one HTML page that needs nothing else: no network, no script, pictures inside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from dataflex_pipeline.reports import charts
from dataflex_pipeline.reports.between_scores import TOP, is_constant

SHOWN = 600
"""Characters shown of a message in an example."""


def page(found: dict[str, Any]) -> str:
    """Return the page for what `findings.findings` found of a run."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": _number, "seconds": _seconds, "shortened": _shortened}
    environment.filters |= {"percent": _percent}
    environment.tests["constant"] = is_constant
    pictures = {
        "curves": charts.curves(found["log"], found["first_steps"]) if found["log"] else "",
        "scores": [_score_picture(each) for each in found["scores"]],
    }
    return environment.get_template("page.html.jinja").render(
        **found,
        pictures=pictures,
        top=TOP,
        shown=_shown_first(found),
        settings_text=yaml.safe_dump(found["settings"], sort_keys=False, allow_unicode=True),
        provenance_text=json.dumps(found["provenance"], indent=2, ensure_ascii=False),
    )


def _shown_first(found: dict[str, Any]) -> str:
    """Return the view of the scores whose best rows are open: those that the last round was selected by."""
    last = found["rounds"][-1]
    return f"scores_{last['number']}_{last['selected_by']}"


def _score_picture(look: dict[str, Any]) -> str:
    shape = look.get("histogram")
    if not shape or is_constant(look):
        return ""
    title = f"{shape['column']} of {look['name']}, round {look['facts'].get('round')}"
    return charts.histogram(shape["bins"], title)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _percent(value: float) -> str:
    return f"{value:.0%}"


def _seconds(value: float | None) -> str:
    """Return a duration in brackets, or nothing."""
    if value is None:
        return ""
    if value < 120:
        return f" ({value:.1f} s)"
    return f" ({value / 60:.0f} min)" if value < 7200 else f" ({value / 3600:.1f} h)"


def _shortened(text: str | None) -> str:
    whole = text or ""
    return whole if len(whole) <= SHOWN else whole[:SHOWN] + f" ... ({len(whole) - SHOWN:,} characters more)"
