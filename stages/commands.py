"""The commands that work on a run: check first, own the run, do the work, say what happened."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dataflex_pipeline import launch

from . import outcome
from .context import Context, Options, open_context, parse_assignments, require_run


def _options(
    config: Path | None, settings: list[str], run: str | None, method: str | None, overwrite: bool
) -> Options:
    return Options(config, parse_assignments(settings), run, method, overwrite)


def warmup(config: Path | None, settings: list[str], run: str | None, overwrite: bool) -> None:
    """Prepare the data and train round 0."""
    from . import round as rounds

    context = open_context(_options(config, settings, run, None, overwrite))
    _up_to(context, 0, rounds.next_after)


def round_(
    config: Path | None, arguments: list[str], run: str | None, method: str | None, overwrite: bool
) -> None:
    """Do whatever is missing up to a round."""
    from . import round as rounds

    number, settings = rounds.parse_round(arguments)
    context = open_context(_options(config, settings, run, method, overwrite))
    last = context.given.update_times if number is None else number
    context.check_round(last)
    _up_to(context, last, rounds.next_after)


def _up_to(context: Context, last: int, next_steps: Callable[[Context, int], list[str]]) -> None:
    from . import round as rounds
    from .damage import set_aside_damaged_tables
    from .versions import say_versions

    say_versions(context)
    sources = rounds.check_before_start(context, last)
    with context.writing():
        if context.overwrite:
            for number in range(last + 1):
                set_aside_damaged_tables(context, number)
        outcomes = rounds.rounds(context, last, sources)
    outcome.report(context.run.folder, outcomes, next_steps(context, last))


def score(
    config: Path | None,
    settings: list[str],
    run: str | None,
    number: int,
    method: str | None,
    overwrite: bool,
) -> None:
    """Score one round with one method."""
    from .score import check_scored_round
    from .score import score as stage

    context = open_context(_options(config, settings, run, None, overwrite))
    name = method or context.given.component_name
    next_step = _command("select", "select", f"--round {number} --method {name}", context)
    _one_stage(context, number, check_scored_round, lambda: [stage(context, number, name)], next_step)


def select(
    config: Path | None,
    settings: list[str],
    run: str | None,
    number: int,
    method: str | None,
    overwrite: bool,
) -> None:
    """Draw the index of one round."""
    from .score import check_scored_round
    from .select_index import select as stage

    context = open_context(_options(config, settings, run, None, overwrite))
    name = method or context.given.component_name
    next_step = _command("train", "train-round", f"--round {number}", context)
    _one_stage(context, number, check_scored_round, lambda: [stage(context, number, name)], next_step)


def train_round(
    config: Path | None, settings: list[str], run: str | None, number: int, overwrite: bool
) -> None:
    """Train one round on its index."""
    from .final_adapter import publish_adapter
    from .train_round import train as stage

    context = open_context(_options(config, settings, run, None, overwrite))
    is_last = number >= context.given.update_times
    next_step = None if is_last else _command("go on", "score", f"--round {number + 1}", context)
    _one_stage(
        context,
        number,
        Context.check_round,
        lambda: [stage(context, number), *publish_adapter(context)],
        next_step,
    )


def _command(label: str, name: str, options: str, context: Context) -> str:
    return f"{label}:  {launch.command()} {name} {options} {context.again}".rstrip()


def _one_stage(
    context: Context,
    number: int,
    check: Callable[[Context, int], None],
    stage: Callable[[], list[outcome.Outcome]],
    next_step: str | None,
) -> None:
    from .damage import check_outputs, set_aside_damaged_tables
    from .existing import check_settings
    from .versions import say_versions

    require_run(context)
    check(context, number)
    check_settings(context)
    say_versions(context)
    check_outputs(context, number - 1 if context.overwrite else number)
    with context.writing():
        if context.overwrite:
            set_aside_damaged_tables(context, number)
        done = stage()
        # The settings given now hold for what follows, as those given to warmup and round do.
        context.save_settings()
    outcome.report(context.run.folder, done, [next_step] if next_step else [])
