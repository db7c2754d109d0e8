"""What has to be there before a round is scored: the round before it, and the columns that a method reads."""

from __future__ import annotations

from collections.abc import Collection

from dataflex_pipeline import api
from dataflex_pipeline.errors import ConfigError, RunError, did_you_mean
from dataflex_pipeline.pipeline.base_model import is_given
from dataflex_pipeline.pipeline.open_run import OpenRun
from dataflex_pipeline.schemas import ORIGINAL, own_names
from dataflex_pipeline.store.stale import is_complete


def check_scored_round(run: OpenRun, number: int) -> None:
    """Refuse a round that cannot be scored: the warm-up, outside the horizon, predecessor missing."""
    run.check_round(number)
    if number == 0:
        raise RunError(
            "Round 0 was asked for.",
            "Round 0 is the warm-up, which draws uniformly, or the model as it is: nothing is scored for it.",
            "Run `dataflex warmup` for round 0, or ask for round 1.",
        )
    before = run.store.round(number - 1)
    if not is_given(run, number - 1) and not is_complete(before.checkpoint):
        command = "dataflex warmup" if number == 1 else f"dataflex round {number - 1}"
        raise RunError(
            f"Round {number} was asked for, and round {number - 1} has no finished checkpoint "
            f"({before.checkpoint}).",
            "A round is scored with the model of the round before it.",
            f"Run `{command}` first"
            + (", or set warmup_step=0 to score with the model as it is." if number == 1 else "."),
        )


def check_pool_columns(name: str, method: api.Method, there: Collection[str]) -> None:
    """Check that the pool has the columns that a method reads of it.

    Args:
        name: of the method. method: itself. there: the pool's columns.

    Raises:
        ConfigError: it has not.
    """
    own = own_names(there)
    for missing in (each for each in method.pool_columns if each not in there):
        wanted = missing.removeprefix(ORIGINAL)
        raise ConfigError(
            f"The method {name} reads the column '{wanted}' of the pool.{did_you_mean(wanted, own)}",
            f"The data set has no such column; it has {', '.join(own) or 'none but the conversation'}.",
            "Correct the name, or give data that has it.",
        )
