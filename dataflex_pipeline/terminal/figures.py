"""The figures of an evaluation drawn as a table."""

from __future__ import annotations

from collections.abc import Sequence

from dataflex_pipeline.evaluation.figures import Figure
from dataflex_pipeline.terminal import console

COLUMNS = ("task", "metric", "value", "stderr", "over", "unscored")


def draw_figures(figures: Sequence[Figure]) -> None:
    """Print one line per figure."""
    rows = [
        [
            figure.task,
            figure.metric,
            f"{figure.value:.4f}",
            "" if figure.stderr is None else f"{figure.stderr:.4f}",
            "" if figure.n is None else f"{figure.n:,}",
            "" if not figure.unscored else f"{figure.unscored:,}",
        ]
        for figure in figures
    ]
    console.print_table("", COLUMNS, rows, wraps="task")
