"""`dataflex select`: from a score table to probabilities and the weighted index that a round trains on."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from dataflex_pipeline.api import Strategy
from dataflex_pipeline.errors import ConfigError, RunError, UserError
from dataflex_pipeline.sampling.draw import Drawn, DrawSettings, draw, draw_uniform, top_k_probabilities
from dataflex_pipeline.sampling.exported import export_probabilities
from dataflex_pipeline.sampling.imported import Imported
from dataflex_pipeline.sampling.probabilities import import_probabilities, write_probabilities
from dataflex_pipeline.schemas import INDEX
from dataflex_pipeline.seeds import derive_seed
from dataflex_pipeline.store.atomic import commit, set_aside
from dataflex_pipeline.store.fingerprint import digest
from dataflex_pipeline.store.parts import PartedTable
from dataflex_pipeline.store.stale import is_current, is_kept
from dataflex_pipeline.store.tables import TableFile, table_writer

from .context import Context
from .outcome import Outcome, note
from .prepare import open_split
from .score import Scoring, is_scored, plan_scoring

DRAFT = ".draft"
"""Ending of a probability table whose index is not drawn yet."""
GROUP_PREFIX = "similarity_"
"""Score columns that round_robin takes turns over."""


def positions(context: Context, number: int) -> int:
    """Return the training positions of a round: steps x global batch."""
    config = context.given
    return (config.warmup_step if number == 0 else config.update_step) * context.global_batch


def draw_settings(
    context: Context,
    number: int,
    strategy: Strategy,
    replacement: bool,
    groups: tuple[str, ...] = (),
    over_target_rows: bool = False,
) -> DrawSettings:
    """Return how a round's rows are drawn, with the round's own random stream."""
    config = context.given
    return DrawSettings(
        strategy=strategy,
        positions=positions(context, number),
        num_samples=config.num_samples if number else None,
        fraction=config.fraction if number else None,
        token_budget=config.token_budget if number else None,
        replacement=replacement,
        weights=config.weights if number else "uniform",
        source_quotas=config.source_quotas if number else {},
        shuffle=not config.disable_shuffling,
        seed=derive_seed(config.seed, "select", number),
        group_columns=groups,
        over_target_rows=over_target_rows,
    )


def _settings_as_ingredients(settings: DrawSettings) -> dict[str, Any]:
    return {
        **{name: getattr(settings, name) for name in ("strategy", "positions", "num_samples", "fraction")},
        **{name: getattr(settings, name) for name in ("token_budget", "replacement", "weights", "shuffle")},
        "source_quotas": dict(settings.source_quotas),
        "group_columns": list(settings.group_columns),
        "seed": settings.seed,
        **({"over": "target_rows"} if settings.over_target_rows else {}),
    }


def draw_warmup(context: Context) -> Outcome:
    """Write the index of round 0: valid rows of the pool, drawn uniformly."""
    began = time.monotonic()
    pool = open_split(context, "pool")
    settings = warmup_draw(context)
    wanted = wanted_warmup_index(pool, settings)
    output = context.run.round(0).index
    current = is_current(output, wanted, "The index of the warm-up", overwrite=context.overwrite)
    if not current:
        context.memo.forget_output(output)
        _write_index(context, output, draw_uniform(pool, settings), wanted, {"round": "0"})
        context.memo.written(output)
    found = f"{TableFile(output).metadata.get('found', '')}, drawn uniformly"
    return Outcome("select, warm-up", output, not current, time.monotonic() - began, found)


def warmup_draw(context: Context) -> DrawSettings:
    """Return how the rows of round 0 are drawn."""
    return draw_settings(context, 0, "sample", replacement=False)


def wanted_warmup_index(pool: PartedTable, settings: DrawSettings) -> dict[str, Any]:
    """Return what the index of round 0 is made from."""
    return {"table": "index", "pool": pool.fingerprint, "draw": _settings_as_ingredients(settings)}


def wanted_probabilities(context: Context, scoring: Scoring, scores: TableFile) -> dict[str, Any]:
    """Return what a method's probability table of a round is made from."""
    return {
        "table": "probabilities",
        "scores": scores.fingerprint,
        "params": scoring.wanted["params"],
        "draw": _settings_as_ingredients(round_settings(context, scoring, scores)),
    }


