"""`dataflex warmup` and `dataflex round N`: whatever is missing up to a round, in order."""

from __future__ import annotations

from dataflex_pipeline.errors import UserError
from stages import console
from stages.context import Context
from stages.outcome import Outcome
from stages.prepare import Source, has_target, look, prepare_split
from stages.score import score
from stages.select_index import draw_warmup, select
from stages.train_round import ended_early, train


def check_before_start(context: Context) -> dict[str, Source]:
    """Find every mistake that can be found before anything is written: data, model, method."""
    context.method(context.given.component_name)
    sources = {"pool": look(context, "pool")}
    if has_target(context):
        sources["target"] = look(context, "target")
    return sources


def warmup(context: Context, sources: dict[str, Source]) -> list[Outcome]:
    """Prepare the data, draw uniformly, train round 0."""
    outcomes = [prepare_split(context, "pool", sources["pool"])]
    if "target" in sources:
        outcomes.append(prepare_split(context, "target", sources["target"]))
    context.save_settings()
    outcomes.append(draw_warmup(context))
    outcomes.append(train(context, 0))
    return outcomes


def rounds(context: Context, last: int, sources: dict[str, Source]) -> list[Outcome]:
    """Do whatever is missing up to round ``last``; stops where early stopping ended the run."""
    context.check_round(last)
    outcomes = warmup(context, sources)
    for number in range(1, last + 1):
        if ended_early(context, number - 1):
            console.line(
                f"The run ended in round {number - 1} by early stopping; there is nothing to do after it."
            )
            break
        outcomes += one_round(context, number)
    return outcomes


def one_round(context: Context, number: int) -> list[Outcome]:
    """Score, select and train one round with the configured method."""
    name = context.given.component_name
    console.line(f"Round {number}: {name}", style="bold")
    return [score(context, number, name), select(context, number, name), train(context, number)]


def next_after(context: Context, last: int) -> list[str]:
    """Say what can be done after round ``last``."""
    folder = context.run.folder
    steps = [f"see what there is:  dataflex status --run {folder.name}"]
    if last < context.given.update_times and not ended_early(context, last):
        steps.insert(0, f"go on:  dataflex round {last + 1} --run {folder.name}")
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
