"""The finished checkpoints of a run, and which of them counts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dataflex_pipeline.store.run import BEST, RunFolder
from dataflex_pipeline.store.stale import is_complete

if TYPE_CHECKING:
    from dataflex_pipeline.config.fields import Config


def has_trained(run: RunFolder) -> bool:
    """Whether the first round that is trained is finished: the warm-up, or round 1 without one."""
    return any(is_complete(run.round(number).checkpoint) for number in (0, 1))


def last_round(config: Config, run: RunFolder) -> int | None:
    """Return the last round whose checkpoint is finished; None before the warm-up's."""
    rounds = range(config.last_round, -1, -1)
    return next((number for number in rounds if is_complete(run.round(number).checkpoint)), None)


def checkpoint_that_counts(config: Config, run: RunFolder) -> Path | None:
    """Return the checkpoint to publish and export: the best one where that is kept, else the last."""
    best = run.folder / BEST
    if config.load_best_model_at_end and is_complete(best):
        return best
    last = last_round(config, run)
    return None if last is None else run.round(last).checkpoint
