"""The figures of an evaluation drawn as a table."""

from __future__ import annotations

from collections.abc import Sequence

from dataflex_pipeline.evaluation.figures import Figure
from dataflex_pipeline.terminal import console

COLUMNS = ("task", "metric", "value", "stderr", "over", "unscored")
BASE_MODEL = "base model"
"""What the row of the model before any training is called."""


def draw_figures(figures: Sequence[Figure], base: Sequence[Figure] | None = None) -> None:
    """Print one line per figure; those of the base model below them, where they are of the same kind.

    Args:
        figures: of a model. base: of the base model; None where it is the model itself.
    """
    rows = [_cells(figure) for figure in figures]
    columns = list(COLUMNS)
    if base:
        columns.insert(2, "model")
        kinds = {_kind(figure) for figure in figures}
        rows = [[*row[:2], "", *row[2:]] for row in rows]
        rows += [[*row[:2], BASE_MODEL, *row[2:]] for row in (_cells(f) for f in base if _kind(f) in kinds)]
        rows.sort(key=lambda row: [_cells(f)[:2] for f in figures].index(row[:2]))
    console.print_table("", columns, rows, wraps="task")


def _kind(figure: Figure) -> tuple[str | None, ...]:
    """Return what two figures have to have in common to stand side by side."""
    return figure.task, figure.metric, figure.settings, figure.rows


def _cells(figure: Figure) -> list[str]:
    return [
        figure.task,
        figure.metric,
        f"{figure.value:.4f}",
        "" if figure.stderr is None else f"{figure.stderr:.4f}",
        "" if figure.n is None else f"{figure.n:,}",
        "" if not figure.unscored else f"{figure.unscored:,}",
    ]
