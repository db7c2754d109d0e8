"""`dataflex evaluate`: how good the model of a round is, as a table in the run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from dataflex_pipeline.evaluation.figures import Figure
from dataflex_pipeline.pipeline.evaluate import Wanted
from dataflex_pipeline.pipeline.evaluate import evaluate as evaluate_run
from dataflex_pipeline.pipeline.locate import Options

from . import console
from .opening import open_run

COLUMNS = ("task", "metric", "value", "stderr", "over", "unscored")


def evaluate(options: Options, number: int | None, wanted: Wanted, as_json: bool) -> None:
    """Evaluate the checkpoint of a round (None: the last finished one) and print the figures."""
    with console.messages_to_stderr(as_json):
        run = open_run(options)
        chosen, path, figures = evaluate_run(run, number, wanted)
    if as_json:
        found = {"run": run.folder.name, "round": chosen, "figures": [asdict(f) for f in figures]}
        console.out.file.write(json.dumps(found, indent=2) + "\n")
        return
    console.line(f"Round {chosen} of {run.folder}", style="bold")
    console.print_table("", COLUMNS, _rows(figures), wraps="task")
    console.line(f"table:  {path}")


def _rows(figures: Sequence[Figure]) -> list[list[str]]:
    return [
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
