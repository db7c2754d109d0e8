"""A comparison of runs, or of the methods of one run, drawn as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dataflex_pipeline.reports.comparison import Comparison, Paired, Spread
from dataflex_pipeline.reports.records import RunRecord
from dataflex_pipeline.terminal import console
from dataflex_pipeline.terminal.answers import clipped

SOURCES = 12
"""Sources that are shown; --json has all."""
TEXT = 80
"""Characters shown of a row's text; --json has more."""
CURVE_LINES = 12
"""Evaluations shown of the target loss, evenly spaced; --json has all."""


def draw_comparison(found: Comparison, records: Sequence[RunRecord]) -> None:
    """Print a comparison.

    Args:
        found: the comparison.
        records: the runs that were compared.
    """
    for note in found.notes:
        console.line(f"not the same: {note}", style="yellow")
    seeds = {method: sorted({r.seed for r in records if r.method == method}) for method in found.methods}
    counted = ", ".join(
        f"{method} (seed{'' if len(of) == 1 else 's'} {' '.join(map(str, of))})"
        for method, of in seeds.items()
    )
    console.line(
        f"At the end of round {found.round}: {found.step:,} steps, {found.positions:,} rows trained on."
    )
    console.line(f"Methods: {counted}")
    _print_figures(found)
    _print_curves(found)
    _print_alike("Selected rows in common, |A and B| / |A or B|, all rounds", found.methods, found.overlap)
    _print_alike(f"Rank correlation of the scores of round {found.round}", found.methods, found.correlation)


def _print_figures(found: Comparison) -> None:
    rows = []
    for name, by_method in found.figures.items():
        for method, spread in by_method.items():
            paired = found.paired.get(name, {}).get(method)
            rows.append([name, method, _number(spread.mean), _range(spread), *_against(paired)])
        rows += _base_rows(found, name)
    for name in dict.fromkeys(name for figures in found.base_model.values() for name in figures):
        rows += [] if name in found.figures else _base_rows(found, name)
    columns = ["figure", "method", "mean", "over the seeds"]
    columns += [f"minus {found.baseline}", "p (paired t)"] if found.baseline is not None else ["", ""]
    console.print_table("", columns, rows, wraps="figure")
    if not found.base_model:
        console.line("base model:  not evaluated; `dataflex evaluate RUN --round base` adds its row")


def _base_rows(found: Comparison, name: str) -> list[list[str]]:
    """Return the rows of a figure of the model before any training, where it was evaluated."""
    return [
        [name, label, _number(figures[name]), "not trained", "", ""]
        for label, figures in found.base_model.items()
        if name in figures
    ]


def _range(spread: Spread) -> str:
    return f"{_number(spread.low)} to {_number(spread.high)}" if len(spread.values) > 1 else "one seed"


def _against(paired: Paired | None) -> list[str]:
    if paired is None:
        return ["", ""]
    seeds = f"{paired.n} seed{'' if paired.n == 1 else 's'}"
    return [f"{paired.difference:+.4g}", f"{'-' if paired.p is None else f'{paired.p:.3g}'} ({seeds})"]


def _print_curves(found: Comparison) -> None:
    steps = list(found.target_loss)
    if not steps:
        console.line("No target loss while training: set eval_strategy and eval_dataset.")
        return
    every = -(-len(steps) // CURVE_LINES)
    shown = steps[::-1][::every][::-1]  # the last one always
    rows = [
        [str(step), *(_number(found.target_loss[step].get(method)) for method in found.methods)]
        for step in shown
    ]
    console.line("Target loss by step, nats per token", style="bold")
    console.print_table("", ["step", *found.methods], rows, wraps="step")


def _print_alike(title: str, methods: Sequence[str], values: Mapping[tuple[str, str], float]) -> None:
    if not values:
        return
    rows = []
    for i, one in enumerate(methods[1:], start=1):
        cells = [_number(values.get((other, one))) for other in methods[:i]]
        rows.append([one, *cells, *[""] * (len(methods) - 1 - i)])
    console.line(title, style="bold")
    console.print_table("", ["", *methods[:-1]], rows, wraps="")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def draw_methods(found: Mapping[str, Any]) -> None:
    """Print the methods of one run side by side, round by round."""
    for each in found["rounds"]:
        by = "" if each["selected_by"] is None else f", selected by {each['selected_by']}"
        console.line(f"Round {each['round']} of {found['run']}{by}", style="bold")
        for method in each["methods"]:
            if not method["has_order"]:
                console.line(f"  {method['method']}: every row has the same score, so it has no order")
        sized = "" if each["top_is"] == "asked for" else f" ({_TOP_IS[each['top_is']]})"
        console.line(f"  Best rows: the {each['top']:,} with the highest scores{sized}")
        if len(each["methods"]) < 2:
            console.line(
                "  One method is scored; `dataflex score --run "
                f"{found['run']} --round {each['round']} --method NAME` adds another"
            )
        _print_pairs(each["pairs"])
        _print_sources(each["methods"])
        for pair in each["pairs"]:
            _print_only(pair)


_TOP_IS = {
    "selected": "as many as the round selected; --top changes it",
    "a tenth of the scored rows": "a tenth of the scored rows; --top changes it",
}


def _print_pairs(pairs: Sequence[Mapping[str, Any]]) -> None:
    rows = [
        [
            " and ".join(pair["methods"]),
            _number(pair["rank_correlation"]),
            f"{pair['scored_by_both']:,}",
            f"{pair['in_common']:,}",
            f"{pair['share']:.1%}",
        ]
        for pair in pairs
    ]
    if rows:
        columns = ["methods", "rank correlation", "over rows", "best in common", "share"]
        console.print_table("", columns, rows, wraps="methods")


def _print_sources(methods: Sequence[Mapping[str, Any]]) -> None:
    ordered = [method for method in methods if len(method["sources"]) > 1]
    if not ordered:
        return
    rows = [
        [
            line["source"],
            f"{line['share_of_pool']:.1%}",
            *(f"{method['sources'][place]['share']:.1%}" for method in ordered),
        ]
        for place, line in enumerate(ordered[0]["sources"])
    ]
    names = ["source", "pool", *(method["method"] for method in ordered)]
    console.print_table("Best rows by source", names, rows[:SOURCES], wraps="source")
    if len(rows) > SOURCES:
        console.line(f"  and {len(rows) - SOURCES:,} more; --json has all")


def _print_only(pair: Mapping[str, Any]) -> None:
    for liking, lines in pair["only"].items():
        against = next(name for name in pair["methods"] if name != liking)
        rows = [
            [
                f"{line['row']:,}",
                f"{line['rank']:,}",
                f"{line['other_rank']:,}",
                _number(line["score"]),
                _number(line["other_score"]),
                line.get("source", ""),
                clipped(line.get("text", ""), TEXT),
            ]
            for line in lines
        ]
        names = ["row", f"rank, {liking}", f"rank, {against}", liking, against, "source", "text"]
        if rows:
            title = f"Liked by {liking}, least by {against}"
            console.print_table(title, names, rows, wraps="text")
