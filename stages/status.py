"""`dataflex status`: what of a run is done, stale or missing. Reads only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dataflex_pipeline.errors import CorruptError, RunError, StaleError
from dataflex_pipeline.methods import shipped_methods
from dataflex_pipeline.store.parts import PartedTable
from dataflex_pipeline.store.stale import found_ingredients, is_complete, is_current, stale
from dataflex_pipeline.store.tables import TableFile
from stages import console
from stages.context import Context, Options, open_context, parse_assignments, require_run
from stages.prepare import describe, has_target, look, table_folder
from stages.score import describe_scores, plan_scoring
from stages.train_round import describe_checkpoint, ended_early, wanted_checkpoint

Row = tuple[str, str, str]


def status(config: Path | None, settings: list[str], run: str | None, method: str | None) -> None:
    """Print one line per output of the run: done, stale (with the changed settings), damaged or missing."""
    context = open_context(Options(config, parse_assignments(settings), run, method))
    require_run(context)
    rows = _data_rows(context)
    for number in range(context.given.update_times + 1):
        rows += _round_rows(context, number)
    console.print_table(f"Run {context.run.folder}", ["output", "state", "what"], [list(row) for row in rows])
    _say_next(context)


def _data_rows(context: Context) -> list[Row]:
    rows: list[Row] = [("pool", *_state(lambda: _split(context, "pool")))]
    if has_target(context):
        rows.append(("target", *_state(lambda: _split(context, "target"))))
    return rows


def _state(look_at: Callable[[], str | None]) -> tuple[str, str]:
    """Return (state, what) of one output; ``look_at`` returns None for a missing one."""
    try:
        found = look_at()
    except StaleError as error:
        return "stale", " ".join(error.what.splitlines()[1:]).strip()
    except (CorruptError, RunError) as error:
        return "damaged" if isinstance(error, CorruptError) else "missing", error.what
    return ("missing", "") if found is None else ("done", found)


def _split(context: Context, split: str) -> str | None:
    name = "pool" if split == "pool" else "target"
    folder = table_folder(context, name)  # type: ignore[arg-type]
    if found_ingredients(folder) is None:
        return None
    if not is_current(folder, look(context, name).wanted, f"The {name}"):  # type: ignore[arg-type]
        return None
    return describe(PartedTable.open(folder))


def _round_rows(context: Context, number: int) -> list[Row]:
    where = context.run.round(number)
    label = f"round {number}"
    rows: list[Row] = []
    for path in sorted(where.scores("x").parent.glob("*.parquet")):
        name = path.stem
        rows.append((f"{label} scores/{name}", *_state(lambda name=name: _scores(context, number, name))))  # type: ignore[misc]
    rows.append((f"{label} index", *_state(lambda: _index(context, number))))
    rows.append((f"{label} checkpoint", *_state(lambda: _checkpoint(context, number))))
    return rows


def _scores(context: Context, number: int, name: str) -> str | None:
    path = context.run.round(number).scores(name)
    scoring = plan_scoring(context, number, name)
    return describe_scores(TableFile(path)) if is_current(path, scoring.wanted, f"scores {name}") else None


def _index(context: Context, number: int) -> str | None:
    path = context.run.round(number).index
    if not path.is_file():
        return None
    table = TableFile(path)
    method = table.metadata.get("method")
    if method in shipped_methods():
        probabilities = context.run.round(number).probabilities(method)
        ingredients = found_ingredients(path) or {}
        if probabilities.is_file() and TableFile(probabilities).fingerprint != ingredients["probabilities"]:
            raise stale(path, f"The index of round {number}", ["probabilities: made again since"])
    return table.metadata.get("found", "")


def _checkpoint(context: Context, number: int) -> str | None:
    where = context.run.round(number)
    if not is_complete(where.checkpoint):
        return None
    fingerprint = TableFile(where.index).fingerprint
    is_current(
        where.checkpoint, wanted_checkpoint(context, number, fingerprint), f"The checkpoint of round {number}"
    )
    return describe_checkpoint(context, number)


def _say_next(context: Context) -> None:
    for number in range(context.given.update_times + 1):
        if not is_complete(context.run.round(number).checkpoint):
            console.line(f"Next:  dataflex round {number} --run {context.run.folder.name}")
            return
        if ended_early(context, number):
            console.line(f"The run ended in round {number} by early stopping.")
            return
    console.line("The run is at its horizon.")
