"""A picture of the training: loss and learning rate of every step, all rounds so far."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from dataflex_pipeline.store.atomic import atomic_file
from dataflex_pipeline.training.course import LOG, StepLog

PLOT = "training_loss.png"


def plot_training(run_folder: Path, last_round: int) -> Path:
    """Draw training loss, evaluation loss and learning rate over the optimizer steps of the whole run.

    Args:
        run_folder: the run; the logs of its rounds are read.
        last_round: rounds up to this one are drawn.

    Returns:
        The PNG file in the run folder, written whole.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    logs = _logs(run_folder, last_round)
    figure = Figure(figsize=(9, 6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    _draw_loss(top, logs)
    _draw_rate(bottom, logs)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    with atomic_file(run_folder / PLOT) as temporary:
        temporary.write_bytes(buffer.getvalue())
    return run_folder / PLOT


def _logs(run_folder: Path, last_round: int) -> list[StepLog]:
    paths = [run_folder / f"round-{number:02d}" / LOG for number in range(last_round + 1)]
    return [StepLog.parse(path.read_text()) for path in paths if path.is_file()]


def _draw_loss(axes: Any, logs: list[StepLog]) -> None:
    for number, log in enumerate(logs):
        steps = log.steps()
        axes.plot(
            [line["step"] for line in steps],
            [line["loss"] for line in steps],
            color="#9aa7b5",
            linewidth=1.0,
            label="training, each step" if number == 0 else None,
        )
        # One mean per round, because single steps of a selected round are noisy.
        mean = sum(line["loss"] for line in steps) / len(steps)
        axes.hlines(
            mean,
            steps[0]["step"],
            steps[-1]["step"],
            color="#1f5fa8",
            linewidth=2.0,
            label="training, mean of a round" if number == 0 else None,
        )
        if number:
            axes.axvline(steps[0]["step"] - 0.5, color="#cccccc", linewidth=0.8, linestyle=":")
    evaluations = [line for log in logs for line in log.lines if "eval_loss" in line]
    if evaluations:
        axes.plot(
            [line["step"] for line in evaluations],
            [line["eval_loss"] for line in evaluations],
            color="#c2571a",
            marker="o",
            markersize=4,
            label="target",
        )
    axes.set_ylabel("loss, nats per token")
    axes.set_title("Training loss (dotted: a new round begins)")
    axes.legend(frameon=False)
    axes.grid(alpha=0.25)


def _draw_rate(axes: Any, logs: list[StepLog]) -> None:
    lines = [line for log in logs for line in log.steps()]
    axes.plot([line["step"] for line in lines], [line["learning_rate"] for line in lines], color="#3f7f4f")
    axes.set_ylabel("learning rate")
    axes.set_xlabel("optimizer step")
    axes.grid(alpha=0.25)
