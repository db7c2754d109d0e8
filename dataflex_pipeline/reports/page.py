"""A report as one HTML page that needs nothing else: no network, no script, SVG pictures inside.

Colours of the series are of middle lightness, so that they can be told apart on light and on dark.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import yaml

from dataflex_pipeline.reports.likeness import TOP, is_constant

BLUE, ORANGE, GREEN = "#3b82c4", "#d9733a", "#3a9a68"
FAINT = "#8a94a0"
_INK = "#010203"  # stands for the page's text colour until the SVG is written
_WIDTH, _HALF = 6.0, 4.2  # inches, of a picture that has the page's width, and of one with half of it: text
# in them is of the same size on the page, and a phone does not shrink it below what can be read


def curves(log: Sequence[Mapping[str, Any]], first_steps: Sequence[int]) -> str:
    """Draw training loss, target loss and learning rate over the optimizer steps of all rounds.

    Args:
        log: one entry per step and per evaluation. first_steps: where rounds 1, 2, ... begin.
    """

    def draw(figure: Any) -> None:
        loss, rate = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        steps = [entry for entry in log if "loss" in entry]
        x = [entry["step"] for entry in steps]
        loss.plot(
            x, [entry["loss"] for entry in steps], color=FAINT, linewidth=1, label="training, each step"
        )
        seen = [entry for entry in log if "eval_loss" in entry]
        if seen:
            at, values = [e["step"] for e in seen], [e["eval_loss"] for e in seen]
            loss.plot(at, values, color=ORANGE, marker="o", markersize=4, label="target")
        rate.plot(x, [entry["learning_rate"] for entry in steps], color=GREEN)
        for step in first_steps:
            for axes in (loss, rate):
                axes.axvline(step - 0.5, color=FAINT, linewidth=0.8, linestyle=":")
        loss.set_ylabel("loss, nats per token")
        loss.legend(frameon=False)
        rate.set_ylabel("learning rate")
        rate.set_xlabel("optimizer step (dotted: a round begins)")

    return _svg("Training loss, target loss and learning rate over all rounds", (_WIDTH, 4.2), draw)


def histogram(bins: Sequence[Mapping[str, Any]], what: str) -> str:
    """Draw a histogram.

    Args:
        bins: low, high and count of every bar; the outer ones may be wide (see reports/numbers.py), so bars
            stand side by side with their ends written below. what: the column.
    """

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        axes.bar(range(len(bins)), [each["count"] for each in bins], width=0.94, align="edge", color=BLUE)
        shown = range(0, len(bins) + 1, max(1, len(bins) // 4))
        edges = [*(each["low"] for each in bins), bins[-1]["high"]]
        axes.set_xticks(list(shown), [f"{edges[i]:.3g}" for i in shown])
        axes.set_xlabel(what)
        axes.set_ylabel("rows")

    return _svg(f"Histogram of {what}", (_HALF, 2.0), draw)


def _svg(label: str, size: tuple[float, float], draw: Callable[[Any], None]) -> str:
    """Return a figure (size in inches) as an SVG element that scales with the page and says what it shows."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    ink = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    style: Any = {"svg.fonttype": "none", "svg.hashsalt": label, "font.size": 9}
    style |= dict.fromkeys(ink, _INK) | {"axes.spines.top": False, "axes.spines.right": False}
    buffer = io.StringIO()
    with matplotlib.rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure)
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    body = text[text.index("<svg") :].replace(_INK, "currentColor")
    head = f'<svg role="img" aria-label="{escape(label)}" '
    return re.sub(r'\s(?:width|height)="[\d.]+pt"', "", body, count=2).replace("<svg ", head, 1)


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
        "curves": curves(found["log"], found["first_steps"]) if found["log"] else "",
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
    if not found["rounds"]:
        return ""
    last = found["rounds"][-1]
    return f"scores_{last['number']}_{last['selected_by']}"


def _score_picture(look: dict[str, Any]) -> str:
    shape = look.get("histogram")
    if not shape or is_constant(look):
        return ""
    title = f"{shape['column']} of {look['name']}, round {look['facts'].get('round')}"
    return histogram(shape["bins"], title)


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
