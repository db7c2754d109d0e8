"""Benchmark tasks of the lm-evaluation-harness (EleutherAI), through its Python API."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dataflex_pipeline.errors import ConfigError, UserError
from dataflex_pipeline.evaluation.figures import Figure

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

    from dataflex_pipeline.config.fields import Config


def check_installed() -> None:
    """Refuse benchmark tasks where the harness is missing.

    Raises:
        ConfigError: it is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            "A benchmark task was asked for, and lm-eval is not installed.",
            "Benchmark tasks run through the lm-evaluation-harness.",
            "Install it: pip install 'dataflex-pipeline[eval]'.",
        )


def find_tasks(tasks: Sequence[str], include_path: Path | None, say: Callable[[str], None]) -> TaskManager:
    """Look tasks up in the harness's list; reading it takes some ten seconds.

    Args:
        tasks: names of tasks or groups. include_path: folder of task files (YAML) of the user's own.
        say: prints one line.

    Raises:
        ConfigError: the harness is not installed. UserError: there is no such task, or no such folder.
    """
    check_installed()
    if include_path is not None and not include_path.is_dir():
        raise UserError(
            f"--include-path {include_path}: there is no such folder.",
            "It is the folder that holds your own task files (YAML).",
            "Correct the path, or leave it out for the harness's own tasks.",
        )
    say(f"benchmark tasks: {', '.join(tasks)} (reading the harness's own list of tasks)")
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise UserError(
            f"--task {unknown[0]}: the harness has no task or group of that name.",
            "It knows its own tasks, and those in the folder of --include-path.",
            "`lm-eval ls tasks` lists them.",
        )
    return manager


def run_tasks(
    config: Config,
    checkpoint: Path | None,
    tasks: Sequence[str],
    manager: TaskManager,
    limit: int | None,
    say: Callable[[str], None],
) -> list[Figure]:
    """Run benchmark tasks on the model of a checkpoint.

    Args:
        config: names the base model, device and precision. checkpoint: of a round; None: the base model.
        tasks: names of tasks or groups. manager: the list that they were found in.
        limit: documents of each task; None: all. say: prints one line.

    Returns:
        One figure per task and metric, as the harness reports them.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    from dataflex_pipeline.models.base import load_for_scoring, resolve_device
    from dataflex_pipeline.models.tokenizer import load_tokenizer

    model = load_for_scoring(config, checkpoint, resolve_device(config.device))
    wrapped = HFLM(pretrained=model, tokenizer=load_tokenizer(config, say), batch_size=8)
    found = simple_evaluate(
        model=wrapped,
        tasks=list(tasks),
        task_manager=manager,
        limit=limit,
        random_seed=config.seed,
        numpy_random_seed=config.seed,
        torch_random_seed=config.seed,
        fewshot_random_seed=config.seed,
        bootstrap_iters=0,
        log_samples=False,
    )
    return list(_figures(found["results"], found.get("n-samples", {})))


def _figures(
    results: Mapping[str, Mapping[str, Any]], counts: Mapping[str, Mapping[str, int]]
) -> list[Figure]:
    """Return the harness's results: keys are ``metric,filter`` and ``metric_stderr,filter``."""
    figures = []
    for task, values in results.items():
        for key, value in values.items():
            metric, comma, chosen = key.partition(",")
            if not comma or metric.endswith("_stderr") or isinstance(value, str):
                continue
            error = values.get(f"{metric}_stderr,{chosen}")
            stderr = float(error) if isinstance(error, float) and math.isfinite(error) else None
            name = metric if chosen == "none" else f"{metric} ({chosen})"
            figures.append(Figure(task, name, float(value), stderr, counts.get(task, {}).get("effective")))
    return figures
