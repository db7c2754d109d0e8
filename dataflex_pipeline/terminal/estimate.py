"""An estimate drawn as a table, a stage a line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dataflex_pipeline.estimate.costs import RowCounts
from dataflex_pipeline.estimate.records import StageCost, total
from dataflex_pipeline.estimate.run import Estimate
from dataflex_pipeline.terminal import console


def draw_estimate(folder: Path, found: Estimate) -> None:
    """Print the stages, those of all rounds together, and what the estimate rests on.

    Args:
        folder: of the run.
        found: the estimate.
    """
    model, pool = found.measured.model, found.measured.pool
    console.line(f"What {folder} will take, from one short calibration here", style="bold")
    console.line(
        f"model: {model.parameters:,} parameters, {model.trained:,} trained; in memory "
        f"{size(model.weight_bytes)} of weights, {size(model.gradient_bytes)} of gradients, "
        f"{size(model.adam_bytes)} of Adam's moments"
    )
    console.line(f"pool: {_counted(pool)}")
    if found.measured.target is not None:
        console.line(f"target: {_counted(found.measured.target)}")
    lines = [_row(name, stages) for name, stages in _grouped(found.stages)]
    lines.append(["all", "", *_row("all", [total(found.stages)])[2:]])
    heads = [
        "stage",
        "times",
        "rows",
        "tokens",
        "steps",
        "FLOP",
        "time",
        "disk",
        "memory",
        "requests",
        "seconds are",
    ]
    console.print_table("", heads, lines, wraps="stage")
    for name, stages in _grouped(found.stages):
        notes = dict.fromkeys(each.note for each in stages if each.note)
        if notes:
            console.line(f"{name}: {'; '.join(notes)}")
    for line in found.warnings:
        console.line(f"note: {line}")


def _grouped(stages: Sequence[StageCost]) -> list[tuple[str, list[StageCost]]]:
    """Put the same stage of all rounds together; the warm-up stands for itself."""
    found: dict[str, list[StageCost]] = {}
    for each in stages:
        name = f"{each.stage}, warm-up" if each.round == 0 else each.stage
        found.setdefault(name, []).append(each)
    return list(found.items())


def _row(name: str, stages: Sequence[StageCost]) -> list[str]:
    whole = total(stages)
    known = all(each.seconds is not None for each in stages)
    bases = dict.fromkeys(each.basis for each in stages)
    return [
        name,
        f"{len(stages)}",
        f"{whole.rows:,}" if whole.rows else "",
        number(whole.tokens),
        f"{whole.steps:,}" if whole.steps else "",
        number(whole.flops),
        duration(whole.seconds or 0.0) if known or whole.seconds else "?",
        size(whole.disk_bytes) if whole.disk_bytes else "",
        size(whole.memory_bytes) if whole.memory_bytes else "",
        f"{whole.requests:,}" if whole.requests else "",
        ", ".join(bases) if name != "all" else "",
    ]


def _counted(counts: RowCounts) -> str:
    about = "" if counts.exact else "about "
    return (
        f"{counts.rows:,} rows, {about}{counts.valid:,.0f} usable, {about}{counts.tokens:,.0f} tokens, "
        f"{about}{counts.responses:,.0f} of them in responses"
    )


def number(value: float) -> str:
    """Return a large count in three digits: 1.23e+09; empty for none."""
    return "" if not value else f"{value:,.0f}" if value < 1e6 else f"{value:.3g}"


def size(count: float) -> str:
    """Return bytes in a unit of thousands."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def duration(seconds: float) -> str:
    """Return seconds as they are read: 3.2 s, 4.5 min, 7.1 h, 3.3 d."""
    for unit, length in (("s", 60.0), ("min", 60.0), ("h", 48.0)):
        if seconds < length:
            return f"{seconds:.1f} {unit}"
        seconds /= 60.0 if unit != "h" else 24.0
    return f"{seconds:.1f} d"
