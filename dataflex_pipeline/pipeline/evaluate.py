"""Evaluation of the model of a round, or of the base model before any training, as a table in the run."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dataflex_pipeline import api
from dataflex_pipeline.errors import ConfigError, RunError
from dataflex_pipeline.evaluation.figures import (
    Figure,
    loss_figures,
    read_figures,
    reward_figure,
    write_figures,
)
from dataflex_pipeline.evaluation.harness import find_tasks, run_tasks
from dataflex_pipeline.features.plan import FeaturePlan, plan_feature
from dataflex_pipeline.pipeline.base_model import base_fingerprint
from dataflex_pipeline.pipeline.damage import check_checkpoint
from dataflex_pipeline.pipeline.feature_tables import feature_input, feature_table
from dataflex_pipeline.pipeline.open_run import OpenRun, require_run
from dataflex_pipeline.pipeline.output import note
from dataflex_pipeline.pipeline.prepare import Rows, look
from dataflex_pipeline.store.fingerprint import canonical, digest
from dataflex_pipeline.store.stale import found_ingredients, is_complete
from dataflex_pipeline.training.finished import last_round
from dataflex_pipeline.training.marker import verify_checkpoint

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

Number = int | Literal["base"]
"""A round, whose model at its end is evaluated; or the base model, which nothing was trained on."""
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


def evaluate(run: OpenRun, number: Number | None, wanted: Wanted) -> tuple[Number, Path, list[Figure]]:
    """Evaluate the model of a round, or the base model, and write the figures.

    Args:
        run: that the round belongs to.
        number: the round; None for the last finished one; "base" for the model before any training, with
            the adapter of ``adapter_name_or_path`` where that is set.
        wanted: what to evaluate.

    Returns:
        The round, the table, and all figures in it.

    Raises:
        UserError: no such round is finished, or there are no rows to evaluate on.
    """
    require_run(run)
    chosen = _chosen(run, number)
    if chosen != "base":
        _check(run, chosen)
        check_checkpoint(run, chosen)
    split: api.Split = "test" if run.given.test_dataset else "target"
    source = look(run, split) if run.datasets(split) else None
    if source is None and not wanted.tasks:
        raise ConfigError(
            "Neither test_dataset nor eval_dataset is set.",
            "An evaluation needs rows that say what is right.",
            "Give test_dataset=FILE (rows held out from the pool and the target), or --task for a benchmark.",
        )
    began = time.monotonic()
    manager = find_tasks(wanted.tasks, wanted.include_path, run.progress.say) if wanted.tasks else None
    with run.writing():
        figures: list[Figure] = []
        if source is not None:
            Rows(run, split, source).make()
            plans = dict(_plans(run, split, chosen, wanted))
            rows = digest(source.wanted)
            figures += [replace(figure, rows=rows) for figure in _own_figures(run, split, plans)]
        if manager is not None:
            figures += _benchmark(run, chosen, wanted, manager)
        path = run.store.base_metrics if chosen == "base" else run.store.round(chosen).metrics
        kept = write_figures(path, figures, _made_from(run, chosen))
        note(run, "evaluate", chosen, began, on_device=True)
    return chosen, path, kept


def base_figures(run: OpenRun) -> list[Figure]:
    """Return the figures of the base model that there are; none where it was not evaluated."""
    path = run.store.base_metrics
    return read_figures(path) if path.is_file() else []


def _chosen(run: OpenRun, number: Number | None) -> Number:
    """Return what to evaluate; without a warm-up the model of round 0 is the base model."""
    if number is not None:
        return "base" if number == 0 and run.given.warmup_step == 0 else number
    last = last_round(run.given, run.store)
    if last is None and run.given.warmup_step == 0:
        return "base"
    if last is None:
        raise RunError(
            f"No round of {run.folder} is finished.",
            "There is no trained model to evaluate yet.",
            f"Run `dataflex warmup {run.again}` first, or evaluate the base model: --round base.",
        )
    return last


def _check(run: OpenRun, number: int) -> None:
    run.check_round(number)
    checkpoint = run.store.round(number).checkpoint
    if not is_complete(checkpoint):
        raise RunError(
            f"Round {number} was asked for, and it has no finished checkpoint ({checkpoint}).",
            "A round is evaluated with the model at its end.",
            f"Run `dataflex round {number} {run.again}` first, or leave --round out for the last one.",
        )


def _made_from(run: OpenRun, number: Number) -> dict[str, Any]:
    if number == "base":
        return {"table": "metrics", "round": None, "checkpoint": base_fingerprint(run)}
    checkpoint = digest(found_ingredients(run.store.round(number).checkpoint) or {})
    return {"table": "metrics", "round": number, "checkpoint": checkpoint}


def _plans(
    run: OpenRun, split: api.Split, number: Number, wanted: Wanted
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
        params = run.entry("nice").params
        rewards[JUDGE] = (params["reward_model_backend"], params["reward_backend_params"])
    for name, (backend, settings) in rewards.items():
        given = {"reward_model_backend": backend, "reward_backend_params": settings, "generations": answers}
        needs[name] = api.Need("rewards", split, number, given)
    for name, need in needs.items():
        yield (
            name,
            plan_feature(need, run.config, partial(feature_input, run), run.given.rows_per_part),
        )


def _own_figures(run: OpenRun, split: str, plans: Mapping[str, FeaturePlan]) -> Iterator[Figure]:
    for name, plan in plans.items():
        table = feature_table(run, plan)
        if name == "loss":
            yield from loss_figures(split, table)
            continue
        figure = reward_figure(split, name, table)
        if figure is None:
            run.progress.say(f"{name}: no answer could be scored; the reasons are in {table.folder}")
        else:
            yield replace(figure, settings=_settings(plan))


def _settings(plan: FeaturePlan) -> str:
    """Return how answers were made (the generator that was taken, its settings) and graded, as JSON."""
    answers = {name: made.ingredients["params"] for name, made in plan.upstream.items()}
    graded = {key: value for key, value in plan.ingredients.items() if key not in NO_SETTINGS}
    return canonical(graded | answers)


def _benchmark(run: OpenRun, number: Number, wanted: Wanted, manager: TaskManager) -> list[Figure]:
    checkpoint = None if number == "base" else run.store.round(number).checkpoint
    if checkpoint is not None:
        verify_checkpoint(checkpoint)
    found = run_tasks(run.config, checkpoint, wanted.tasks, manager, wanted.limit, run.progress.say)
    return [replace(figure, settings=canonical({"limit": wanted.limit})) for figure in found]
