"""The feature tables that a run computes, round by round; none is computed twice."""

from __future__ import annotations

from dataflex_pipeline.api import Checkpoint, Method, Need, Selection, Silent
from dataflex_pipeline.config.fields import Config
from dataflex_pipeline.features.plan import method_needs, plain_need, with_upstream
from dataflex_pipeline.store.fingerprint import digest


def needs_by_round(method: Method, config: Config) -> list[list[Need]]:
    """Return the feature tables that every round 1..update_times computes, in the order of computing.

    Args:
        method: the one that scores all rounds. config: of the run.
    """
    seen: set[str] = set()
    rounds = []
    for number in range(1, config.last_round + 1):
        fresh = []
        for need in method_needs(method, _selection(method, config, number)).values():
            for each, _ in with_upstream(need, config):
                key = digest(plain_need(each))
                if key not in seen:
                    seen.add(key)
                    fresh.append(each)
        rounds.append(fresh)
    return rounds


def _selection(method: Method, config: Config, number: int) -> Selection:
    rate, several = config.learning_rate, _checkpoints(method, config, number)
    adds = method.accumulates and number > 1
    return Selection(number, config.last_round, 0, Silent().say, rate, adds, several, shared_seed=number)


def _checkpoints(method: Method, config: Config, number: int) -> tuple[Checkpoint, ...]:
    """Return the checkpoints of the round before, for a method that scores with all of them."""
    if not method.every_checkpoint or config.save_steps is None:
        return ()
    last = config.warmup_step + (number - 1) * config.update_step
    first = 0 if number == 1 else last - config.update_step
    inside = [step for step in range(first + 1, last) if step % config.save_steps == 0]
    return tuple(Checkpoint(step, config.learning_rate) for step in (*inside, None))