def wanted_index(context: Context, scoring: Scoring, scores: TableFile, probabilities: str) -> dict[str, Any]:
    """Return what the index of a round is made from, the probabilities by their fingerprint."""
    return {
        "table": "index",
        "method": scoring.name,
        "probabilities": probabilities,
        "draw": _settings_as_ingredients(round_settings(context, scoring, scores)),
    }


def select(context: Context, number: int, name: str) -> Outcome:
    """Write ``probabilities/<method>.parquet`` and ``index.parquet`` of a round unless they are there."""
    began = time.monotonic()
    scoring = plan_scoring(context, number, name)
    scores = _finished_scores(context, scoring)
    settings = round_settings(context, scoring, scores)
    wanted = wanted_probabilities(context, scoring, scores)
    where = context.run.round(number)
    for_index = wanted_index(context, scoring, scores, digest(wanted))
    output, label = where.probabilities(name), f"of round {number}"
    kept = is_kept(output, wanted, f"The {name} probabilities {label}", overwrite=context.overwrite)
    done = not (is_kept(where.index, for_index, f"The index {label}", overwrite=context.overwrite) and kept)
    if done:
        for path in (output, where.index):
            context.memo.forget_output(path)
        _select(context, scoring, scores, settings, None if kept else wanted, for_index)
        for path in (output, where.index):
            context.memo.written(path)
        note(context, "select", number, began, on_device=False, method=name)
    else:
        _export(context, scoring, TableFile(output))
    found = TableFile(where.index).metadata.get("found", "")
    return Outcome(f"select {name}, round {number}", where.index, done, time.monotonic() - began, found)


def _select(
    context: Context,
    scoring: Scoring,
    scores: TableFile,
    settings: DrawSettings,
    wanted: dict[str, Any] | None,
    for_index: dict[str, Any],
) -> None:
    """Write the probabilities (where ``wanted``) and the index; the old ones stay until both can be made."""
    where = context.run.round(scoring.selection.round)
    final = where.probabilities(scoring.name)
    draft = final if wanted is None else final.with_name(final.name + DRAFT)
    drawn = None
    try:
        if wanted is not None and not is_kept(draft, wanted, "The draft", overwrite=True):
            drawn = _write_probabilities(context, scoring, scores, settings, draft, wanted)
        drawn = drawn or _draw(context, scoring, scores, settings, TableFile(draft))
        _export(context, scoring, TableFile(draft))
    except UserError:
        if draft != final:
            draft.unlink(missing_ok=True)
        raise
    if draft != final:
        set_aside(final)
        commit(draft, final)
    set_aside(where.index)
    notes = {"method": scoring.name, "round": str(scoring.selection.round)}
    _write_index(context, where.index, drawn, for_index, notes)


def _export(context: Context, scoring: Scoring, probabilities: TableFile) -> None:
    """Write the probabilities where the method's parameters say, too."""
    path = scoring.method.probabilities_to
    if path is not None and export_probabilities(probabilities, path, overwrite=context.overwrite):
        context.progress.say(f"  {scoring.name}: probabilities also in {path}")


def _draw(
    context: Context,
    scoring: Scoring,
    scores: TableFile,
    settings: DrawSettings,
    probabilities: TableFile | None,
) -> Drawn:
    if not settings.over_target_rows:
        return draw(scores, probabilities, scoring.pool, settings)
    from .rankings import PoolRankings

    rankings = PoolRankings(context, scoring)
    drawn = draw(scores, None, scoring.pool, settings, rankings=rankings, block_rows=rankings.block_rows)
    return replace(drawn, notices=(*rankings.notices, *drawn.notices))


