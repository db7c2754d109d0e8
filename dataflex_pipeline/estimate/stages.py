"""The stages of a whole run with their costs, from the first import to the last checkpoint."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import pyarrow as pa

from dataflex_pipeline.api import Method, Need
from dataflex_pipeline.config.candidates import CandidateRule
from dataflex_pipeline.config.fields import Config
from dataflex_pipeline.estimate.costs import (
    ID_BYTES,
    INDEX_BYTES,
    RowCounts,
    loss_flops,
    row_bytes,
    training_flops,
)
from dataflex_pipeline.estimate.needs import need_key
from dataflex_pipeline.estimate.predict import feature_stage
from dataflex_pipeline.estimate.records import Measured, StageCost
from dataflex_pipeline.estimate.sample import Sample
from dataflex_pipeline.estimate.training import checkpoint_bytes
from dataflex_pipeline.schemas import PROBABILITIES, SCORES
from dataflex_pipeline.training.kept import kept_steps

BACKWARD_SHARE = 2.0 / 3.0
"""Rate of a training step or of gradients, as a share of a forward pass's (docs/scaling.md)."""
PASSES = 2
"""How often scoring goes over a score table: writing it, and saying what is in it."""


@dataclass(frozen=True)
class Chooser:
    """What scores all rows before the method, and leaves it the best of them.

    Attributes:
        rule: how many they are. method: the chooser.
        of_candidates: `need_key` of the feature tables that are made of the candidates alone.
    """

    rule: CandidateRule
    method: Method
    of_candidates: frozenset[str]


def run_stages(
    found: Measured,
    samples: Sequence[Sample],
    workers: Sequence[int],
    method: Method,
    rounds: Sequence[Sequence[Need]],
    batch: int,
    there: Collection[str] = (),
    chooser: Chooser | None = None,
) -> list[StageCost]:
    """Return the stages of a run in order.

    Args:
        found: the calibration. samples: of the splits. workers: processes that prepare each of them.
        method: the one that scores. rounds: its feature tables by round. batch: rows per optimizer step.
        there: `need_key` of feature tables that are finished.
        chooser: what chooses the candidates; None where every row is scored.
    """
    stages = [_start(found)]
    stages += [_prepare(sample, count) for sample, count in zip(samples, workers, strict=True)]
    if found.config.warmup_step:
        stages += [_select(found, method, 0, batch), training_stage(found, 0, batch)]
    groups = max((len(set(_groups(sample))) for sample in samples), default=1)
    for number, needs in enumerate(rounds, 1):
        for need in needs:
            stage = _feature(found, need, number, chooser)
            stages.append(_found(stage) if need_key(need) in there else stage)
        if chooser is not None:
            stages.append(_score(found, chooser.method, number, groups))
        stages.append(_score(found, method, number, groups))
        stages.append(_select(found, method, number, batch))
        if found.config.trains_rounds:
            stages.append(training_stage(found, number, batch))
    return stages


def _feature(found: Measured, need: Need, number: int, chooser: Chooser | None) -> StageCost:
    """Predict a feature table, of the candidates alone where it is."""
    if chooser is None or need_key(need) not in chooser.of_candidates:
        return feature_stage(found, need, number)
    few = found.pool.drawn(chooser.rule.count(round(found.pool.valid)))
    stage = feature_stage(replace(found, pool=few), need, number)
    note = f"{few.rows:,} candidates" + (f"; {stage.note}" if stage.note else "")
    return replace(stage, note=note) if need.split == "pool" else stage


def _found(stage: StageCost) -> StageCost:
    """Return the cost of a feature table that is there already."""
    return StageCost(
        stage.stage,
        stage.round,
        stage.rows,
        seconds=0.0,
        disk_bytes=0.0,
        basis="counted",
        note="there already",
    )


def _groups(sample: Sample) -> list[str]:
    names = sample.table.column_names
    return sample.table.column("group").to_pylist() if "group" in names else [""]


def _start(found: Measured) -> StageCost:
    seconds = found.import_seconds + found.load_seconds
    return StageCost("start", None, seconds=seconds, note="importing libraries, checking the model")


def _prepare(sample: Sample, workers: int) -> StageCost:
    counts = sample.counts
    stage = f"prepare {sample.split}"
    note = "" if counts.exact else f"tokens from {sample.table.num_rows:,} sampled rows"
    if not sample.read_seconds:
        return StageCost(
            stage,
            None,
            counts.rows,
            counts.tokens,
            seconds=0.0,
            disk_bytes=sample.disk,
            note="prepared already",
        )
    seconds = 2 * sample.read_seconds + counts.rows * sample.row_seconds / workers
    note += f"{'; ' if note else ''}in {workers} processes" if workers > 1 else ""
    return StageCost(
        stage, None, counts.rows, counts.tokens, seconds=seconds, disk_bytes=sample.disk, note=note
    )


