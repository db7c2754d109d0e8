"""`dataflex score`: one method's score of every row of the pool, as a table."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dataflex_pipeline import api
from dataflex_pipeline.config.components import ComponentEntry
from dataflex_pipeline.errors import DataError, RunError
from dataflex_pipeline.features.build import FeaturePlan, build_feature, plan_feature
from dataflex_pipeline.schemas import SCORES
from dataflex_pipeline.seeds import derive_seed
from dataflex_pipeline.store.fingerprint import digest, file_digest
from dataflex_pipeline.store.parquet import ROW_GROUP
from dataflex_pipeline.store.parts import PartedTable
from dataflex_pipeline.store.ranks import column_values, quantiles
from dataflex_pipeline.store.stale import found_ingredients, is_complete, is_current
from dataflex_pipeline.store.tables import TableFile, table_writer, zip_blocks
from dataflex_pipeline.training.marker import read_marker, verify_checkpoint
from stages.context import Context
from stages.outcome import Outcome
from stages.prepare import open_split

BLOCK_BYTES = 1 << 25
"""Bytes of one feature per block, at most about."""


@dataclass(frozen=True)
class Scoring:
    """Everything that a method needs to score one round, worked out and not yet computed.

    Attributes:
        name: the method's configuration name. method: itself. entry: its configuration.
        selection: what it knows. lines: what it said. pool: the prepared pool.
        needs: plans of the feature tables, by the method's own names.
        before: the method's own scores of the round before, where it adds to them.
        wanted: ingredients of the score table.
    """

    name: str
    method: api.Method
    entry: ComponentEntry
    selection: api.Selection
    lines: list[str]
    pool: PartedTable
    needs: Mapping[str, FeaturePlan]
    before: TableFile | None
    wanted: dict[str, Any]


def plan_scoring(context: Context, number: int, name: str) -> Scoring:
    """Work out what scoring a round takes; checks the method, its parameters and the checkpoints."""
    method, entry = context.method(name)
    check_scored_round(context, number)
    lines: list[str] = []

    def say(text: str) -> None:
        lines.append(text)
        context.progress.say(f"  {name}: {text}")

    seed = derive_seed(context.given.seed if entry.seed is None else entry.seed, "method", name, number)
    before = _scores_before(context, number, name) if method.accumulates else None
    rate = _mean_learning_rate(context, number - 1)
    selection = api.Selection(number, context.given.update_times, seed, say, rate, before is not None)
    pool = open_split(context, "pool")
    part = rows_per_part(context, entry)
    needs = {
        key: plan_feature(need, context.config, partial(_feature_input, context), part)
        for key, need in method.needs(selection).items()
    }
    wanted = {
        "table": "scores",
        "method": name,
        "implementation": _implementation(entry),
        "version": method.version,
        "params": method.params.model_dump(mode="json"),
        "round": number,
        "update_times": selection.update_times,
        "seed": seed,
        "pool": pool.fingerprint,
        "features": {key: digest(plan.ingredients) for key, plan in needs.items()},
    }
    if method.accumulates:
        wanted |= {"before": before.fingerprint if before is not None else None, "learning_rate": rate}
    return Scoring(name, method, entry, selection, lines, pool, needs, before, wanted)


def _scores_before(context: Context, number: int, name: str) -> TableFile | None:
    path = context.run.round(number - 1).scores(name)
    return TableFile(path) if path.is_file() else None


def _mean_learning_rate(context: Context, number: int) -> float:
    marker = read_marker(context.run.round(number).checkpoint)
    return float((marker.result or {}).get("mean_learning_rate", 0.0)) if marker is not None else 0.0


def check_scored_round(context: Context, number: int) -> None:
    """Refuse a round that cannot be scored: the warm-up, outside the horizon, predecessor missing."""
    context.check_round(number)
    if number == 0:
        raise RunError(
            "Round 0 was asked for.",
            "The warm-up draws uniformly: there is nothing to score or select.",
            "Run `dataflex warmup` for round 0, or ask for round 1.",
        )
    before = context.run.round(number - 1)
    if not is_complete(before.checkpoint):
        command = "dataflex warmup" if number == 1 else f"dataflex round {number - 1}"
        raise RunError(
            f"Round {number} was asked for, and round {number - 1} has no finished checkpoint "
            f"({before.checkpoint}).",
            "A round is scored with the model of the round before it.",
            f"Run `{command}` first.",
        )


def _feature_input(context: Context, need: api.Need) -> api.FeatureInput:
    table = open_split(context, need.split)
    checkpoint = None if need.checkpoint is None else context.run.round(need.checkpoint).checkpoint
    fingerprint = None if checkpoint is None else digest(found_ingredients(checkpoint) or {})
    return api.FeatureInput(table, table.fingerprint, checkpoint, fingerprint)


def rows_per_part(context: Context, entry: ComponentEntry) -> int:
    """Return the unit of resume: the method's ``save_interval`` or the configuration's ``rows_per_part``."""
    return entry.save_interval or context.given.rows_per_part


def _implementation(entry: ComponentEntry) -> str:
    if entry.file is not None:
        return f"file {file_digest(Path(entry.file))}"
    return f"module {entry.module}" if entry.module is not None else f"shipped {entry.kind}"


def score(context: Context, number: int, name: str) -> Outcome:
    """Write ``round-NN/scores/<method>.parquet`` unless it is there."""
    began = time.monotonic()
    scoring = plan_scoring(context, number, name)
    output = context.run.round(number).scores(name)
    current = is_current(
        output, scoring.wanted, f"The {name} scores of round {number}", overwrite=context.overwrite
    )
    if not current:
        _write_scores(context, scoring)
        context.run.note(stage="score", round=number, method=name, seconds=time.monotonic() - began)
    found = describe_scores(TableFile(output))
    return Outcome(f"score {name}, round {number}", output, not current, time.monotonic() - began, found)


def _feature_table(context: Context, plan: FeaturePlan) -> PartedTable:
    return build_feature(
        context.run.features, plan, context.progress, overwrite=context.overwrite, verify=verify_checkpoint
    ).table


def _write_scores(context: Context, scoring: Scoring) -> None:
    tables = {key: _feature_table(context, plan) for key, plan in scoring.needs.items()}
    state = scoring.method.begin(tables, scoring.selection)
    over_pool = {key: tables[key] for key, plan in scoring.needs.items() if plan.need.split == "pool"}
    schema = pa.schema([*SCORES, *scoring.method.own_columns(state)])
    pool_columns = ["row", "row_id", "valid", "reason", *scoring.method.pool_columns]
    notes = {"method": scoring.name, "round": str(scoring.selection.round)}
    output = context.run.round(scoring.selection.round).scores(scoring.name)
    sources: list[tuple[api.BlockTable, list[str]]] = [(scoring.pool, pool_columns)]
    sources += [(table, table.schema.names) for table in over_pool.values()]
    if scoring.before is not None:
        sources.append((scoring.before, scoring.before.schema.names))
    n_valid = 0
    with table_writer(output, schema, scoring.wanted, notes) as write:
        for pool, *others in zip_blocks(*sources, max_rows=_block_rows(over_pool.values())):
            features = dict(zip(over_pool, others[: len(over_pool)], strict=True))
            block = api.Block(pool, features, others[-1] if scoring.before is not None else None)
            table = score_block(scoring.method, block, state, schema)
            n_valid += pc.sum(table.column("valid")).as_py() or 0
            write(table)
        if n_valid == 0:
            raise DataError(
                f"The method {scoring.name} gave no row a score.",
                "Every row is invalid, so nothing can be selected.",
                "The feature tables in the run's features/ folder give every row's reason.",
            )
        notes["notices"] = "\n".join(scoring.lines)


def _block_rows(tables: Iterable[PartedTable]) -> int:
    """Return the rows of a block, so that wide features (gradients) never fill the memory."""
    widest = max((_row_bytes(table.schema) for table in tables), default=1)
    return max(256, min(ROW_GROUP, BLOCK_BYTES // widest))


def _row_bytes(schema: pa.Schema) -> int:
    sizes: list[int] = [
        column.type.list_size * column.type.value_type.bit_width // 8
        for column in schema
        if pa.types.is_fixed_size_list(column.type)
    ]
    return sum(sizes) + 64


def score_block(method: api.Method, block: api.Block, state: Any, schema: pa.Schema) -> pa.Table:
    """Score one block: the method's columns, with nulls and the reason where a row cannot be scored."""
    columns = dict(method.score(block, state))
    score_values = np.asarray(columns.pop("score"), dtype=np.float64)
    valid, reason = _validity(block, score_values)
    arrays: dict[str, Any] = {
        "row": block.pool.column("row"),
        "row_id": block.pool.column("row_id"),
        "score": pa.array(score_values, mask=~valid),
        "valid": pa.array(valid),
        "reason": pa.array(reason, pa.string()),
    }
    for column in schema:
        if column.name in arrays:
            continue
        arrays[column.name] = pa.array(columns[column.name], mask=~valid).cast(column.type, safe=False)
    return pa.table([arrays[name] for name in schema.names], schema=schema)


def _validity(block: api.Block, scores: np.ndarray) -> tuple[np.ndarray, list[str | None]]:
    """Return which rows have a score, and the first reason of those that have none."""
    valid = np.isfinite(scores)
    for batch in [block.pool, *block.features.values()]:
        valid &= batch.column("valid").to_numpy(zero_copy_only=False)
    reason: list[str | None] = [None] * len(scores)
    for position in np.flatnonzero(~valid):
        reasons = [
            batch.column("reason")[int(position)].as_py() for batch in [block.pool, *block.features.values()]
        ]
        reason[position] = next((text for text in reasons if text), "the score is not finite")
    return valid, reason


def describe_scores(table: TableFile) -> str:
    """Return one line about a score table: valid rows and the spread of the score."""
    low, middle, high = quantiles(column_values(table, "score"), [0.0, 0.5, 1.0])
    n_valid = sum(pc.sum(block.column("valid")).as_py() or 0 for block in table.blocks(["valid"]))
    return f"{n_valid:,} of {table.n_rows:,} rows scored: min {low:.4g}, median {middle:.4g}, max {high:.4g}"
