"""`dataflex train-round`: train one round on its weighted index, going on from the round before."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from dataflex_pipeline import launch
from dataflex_pipeline.api import Silent
from dataflex_pipeline.config.fields import Config
from dataflex_pipeline.config.load import dump_config
from dataflex_pipeline.errors import CorruptError, RunError
from dataflex_pipeline.models.base import adapter_folder
from dataflex_pipeline.models.source import attention_kernel, model_digest
from dataflex_pipeline.store.atomic import set_aside
from dataflex_pipeline.store.fingerprint import digest, files_digest
from dataflex_pipeline.store.parquet import read_whole
from dataflex_pipeline.store.parts import MANIFEST, PartedTable
from dataflex_pipeline.store.stale import found_ingredients, is_complete, is_current
from dataflex_pipeline.training import RoundPlan, RoundResult, read_marker, train_round
from dataflex_pipeline.training.marker import verify_checkpoint

from .checkpoints import check_kept_checkpoints
from .context import Context
from .damage import remember_checkpoint
from .outcome import Outcome, note
from .prepare import has_target, open_split
from .select_index import read_index

TRAINING_KEYS = (
    "finetuning_type",
    "lora_rank",
    "lora_alpha",
    "lora_dropout",
    "lora_target",
    "bf16",
    "warmup_step",
    "update_step",
    "update_times",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_ratio",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "seed",
    "eval_strategy",
    "eval_steps",
    "metric_for_best_model",
    "greater_is_better",
    "load_best_model_at_end",
    "early_stopping_steps",
    "early_stopping_min_delta",
)
"""Settings that change what a round trains; the rest only changes how fast it goes or what is shown."""
PLACES = ("previous", "work", "checkpoint")
"""What of a plan are paths."""


def step_range(context: Context, number: int) -> tuple[int, int]:
    """Return the optimizer steps of a round over the whole run: first, and last not included."""
    config = context.given
    if number == 0:
        return 0, config.warmup_step
    first = config.warmup_step + (number - 1) * config.update_step
    return first, first + config.update_step


def wanted_checkpoint(context: Context, number: int, index_fingerprint: str) -> dict[str, Any]:
    """Return what a round's checkpoint is made from."""
    before = context.run.round(number - 1).checkpoint if number else None
    config = context.config.model_copy(update={"attn_implementation": attention_kernel(context.config)})
    evaluates = has_target(context) and context.given.eval_strategy != "no"
    return {
        "output": "checkpoint",
        "round": number,
        "index": index_fingerprint,
        "previous": None if before is None else digest(found_ingredients(before) or {}),
        "model": model_digest(context.config, context.memo.digest),
        "adapter": _adapter_digest(context),
        "pool": open_split(context, "pool").fingerprint,
        "target": open_split(context, "target").fingerprint if evaluates else None,
        "global_batch": context.global_batch,
        "training": _training_settings(config),
    }


def _training_settings(config: Config) -> dict[str, Any]:
    """Return what of the settings a checkpoint is made from.

    Without ``eval_steps``, ``logging_steps`` says when evaluations happen, and with them which weights are
    best and when early stopping fires. An attention kernel and a factor of the load-balancing loss are named
    only where there is one.
    """
    settings: dict[str, Any] = {name: getattr(config, name) for name in TRAINING_KEYS}
    if config.eval_strategy == "steps":
        settings["eval_steps"] = config.eval_steps or config.logging_steps
    for name in ("attn_implementation", "router_aux_loss_coef"):
        if getattr(config, name) is not None:
            settings[name] = getattr(config, name)
    return settings


def _adapter_digest(context: Context) -> str | None:
    name = context.given.adapter_name_or_path
    if name is None:
        return None
    paths = sorted(adapter_folder(name).glob("adapter_*"))
    return files_digest(paths, [path.name for path in paths])


