"""The commands that work on a run: check first, own the run, do the work, say what happened."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from stages import outcome
from stages.context import Context, Options, open_context, parse_assignments, require_run


def _options(
    config: Path | None, settings: list[str], run: str | None, method: str | None, overwrite: bool
) -> Options:
    return Options(config, parse_assignments(settings), run, method, overwrite)


def warmup(config: Path | None, settings: list[str], run: str | None, overwrite: bool) -> None:
    """Prepare the data and train round 0."""
    from stages import round as rounds

    context = open_context(_options(config, settings, run, None, overwrite))
    sources = rounds.check_before_start(context)
    with context.writing():
        outcomes = rounds.warmup(context, sources)
    outcome.report(outcomes, rounds.next_after(context, 0))


def round_(
    config: Path | None, arguments: list[str], run: str | None, method: str | None, overwrite: bool
) -> None:
    """Do whatever is missing up to a round."""
    from stages import round as rounds

    number, settings = rounds.parse_round(arguments)
    context = open_context(_options(config, settings, run, method, overwrite))
    last = context.given.update_times if number is None else number
    context.check_round(last)
    sources = rounds.check_before_start(context)
    with context.writing():
        outcomes = rounds.rounds(context, last, sources)
    outcome.report(outcomes, rounds.next_after(context, last))


def score(
    config: Path | None,
    settings: list[str],
    run: str | None,
    number: int,
    method: str | None,
    overwrite: bool,
) -> None:
    """Score one round with one method."""
    from stages.score import check_scored_round
    from stages.score import score as stage

    context = open_context(_options(config, settings, run, None, overwrite))
    name = method or context.given.component_name
    next_step = f"select:  dataflex select --round {number} --method {name}"
    _one_stage(context, number, check_scored_round, lambda: stage(context, number, name), next_step)


def select(
    config: Path | None,
    settings: list[str],
    run: str | None,
    number: int,
    method: str | None,
    overwrite: bool,
) -> None:
    """Draw the index of one round."""
    from stages.score import check_scored_round
    from stages.select_index import select as stage

    context = open_context(_options(config, settings, run, None, overwrite))
    name = method or context.given.component_name
    next_step = f"train:  dataflex train-round --round {number}"
    _one_stage(context, number, check_scored_round, lambda: stage(context, number, name), next_step)


def train_round(
    config: Path | None, settings: list[str], run: str | None, number: int, overwrite: bool
) -> None:
    """Train one round on its index."""
    from stages.train_round import train as stage

    context = open_context(_options(config, settings, run, None, overwrite))
    next_step = f"go on:  dataflex score --round {number + 1}"
    _one_stage(context, number, Context.check_round, lambda: stage(context, number), next_step)


def _one_stage(
    context: Context,
    number: int,
    check: Callable[[Context, int], None],
    stage: Callable[[], outcome.Outcome],
    next_step: str,
) -> None:
    require_run(context)
    check(context, number)
    if context.run.folder.name and "--run" not in next_step:
        next_step += f" --run {context.run.folder.name}"
    with context.writing():
        done = stage()
    outcome.report([done], [next_step])
