"""`dataflex evaluate`: how good the model of a round is, as a table in the run."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dataflex_pipeline import api
from dataflex_pipeline.errors import ConfigError, RunError
from dataflex_pipeline.evaluation.figures import Figure, loss_figures, reward_figure, write_figures
from dataflex_pipeline.evaluation.harness import find_tasks, run_tasks
from dataflex_pipeline.features.plan import FeaturePlan, plan_feature
from dataflex_pipeline.store.fingerprint import canonical, digest
from dataflex_pipeline.store.stale import found_ingredients, is_complete
from dataflex_pipeline.training.marker import verify_checkpoint

from . import console
from .context import Context, open_context, require_run
from .damage import check_checkpoint
from .outcome import note
from .prepare import look, prepare_split
from .score import feature_input, feature_table
from .subject import run_options

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

JUDGE = "judge"
NO_SETTINGS = ("feature", "split", "rows", "checkpoint", "features")
"""Ingredients of a reward table that say of what it is, not how rewards are made."""


@dataclass(frozen=True)
class Wanted:
    """What to evaluate.

    Attributes:
        metrics: of generated answers. judge: whether the reward backend set for nice grades them.
        max_new_tokens: longest answer. generator: auto, vllm or transformers.
        tasks: of the lm-evaluation-harness. include_path: folder of task files of the user's own.
        limit: documents of each task; None: all.
    """

    metrics: tuple[str, ...] = ()
    judge: bool = False
    max_new_tokens: int = 512
    generator: str = "auto"
    tasks: tuple[str, ...] = ()
    include_path: Path | None = None
    limit: int | None = None


def evaluate(
    config: Path | None,
    arguments: list[str],
    run: str | None,
    number: int | None,
    wanted: Wanted,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Evaluate the checkpoint of a round (None: the last finished one) and print the figures."""
    options = run_options(config, arguments, run, None, overwrite)
    with console.messages_to_stderr(as_json):
        context = open_context(options)
        chosen, path, kept = _evaluate(context, number, wanted)
    _print(context, chosen, path, kept, as_json)


def _evaluate(context: Context, number: int | None, wanted: Wanted) -> tuple[int, Path, list[Figure]]:
    """Compute and write the figures; return the round, the table, and all figures in it."""
    require_run(context)
    chosen = _last_round(context) if number is None else number
    _check(context, chosen)
    check_checkpoint(context, chosen)
    split: api.Split = "test" if context.given.test_dataset else "target"
    source = look(context, split) if context.datasets(split) else None
    if source is None and not wanted.tasks:
        raise ConfigError(
            "Neither test_dataset nor eval_dataset is set.",
            "An evaluation needs rows that say what is right.",
            "Give test_dataset=FILE (rows held out from the pool and the target), or --task for a benchmark.",
        )
    began = time.monotonic()
    manager = find_tasks(wanted.tasks, wanted.include_path, context.progress.say) if wanted.tasks else None
    with context.writing():
        figures: list[Figure] = []
        if source is not None:
            prepare_split(context, split, source)
            plans = dict(_plans(context, split, chosen, wanted))
            rows = digest(source.wanted)
            figures += [replace(figure, rows=rows) for figure in _own_figures(context, split, plans)]
        if manager is not None:
            figures += _benchmark(context, chosen, wanted, manager)
        path = context.run.round(chosen).metrics
        kept = write_figures(path, figures, _made_from(context, chosen))
        note(context, "evaluate", chosen, began, on_device=True)
    return chosen, path, kept


def _last_round(context: Context) -> int:
    done = [n for n in range(context.given.update_times + 1) if is_complete(context.run.round(n).checkpoint)]
    if not done:
        raise RunError(
            f"No round of {context.run.folder} is finished.",
            "There is no model to evaluate yet.",
            f"Run `dataflex warmup {context.again}` first.",
        )
    return done[-1]


def _check(context: Context, number: int) -> None:
    context.check_round(number)
    checkpoint = context.run.round(number).checkpoint
    if not is_complete(checkpoint):
        raise RunError(
            f"Round {number} was asked for, and it has no finished checkpoint ({checkpoint}).",
            "A round is evaluated with the model at its end.",
            f"Run `dataflex round {number} {context.again}` first, or leave --round out for the last one.",
        )


def _made_from(context: Context, number: int) -> dict[str, Any]:
    checkpoint = digest(found_ingredients(context.run.round(number).checkpoint) or {})
    return {"table": "metrics", "round": number, "checkpoint": checkpoint}


def _plans(
    context: Context, split: api.Split, number: int, wanted: Wanted
) -> Iterator[tuple[str, FeaturePlan]]:
    """Yield the features behind the figures, by the figure's name; losses first."""
    needs = {"loss": api.Need("losses", split, number)}
    answers = {
        "generator": wanted.generator,
        "mc_samples": 1,
        "generation_temperature": 0.0,
        "max_new_tokens": wanted.max_new_tokens,
    }
    rewards = {metric: ("metric", {"metric": {"name": metric}}) for metric in wanted.metrics}
    if wanted.judge:
        params = context.entry("nice").params
        rewards[JUDGE] = (params["reward_model_backend"], params["reward_backend_params"])
    for name, (backend, settings) in rewards.items():
        given = {"reward_model_backend": backend, "reward_backend_params": settings, "generations": answers}
        needs[name] = api.Need("rewards", split, number, given)
    for name, need in needs.items():
        yield (
            name,
            plan_feature(need, context.config, partial(feature_input, context), context.given.rows_per_part),
        )


def _own_figures(context: Context, split: str, plans: Mapping[str, FeaturePlan]) -> Iterator[Figure]:
    for name, plan in plans.items():
        table = feature_table(context, plan)
        if name == "loss":
            yield from loss_figures(split, table)
            continue
        figure = reward_figure(split, name, table)
        if figure is None:
            context.progress.say(f"{name}: no answer could be scored; the reasons are in {table.folder}")
        else:
            yield replace(figure, settings=_settings(plan))


def _settings(plan: FeaturePlan) -> str:
    """Return how answers were made (the generator that was taken, its settings) and graded, as JSON."""
    answers = {name: made.ingredients["params"] for name, made in plan.upstream.items()}
    graded = {key: value for key, value in plan.ingredients.items() if key not in NO_SETTINGS}
    return canonical(graded | answers)


def _benchmark(context: Context, number: int, wanted: Wanted, manager: TaskManager) -> list[Figure]:
    checkpoint = context.run.round(number).checkpoint
    verify_checkpoint(checkpoint)
    found = run_tasks(context.config, checkpoint, wanted.tasks, manager, wanted.limit, context.progress.say)
    return [replace(figure, settings=canonical({"limit": wanted.limit})) for figure in found]


def _print(context: Context, number: int, path: Path, figures: list[Figure], as_json: bool) -> None:
    if as_json:
        found = {"run": context.run.folder.name, "round": number, "figures": [asdict(f) for f in figures]}
        console.out.file.write(json.dumps(found, indent=2) + "\n")
        return
    rows = [
        [
            figure.task,
            figure.metric,
            f"{figure.value:.4f}",
            "" if figure.stderr is None else f"{figure.stderr:.4f}",
            "" if figure.n is None else f"{figure.n:,}",
            "" if not figure.unscored else f"{figure.unscored:,}",
        ]
        for figure in figures
    ]
    console.line(f"Round {number} of {context.run.folder}", style="bold")
    console.print_table("", ["task", "metric", "value", "stderr", "over", "unscored"], rows, wraps="task")
    console.line(f"table:  {path}")
