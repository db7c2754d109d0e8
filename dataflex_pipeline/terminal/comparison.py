"""A comparison of runs drawn as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dataflex_pipeline.reports.comparison import Comparison, Paired, Spread
from dataflex_pipeline.reports.records import RunRecord
from dataflex_pipeline.terminal import console

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
    columns = ["figure", "method", "mean", "over the seeds"]
    columns += [f"minus {found.baseline}", "p (paired t)"] if found.baseline is not None else ["", ""]
    console.print_table("", columns, rows, wraps="figure")


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