def _score(found: Measured, method: Method, number: int, groups: int) -> StageCost:
    """Predict a score table: the method's arithmetic is as cheap as writing its rows."""
    rows = found.pool.rows
    own = row_bytes(pa.schema([*SCORES, *method.columns]))
    if type(method).own_columns is not Method.own_columns:
        own += 8 * groups
    seconds = found.writing.table_seconds + PASSES * rows * found.writing.row_seconds
    disk = found.writing.table_bytes + rows * own
    return StageCost("score", number, rows, seconds=seconds, disk_bytes=disk, basis="extrapolated")


def _select(found: Measured, method: Method, number: int, batch: int) -> StageCost:
    """Predict probabilities and index; the warm-up has no probabilities, and makes the pool's row ids."""
    config, rows = found.config, found.pool.rows
    positions = selected_rows(config, found.pool, number, batch)
    writing = found.writing
    disk = writing.table_bytes + positions * INDEX_BYTES + (0 if number else rows * ID_BYTES)
    more = max(0, rows - writing.selected_from) * writing.row_seconds
    seconds = writing.draw_seconds + more
    if number:
        # The probabilities of top_k are 0 and 1/k, which take next to nothing.
        strategy = config.strategy or method.default_strategy
        seconds += writing.weigh_seconds + more
        disk += writing.table_bytes + rows * (ID_BYTES if strategy == "top_k" else row_bytes(PROBABILITIES))
    note = "equal probabilities take less room"
    return StageCost(
        "select", number, positions, seconds=seconds, disk_bytes=disk, basis="extrapolated", note=note
    )


def selected_rows(config: Config, pool: RowCounts, number: int, batch: int) -> int:
    """Return the lines of a round's index, or where nothing is trained, of its selection.

    Args:
        config: of the run. pool: counts of the pool. number: the round. batch: rows per optimizer step.
    """
    if number == 0:
        return batch * config.warmup_step
    if config.trains_rounds:
        return batch * config.update_step
    if config.num_samples is not None:
        return config.num_samples
    if config.fraction is not None:
        return math.ceil(config.fraction * pool.valid)
    return round((config.token_budget or 0) * pool.rows / max(1, pool.tokens))


def training_stage(found: Measured, number: int, batch: int) -> StageCost:
    """Predict the training of a round: its steps, its evaluations, its checkpoint."""
    config = found.config
    steps = config.warmup_step if number == 0 else config.update_step
    drawn = found.pool.drawn(steps * batch)
    evaluated = evaluations(config, steps) if found.target is not None else 0
    target = (
        found.target.drawn(round(found.target.valid)) if found.target is not None else found.pool.drawn(0)
    )
    flops = training_flops(found.model, drawn) + evaluated * loss_flops(found.model, target)
    stage = StageCost("train", number, steps * batch, drawn.tokens, steps, flops)
    cost = found.training
    if cost is None:
        seconds = training_flops(found.model, drawn) / (found.forward_rate * BACKWARD_SHARE)
        note = "from the rate of a forward pass: a checkpoint is too large to be written for an estimate"
        disk = float(checkpoint_bytes(found.model))
        seconds += found.load_seconds + evaluated * target.tokens * found.features["losses"].unit_seconds
        return replace(stage, seconds=seconds, disk_bytes=disk, basis="extrapolated", note=note)
    seconds = cost.start_seconds + steps * cost.step_seconds
    seconds += evaluated * target.tokens * cost.evaluation_seconds
    seconds += cost.once_seconds if number == 0 else 0.0
    disk = float(cost.checkpoint_bytes + steps * cost.log_bytes)
    disk += len(kept_steps(config, 0, steps)) * cost.checkpoint_bytes
    note = "rows of one's own choice may be longer or shorter than the pool's" if number else ""
    return replace(stage, seconds=seconds, disk_bytes=disk, memory_bytes=cost.peak_bytes, note=note)


def evaluations(config: Config, steps: int) -> int:
    """Return how often a round of so many steps evaluates on the target."""
    if config.eval_strategy == "no":
        return 0
    if config.eval_strategy == "epoch":
        return 1
    return steps // (config.eval_steps or config.logging_steps)