def train(context: Context, number: int) -> Outcome:
    """Train one round unless its checkpoint is there.

    Raises:
        RunError: the round before is not trained, or the run was ended by early stopping.
    """
    began = time.monotonic()
    context.check_round(number)
    check_kept_checkpoints(context, context.given.component_name)
    where = context.run.round(number)
    index, fingerprint = read_index(context, number)
    if number:
        _check_previous(context, number)
    wanted = wanted_checkpoint(context, number, fingerprint)
    what = f"The checkpoint of round {number}"
    if context.overwrite:
        _set_aside_damaged(context, where.checkpoint)
    current = is_current(where.checkpoint, wanted, what, overwrite=context.overwrite)
    if current:
        # left over by a kill between the last rename and the end
        shutil.rmtree(where.work, ignore_errors=True)
    else:
        first, last = step_range(context, number)
        plan = RoundPlan(
            round=number,
            first_step=first,
            last_step=last,
            horizon=context.given.horizon,
            global_batch=context.global_batch,
            index=index,
            previous=context.run.round(number - 1).checkpoint if number else None,
            work=where.work,
            checkpoint=where.checkpoint,
            ingredients=wanted,
        )
        target = open_split(context, "target") if has_target(context) else None
        _train(context, plan, open_split(context, "pool"), target)
        remember_checkpoint(context, number)
        note(context, "train", number, began, on_device=True)
    return Outcome(
        f"train, {'warm-up' if number == 0 else f'round {number}'}",
        where.checkpoint,
        not current,
        time.monotonic() - began,
        describe_checkpoint(context, number),
    )


def _train(context: Context, plan: RoundPlan, pool: PartedTable, target: PartedTable | None) -> None:
    """Train on all processes of the launch; this one reports."""
    team = launch.current()
    if team is None:
        train_round(context.config, plan, pool, target, context.progress)
        return
    numbers = [each.name for each in fields(RoundPlan) if each.name not in (*PLACES, "index")]
    places = {name: getattr(plan, name) for name in PLACES}
    content = {
        "config": dump_config(context.config),
        "plan": {name: getattr(plan, name) for name in numbers},
        "places": {name: None if path is None else str(path.absolute()) for name, path in places.items()},
        "index": str(context.run.round(plan.round).index.absolute()),
        "pool": str(pool.folder.absolute()),
        "target": None if target is None else str(target.folder.absolute()),
    }
    with team.job("train", content, context.given.ddp_timeout):
        train_round(context.config, plan, pool, target, context.progress)


def train_share(content: Mapping[str, Any]) -> None:
    """Train a round together with rank 0, which gave it out; on every other process of the launch."""
    tables = {}
    for split in ("pool", "target"):
        if content[split] is not None:
            launch.await_file(Path(content[split]) / MANIFEST)
            tables[split] = PartedTable.reopen(Path(content[split]))
    launch.await_file(Path(content["index"]))
    plan = content["plan"] | {"index": read_whole(Path(content["index"]))}
    plan |= {name: None if path is None else Path(path) for name, path in content["places"].items()}
    train_round(
        Config(**content["config"]), RoundPlan(**plan), tables["pool"], tables.get("target"), Silent()
    )


def _set_aside_damaged(context: Context, checkpoint: Path) -> None:
    if checkpoint.exists():
        try:
            verify_checkpoint(checkpoint, context.memo.output_digest)
        except CorruptError:
            set_aside(checkpoint)


def _check_previous(context: Context, number: int) -> None:
    before = context.run.round(number - 1)
    if not is_complete(before.checkpoint):
        raise RunError(
            f"Round {number} cannot train: round {number - 1} has no finished checkpoint "
            f"({before.checkpoint}).",
            "Optimizer, schedule and weights carry over from round to round.",
            f"Run `dataflex {'warmup' if number == 1 else f'round {number - 1}'}` first.",
        )
    if ended_early(context, number - 1):
        raise RunError(
            f"Round {number} was asked for, and the run ended in round {number - 1} by early stopping.",
            f"The target loss had not improved for {context.given.early_stopping_steps} evaluations.",
            "Use the checkpoint in best/ (or the last one), or start a run of another name without it.",
        )


def ended_early(context: Context, number: int) -> bool:
    """Whether early stopping fired in a round."""
    marker = read_marker(context.run.round(number).checkpoint)
    return marker is not None and bool((marker.result or {}).get("stopped_early"))


def describe_checkpoint(context: Context, number: int) -> str:
    """Return one line about a round's training: steps, losses, learning rate."""
    marker = read_marker(context.run.round(number).checkpoint)
    if marker is None or marker.result is None:
        return "not finished"
    result = RoundResult(**marker.result)
    text = (
        f"{result.steps} steps, train loss {result.train_loss:.4f}, mean lr {result.mean_learning_rate:.3g}"
    )
    if "eval_loss" in result.metrics:
        text += f", target loss {result.metrics['eval_loss']:.4f}"
    return text + (", stopped early" if result.stopped_early else "")
