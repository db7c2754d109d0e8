"""A run at one look: which tables it has, and round by round what was selected and trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dataflex_pipeline.reports.catalogue import RunTable, rounds_of
from dataflex_pipeline.reports.look import shared_rows
from dataflex_pipeline.reports.numbers import effective_size
from dataflex_pipeline.reports.query import Queries
from dataflex_pipeline.store.run import RunFolder
from dataflex_pipeline.training.marker import read_marker

SETTINGS = ("model_name_or_path", "dataset", "eval_dataset", "component_name", "update_times", "seed")


def overview(queries: Queries, run: RunFolder, tables: Sequence[RunTable]) -> dict[str, Any]:
    """Return what a run is, its rounds and its tables, as plain values.

    Args:
        queries: over the tables. run: the run. tables: all of its finished ones.
    """
    configuration, record = run.read()
    return {
        "run": run.folder.name,
        "created": record.get("created"),
        "settings": {name: configuration.get(name) for name in SETTINGS},
        "versions": record.get("versions", {}),
        "rounds": [_round(queries, run, number, tables) for number in rounds_of(run)],
        "tables": [
            {
                "view": table.view,
                "lines": table.n_rows,
                "bytes": table.n_bytes,
                "path": table.path.relative_to(run.folder).as_posix(),
            }
            for table in tables
        ],
    }


def _round(queries: Queries, run: RunFolder, number: int, tables: Sequence[RunTable]) -> dict[str, Any]:
    of_round = [table for table in tables if table.round == number]
    found: dict[str, Any] = {
        "round": number,
        "scored": [table.name for table in of_round if table.kind == "scores"],
    }
    index = next((table for table in of_round if table.kind == "index"), None)
    if index is not None:
        found["method"] = index.notes().get("method", "uniform")
        found["positions"] = index.n_rows
        rows = queries.table(index.view).project("row").distinct()
        found["rows"] = rows.aggregate("count(*)").fetchall()[0][0]
        before = next((t for t in tables if t.kind == "index" and t.round == number - 1), None)
        if before is not None:
            found["already_in_round_before"] = shared_rows(queries, index.view, [before.view])["share"]
    probabilities = (t for t in of_round if t.kind == "probabilities" and t.name == found.get("method"))
    for table in probabilities:
        found["effective_sample_size"] = effective_size(queries.table(table.view), "probability")
    marker = read_marker(run.round(number).checkpoint)
    if marker is not None and marker.result is not None:
        found["train_loss"] = marker.result["train_loss"]
        found["target_loss"] = marker.result["metrics"].get("eval_loss")
    return found