def _finished_scores(context: Context, scoring: Scoring) -> TableFile:
    number = scoring.selection.round
    path = context.run.round(number).scores(scoring.name)
    if not is_scored(context, scoring):
        raise RunError(
            f"Round {number} has no finished {scoring.name} scores ({path}).",
            "A selection is made from a score table.",
            f"Run `dataflex score --round {number} --method {scoring.name}` first.",
        )
    return TableFile(path)


def round_settings(context: Context, scoring: Scoring, scores: TableFile) -> DrawSettings:
    """Return how the rows of a scored round are drawn."""
    strategy = context.given.strategy or scoring.method.default_strategy
    replacement = context.given.replacement
    if replacement is None:
        replacement = bool(getattr(scoring.method.params, "replacement", False)) and strategy == "sample"
    groups: tuple[str, ...] = ()
    over_rows = False
    if strategy == "round_robin":
        groups = tuple(column for column in scores.schema.names if column.startswith(GROUP_PREFIX))
        over_rows = _takes_turns_by_row(context, scoring, len(groups))
    return draw_settings(
        context, scoring.selection.round, strategy, replacement, () if over_rows else groups, over_rows
    )


def _takes_turns_by_row(context: Context, scoring: Scoring, n_groups: int) -> bool:
    """Whether target rows take turns rather than groups.

    Raises:
        ConfigError: target rows were asked for, and the method has one ranking of the pool only.
    """
    over, able = context.given.round_robin_over, scoring.method.ranks_by_target_row
    if over == "target_rows" and not able:
        raise ConfigError(
            f"round_robin_over: target_rows was set with the method {scoring.name}.",
            "Target rows take turns by their own rankings of the pool, and this method has only one for all.",
            "Set round_robin_over: groups if it has groups, or use a method that compares row with row, "
            "such as less.",
        )
    return able and (over == "target_rows" or (over is None and n_groups < 2))


def _write_probabilities(
    context: Context,
    scoring: Scoring,
    scores: TableFile,
    settings: DrawSettings,
    output: Path,
    wanted: dict[str, Any],
) -> Drawn | None:
    """Write the probability table; strategies that are not random draw first, and the draw is returned."""
    notes = {"method": scoring.name, "round": str(scoring.selection.round)}
    if settings.strategy != "sample":
        drawn = _draw(context, scoring, scores, settings, None)
        top_k_probabilities(scores, drawn, output, wanted, notes)
        return drawn
    scoring.lines.clear()
    if isinstance(scoring.method, Imported):
        file = scoring.method.probabilities_from
        for notice in import_probabilities(file, scores, output, wanted, notes).notices:
            scoring.selection.say(notice)
        return None
    fitted = scoring.method.fit(scores, scoring.selection)
    notes["notices"] = "\n".join(scoring.lines)
    write_probabilities(scores, lambda block: scoring.method.weigh(block, fitted), output, wanted, notes)
    return None


def _write_index(
    context: Context, output: Path, drawn: Drawn, wanted: dict[str, Any], notes: dict[str, str]
) -> None:
    for notice in drawn.notices:
        context.progress.say(f"  select: {notice}")
    found = f"{drawn.index.num_rows:,} positions, {drawn.n_distinct:,} different rows"
    with table_writer(
        output, INDEX, wanted, notes | {"found": found, "notices": "\n".join(drawn.notices)}
    ) as write:
        write(drawn.index)


def read_index(context: Context, number: int) -> tuple[pa.Table, str]:
    """Return a round's index and its fingerprint.

    Raises:
        RunError: the round has no index yet.
    """
    path = context.run.round(number).index
    if not path.is_file():
        raise RunError(
            f"Round {number} has no index ({path}).",
            "A round trains on exactly the rows of its index.",
            f"Run `dataflex select --round {number}` first." if number else "Run `dataflex warmup`.",
        )
    table = TableFile(path)
    return pa.Table.from_batches(list(table.blocks()), schema=table.schema), table.fingerprint
