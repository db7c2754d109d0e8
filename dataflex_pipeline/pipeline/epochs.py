"""Passes over the pool as steps: what ``num_train_epochs`` comes to once the pool is counted.

With N rows in the pool, B rows per step (``global_batch``) and E epochs, training on the whole pool takes

    T = ceil(E ceil(N / B))

steps, as LLaMA-Factory counts them. A run of R = ``update_times`` rounds spends as many, rounded down:

    warmup_step = w, where it is set; else the smaller of its default and floor(T / (R + 1))
    update_step = max(1, floor((T - w) / R))

N counts all rows, since which of them are valid is known only when they are prepared. A run that has begun
keeps the steps that run.yaml records.
"""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from types import MappingProxyType
from typing import TYPE_CHECKING

from dataflex_pipeline.config.load import Loaded
from dataflex_pipeline.store.run import RunFolder

if TYPE_CHECKING:
    from dataflex_pipeline.pipeline.open_run import OpenRun

EPOCHS = "num_train_epochs"
STEPS = ("warmup_step", "update_step")


def steps_for_epochs(epochs: float, rows: int, global_batch: int) -> int:
    """Return the optimizer steps of so many passes over a pool.

    Args:
        epochs: passes; a part of one is rounded up to whole steps.
        rows: of the pool.
        global_batch: rows per step; the last step of a pass may have fewer.
    """
    return math.ceil(Fraction(str(epochs)) * -(-rows // global_batch))  # as written: 0.1 x 30 is 3


def shared_out(total: int, warmup_step: int, update_times: int, *, fixed: bool) -> tuple[int, int]:
    """Return the steps of the warm-up and of each round that come nearest to a total from below.

    Args:
        total: steps of the whole run.
        warmup_step: as it is set, or its default.
        update_times: rounds, at least 1.
        fixed: whether the warm-up was set.
    """
    warmup = warmup_step if fixed else min(warmup_step, total // (update_times + 1))
    return warmup, max(1, (total - warmup) // update_times)


def settle_epochs(run: OpenRun) -> None:
    """Put steps in place of ``num_train_epochs``, and say so; the pool is counted for it.

    Nothing is done where ``update_step`` is set, or where the pool is a demo that is not made yet.

    Raises:
        DataError: the pool cannot be read.
    """
    from dataflex_pipeline.pipeline.prepare import read_sources

    loaded, config = run.loaded, run.given
    if config.num_train_epochs is None or loaded.sources["update_step"] != "default":
        return
    if config.update_times < 1:
        said = "update_times is 0: no round is trained"
        run.progress.say(f"note: {EPOCHS}: {config.num_train_epochs:g} has no effect: {said}")
        return
    if run.is_demo("pool") and run.lacks_demo:
        return
    rows = read_sources(run, "pool")[1].n_rows
    total = steps_for_epochs(config.num_train_epochs, rows, run.global_batch)
    fixed = loaded.sources["warmup_step"] != "default"
    steps = shared_out(total, config.warmup_step, config.update_times, fixed=fixed)
    run.loaded = _with_steps(loaded, *steps)
    run.__dict__.pop("config", None)
    run.progress.say(
        f"note: {EPOCHS}: {config.num_train_epochs:g} is taken as steps: over {rows:,} rows, "
        f"{run.global_batch:,} a step, they are {total:,}; warmup_step={steps[0]}, then "
        f"update_step={steps[1]} in each of {config.update_times} rounds"
    )


def as_counted(loaded: Loaded, run: RunFolder) -> Loaded:
    """Return a configuration with the steps that a run which has begun recorded for the same epochs."""
    epochs = loaded.config.num_train_epochs
    if epochs is None or loaded.sources["update_step"] != "default" or not run.exists():
        return loaded
    recorded = run.read()[0]
    fixed = loaded.sources["warmup_step"] != "default"
    if recorded.get(EPOCHS) != epochs or (fixed and recorded["warmup_step"] != loaded.config.warmup_step):
        return loaded
    return _with_steps(loaded, int(recorded["warmup_step"]), int(recorded["update_step"]))


def _with_steps(loaded: Loaded, warmup_step: int, update_step: int) -> Loaded:
    config = loaded.config.model_copy(update={"warmup_step": warmup_step, "update_step": update_step})
    sources = MappingProxyType({**loaded.sources, **dict.fromkeys(STEPS, EPOCHS)})
    return replace(loaded, config=config, sources=sources)
