"""The measured half of an estimate: a short training and a few batches of every feature, on sampled rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from dataflex_pipeline.api import Need
from dataflex_pipeline.config.fields import Config
from dataflex_pipeline.estimate.features import Bench
from dataflex_pipeline.estimate.predict import follows_from_others, kind_of
from dataflex_pipeline.estimate.records import Measured, WritingCost
from dataflex_pipeline.estimate.sample import Sample, write_parts
from dataflex_pipeline.estimate.stages import selected_rows
from dataflex_pipeline.estimate.training import (
    LARGEST_CHECKPOINT,
    check_room,
    checkpoint_bytes,
    load_shape,
    measure_training,
)
from dataflex_pipeline.features.plan import params_of
from dataflex_pipeline.sampling.draw import draw
from dataflex_pipeline.sampling.probabilities import write_probabilities
from dataflex_pipeline.sampling.settings import DrawSettings
from dataflex_pipeline.schemas import INDEX, SCORES
from dataflex_pipeline.store.parts import PartedTable
from dataflex_pipeline.store.tables import TableFile, table_writer
from dataflex_pipeline.training.foreseen import foreseen_step

TABLE_ROWS = 20_000


def calibrate(
    config: Config,
    samples: Sequence[Sample],
    needs: Sequence[Need],
    batch: int,
    imports: float,
    scratch: Path,
    budget: float,
    say: Callable[[str], None],
) -> Measured:
    """Measure what the stages of a run are made of.

    Args:
        config: of the run, with real paths. samples: of the pool, and of the target where there is one.
        needs: the feature tables of the run. batch: rows per optimizer step.
        imports: seconds that loading the libraries took.
        scratch: an empty folder. budget: seconds of computing for each measurement, about.
        say: prints a line.

    Raises:
        UserError: something that the run needs is missing, or memory or disk are too small for it.
    """
    from dataflex_pipeline.models.base import resolve_device

    device = resolve_device(config.device)
    shape, load = load_shape(config, device)
    check_room(shape, scratch)
    rows: dict[str, PartedTable] = {
        each.split: write_parts(each.usable, scratch / f"usable-{each.split}") for each in samples
    }
    training = step = None
    if config.horizon:
        say("measuring: what a training step takes")
        step = foreseen_step(config, rows["pool"].part(0), batch)
    if config.horizon and checkpoint_bytes(shape) <= LARGEST_CHECKPOINT:
        say("measuring: a few training steps")
        training = measure_training(config, rows["pool"], rows.get("target"), batch, scratch, budget, device)
    bench = Bench(config, rows, training.checkpoint if training else None, scratch, budget, device)
    features = {}
    for need in [Need("losses"), *needs]:
        if follows_from_others(need) or _is_read(need) or kind_of(need) in features:
            continue
        say(f"measuring: {need.name.replace('_', ' ')}")
        features[kind_of(need)] = bench.measure(need)
    counts = {each.split: each.counts for each in samples}
    return Measured(
        config,
        shape,
        imports,
        load,
        counts["pool"],
        counts.get("target"),
        training,
        features,
        measure_writing(rows["pool"], max(1, selected_rows(config, counts["pool"], 1, batch)), scratch),
        step,
    )


def _is_read(need: Need) -> bool:
    """Whether the vectors come from a file."""
    return getattr(params_of(need), "vectors", None) is not None


def measure_writing(pool: PartedTable, positions: int, scratch: Path) -> WritingCost:
    """Write a score table, and select from scores of sampled rows by the code that selects in a run.

    Args:
        pool: sampled rows. positions: training positions of a round. scratch: a folder.
    """
    path = scratch / "scores.parquet"
    whole, table = _timed_scores(TABLE_ROWS, None, path)
    empty, _ = _timed_scores(0, None, path)
    size = float(path.stat().st_size)
    ids = pool.part(0, ["row_id"]).column("row_id")
    _timed_scores(pool.n_rows, ids, path)
    scores, probabilities = TableFile(path), scratch / "probabilities.parquet"
    began = time.perf_counter()
    write_probabilities(scores, lambda block: np.ones(block.num_rows), probabilities, {"kind": "estimate"})
    weighed = time.perf_counter()
    drawn = draw(scores, TableFile(probabilities), pool, DrawSettings("sample", positions))
    with table_writer(scratch / "index.parquet", INDEX, {}) as write:
        write(drawn.index)
    drawing = time.perf_counter() - weighed
    return WritingCost(
        row_seconds=whole / table.num_rows,
        table_seconds=empty,
        table_bytes=size,
        weigh_seconds=weighed - began,
        draw_seconds=drawing,
        selected_from=pool.n_rows,
    )


def _timed_scores(n_rows: int, ids: pa.ChunkedArray | None, path: Path) -> tuple[float, pa.Table]:
    """Write a table of random scores; return the seconds, and the table."""
    stream = np.random.default_rng(0)
    columns = {
        "row": np.arange(n_rows),
        "row_id": [stream.bytes(16).hex() for _ in range(n_rows)] if ids is None else ids,
        "score": stream.random(n_rows),
        "valid": np.ones(n_rows, bool),
        "reason": pa.nulls(n_rows, pa.string()),
    }
    table = pa.table(columns, schema=SCORES)
    began = time.perf_counter()
    with table_writer(path, SCORES, {}) as write:
        write(table)
    return time.perf_counter() - began, table
