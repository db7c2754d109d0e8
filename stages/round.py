"""`dataflex warmup` and `dataflex round N`: whatever is missing up to a round, in order."""

from __future__ import annotations

import shlex
from dataclasses import replace

from dataflex_pipeline import launch
from dataflex_pipeline.api import Selection, Split
from dataflex_pipeline.errors import ConfigError, UserError

from . import console
from .checkpoints import check_kept_checkpoints
from .context import Context
from .existing import check_existing
from .final_adapter import publish_adapter
from .outcome import Outcome
from .preflight import check_method, check_model
from .prepare import Source, look, prepare_split, read_sources, splits_of
from .score import score
from .select_index import draw_warmup, select
from .train_round import ended_early, train


def check_before_start(context: Context, last: int) -> dict[Split, Source]:
    """Find every mistake that can be found before anything is written.

    The method and its parameters, the data, what is on disk from other settings, and the model.
    """
    check_target(context)
    splits = splits_of(context)
    for split in splits:
        if not context.is_demo(split):  # mistakes in one's own data show before the demo model is made
            read_sources(context, split)
    sources = {split: look(context, split) for split in splits}
    check_existing(context, last, sources)
    check_method(context, sources, last)
    check_model(context)
    return sources


def check_target(context: Context) -> None:
    """Check the method and its parameters, and that there is a target if it selects towards one.

    Raises:
        ConfigError: the method needs a target and ``eval_dataset`` is not set.
    """
    name = context.given.component_name
    method, _ = context.method(name)
    check_kept_checkpoints(context, name)
    first = Selection(1, context.given.update_times, 0, context.progress.say)
    wants = any(need.split == "target" for need in method.needs(first).values())
    has_query = "query" in type(method.params).model_fields
    if wants and "target" not in splits_of(context):
        raise ConfigError(
            f"The method {name} was chosen and eval_dataset is not set.",
            f"{name} selects rows towards a target set, and there is none.",
            "Set eval_dataset to rows of what the model should get good at"
            + (", or query: first_100 for the first 100 rows of the pool." if has_query else "."),
        )


def warmup(context: Context, sources: dict[Split, Source]) -> list[Outcome]:
    """Prepare the data, draw uniformly, train round 0."""
    # The target first: it is the smaller one, so mistakes in it show sooner.
    prepared = {split: prepare_split(context, split, sources[split]) for split in reversed(sources)}
    context.save_settings()
    return [*(prepared[split] for split in sources), draw_warmup(context), train(context, 0)]


def rounds(context: Context, last: int, sources: dict[Split, Source]) -> list[Outcome]:
    """Do whatever is missing up to round ``last``; stops where early stopping ended the run."""
    outcomes = warmup(context, sources)
    copies: list[Outcome] = []
    for number in range(1, last + 1):
        if ended_early(context, number - 1):
            console.line(
                f"The run ended in round {number - 1} by early stopping; there is nothing to do after it."
            )
            break
        copies += publish_adapter(context)
        outcomes += one_round(context, number)
    copies += publish_adapter(context)
    # One line for them: it was copied if it was copied after any round.
    return outcomes + [replace(copies[-1], done=any(each.done for each in copies)) for _ in copies[-1:]]


def one_round(context: Context, number: int) -> list[Outcome]:
    """Score, select and train one round with the configured method."""
    name = context.given.component_name
    console.line(f"Round {number}: {name}", style="bold")
    return [score(context, number, name), select(context, number, name), train(context, number)]


def next_after(context: Context, last: int) -> list[str]:
    """Say what can be done after round ``last``."""
    steps = [
        f"see what there is:  dataflex status {context.again}",
        f"look at it in a browser:  dataflex report {shlex.quote(str(context.run.folder))}",
    ]
    ended = any(ended_early(context, number) for number in range(last + 1))
    if last < context.given.update_times and not ended:
        steps.insert(0, f"go on:  {launch.command()} round {last + 1} {context.again}")
    return steps


def parse_round(arguments: list[str]) -> tuple[int | None, list[str]]:
    """Split ``[N] key=value ...`` into the round number and the assignments."""
    if arguments and "=" not in arguments[0]:
        try:
            return int(arguments[0]), arguments[1:]
        except ValueError as error:
            raise UserError(
                f"The round is given as '{arguments[0]}'.",
                "A round is a whole number: 0 is the warm-up, then 1, 2, ...",
                "Write for example `dataflex round 2`; settings are given as key=value.",
            ) from error
    return None, arguments
