"""`dataflex status`: what of a run is done, stale or missing. Reads only."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

from dataflex_pipeline.api import Silent, Split
from dataflex_pipeline.errors import CorruptError, RunError, StaleError, UserError
from dataflex_pipeline.store.parts import PartedTable
from dataflex_pipeline.store.stale import found_ingredients, is_complete, is_current
from dataflex_pipeline.store.tables import TableFile
from dataflex_pipeline.training import read_marker

from . import console
from .context import Context, Options, open_context, parse_assignments, require_run
from .damage import BEST, check_best, check_checkpoint, check_tables, last_finished
from .existing import check_settings
from .final_adapter import published_state
from .prepare import describe, look, open_split, splits_of, table_folder
from .score import describe_scores, is_scored, plan_scoring
from .select_index import wanted_index, wanted_probabilities, wanted_warmup_index, warmup_draw
from .train_round import describe_checkpoint, ended_early, wanted_checkpoint
from .versions import versions_said

Row = tuple[str, str, str]
COLUMNS = ("output", "state", "what")


def status(
    config: Path | None, settings: list[str], run: str | None, method: str | None, as_json: bool = False
) -> None:
    """Print one line per output of the run, or all of it as JSON.

    done; unfinished (the next command goes on with it); stale, with the changed settings; damaged;
    missing; or unknown, where what it was made from cannot be looked at.
    """
    with console.messages_to_stderr(as_json):
        context = open_context(Options(config, parse_assignments(settings), run, method), quiet=Silent())
    require_run(context)
    rows = _data_rows(context)
    for number in range(context.given.update_times + 1):
        rows += _round_rows(context, number)
        if ended_early(context, number):
            break
    rows += _copies(context)
    changed, command = _changed(context), _next_command(context, rows)
    if as_json:
        outputs = [dict(zip(COLUMNS, row, strict=True)) for row in rows]
        found = {
            "run": str(context.run.folder),
            "outputs": outputs,
            "changed_settings": changed,
            "versions": versions_said(context),
            "next": command,
        }
        console.out.file.write(json.dumps(found, indent=2, ensure_ascii=False) + "\n")
        return
    console.print_table(f"Run {context.run.folder}", COLUMNS, rows, wraps="what")
    for line in versions_said(context):
        console.line(line)
    if changed is not None:
        console.line(changed, style="yellow")
    console.line(f"Next:  {command}" if command is not None else _ending(context))


def _data_rows(context: Context) -> list[Row]:
    splits = splits_of(context)
    return [
        (split, *_state(table_folder(context, split), partial(_split, context, split))) for split in splits
    ]


def _state(output: Path, look_at: Callable[[], str]) -> tuple[str, str]:
    """Return (state, what) of one output; ``look_at`` describes a finished one, or raises."""
    try:
        if found_ingredients(output) is None:
            return "missing", ""
        if not is_complete(output):
            return "unfinished", "the same command goes on with it"
        return "done", look_at()
    except StaleError as error:
        return "stale", "; ".join(line.strip() for line in error.what.splitlines()[1:])
    except CorruptError as error:
        return "damaged", error.what
    except RunError as error:
        return "stale", error.what
    except UserError as error:
        return "unknown", error.what


def _split(context: Context, split: Split) -> str:
    folder = table_folder(context, split)
    is_current(folder, look(context, split).wanted, f"The {split}")
    return describe(PartedTable.open(folder))


def _round_rows(context: Context, number: int) -> list[Row]:
    where = context.run.round(number)
    rows: list[Row] = []
    for path in sorted(where.scores("any").parent.glob("*.parquet")):
        state = _state(path, partial(_scores, context, number, path.stem))
        rows.append((f"round {number} scores/{path.stem}", *state))
    if number and not rows:
        rows.append((f"round {number} scores", "missing", ""))
    rows.append((f"round {number} index", *_state(where.index, partial(_index, context, number))))
    rows.append(
        (f"round {number} checkpoint", *_state(where.checkpoint, partial(_checkpoint, context, number)))
    )
    return rows


def _scores(context: Context, number: int, name: str) -> str:
    path = context.run.round(number).scores(name)
    context.memo.check_output(path)
    is_scored(context, plan_scoring(context, number, name))
    return describe_scores(TableFile(path))


def _index(context: Context, number: int) -> str:
    """Describe an index; it belongs to the method that made it, whatever the configuration names now."""
    where = context.run.round(number)
    check_tables(context, number)
    table = TableFile(where.index)
    if number == 0:
        is_current(
            where.index, wanted_warmup_index(open_split(context, "pool"), warmup_draw(context)), "index"
        )
        return f"{table.metadata.get('found', '')}, drawn uniformly"
    name = table.metadata["method"]
    for needed in (where.scores(name), where.probabilities(name)):
        if not needed.is_file():
            raise RunError(
                f"{console.shown(needed, context.run.folder)} is gone: it was made from it",
                "",
                "Score again.",
            )
    scoring, scores = plan_scoring(context, number, name), TableFile(where.scores(name))
    probabilities = TableFile(where.probabilities(name))
    is_current(probabilities.path, wanted_probabilities(context, scoring, scores), "probabilities")
    is_current(where.index, wanted_index(context, scoring, scores, probabilities.fingerprint), "index")
    return f"{table.metadata.get('found', '')}, by {name}"


def _checkpoint(context: Context, number: int) -> str:
    where = context.run.round(number)
    check_checkpoint(context, number)
    if not where.index.is_file():
        raise RunError(
            f"{console.shown(where.index, context.run.folder)} is gone: it was trained on it",
            "",
            "Select again.",
        )
    wanted = wanted_checkpoint(context, number, TableFile(where.index).fingerprint)
    is_current(where.checkpoint, wanted, f"The checkpoint of round {number}")
    return describe_checkpoint(context, number)


def _changed(context: Context) -> str | None:
    """Return which settings given now are not the run's, in words."""
    try:
        check_settings(context)
    except StaleError as error:
        return error.what
    return None


def _copies(context: Context) -> list[Row]:
    """Return the lines of best/ and of the adapter at the top of the run, where the run has them."""
    rows: list[Row] = []
    last = last_finished(context)
    if last is None:
        return rows
    if context.given.load_best_model_at_end:
        best = context.run.folder / BEST
        state, what = _state(best, partial(_best, context, last))
        if state == "missing":
            try:
                check_best(context, last)
            except CorruptError as error:
                state, what = "damaged", error.what
        rows.append((BEST, state, what))
    if context.given.output_dir is not None and context.given.finetuning_type == "lora":
        rows.append(("adapter", *published_state(context)))
    return rows


def _best(context: Context, last: int) -> str:
    check_best(context, last)
    marker = read_marker(context.run.folder / BEST)
    assert marker is not None  # noqa: S101 (it is complete)
    return f"the best checkpoint, of step {marker.step}"


def _next_command(context: Context, rows: list[Row]) -> str | None:
    """Return the command that goes on with the run, or repairs it; None where it has ended."""
    last = last_finished(context)
    if last is not None and any(state == "damaged" for _, state, _ in rows):
        return f"dataflex round {last} {context.again} --overwrite"
    for number in range(context.given.update_times + 1):
        where = context.run.round(number)
        scored = any(where.scores("any").parent.glob("*.parquet")) or not number
        if not (is_complete(where.checkpoint) and where.index.is_file() and scored):
            return f"dataflex round {number} {context.again}"
        if ended_early(context, number):
            break
    if any(state in ("missing", "unfinished") for _, state, _ in rows):
        return f"dataflex round {last} {context.again}"
    return None


def _ending(context: Context) -> str:
    for number in range(context.given.update_times + 1):
        if ended_early(context, number):
            return f"The run ended in round {number} by early stopping."
    return "The run is at its horizon."
