"""Settings given now against those that a trained run was made with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from dataflex_pipeline import launch
from dataflex_pipeline.config.fields import Config, role_of
from dataflex_pipeline.config.load import dump_config
from dataflex_pipeline.pipeline.epochs import settle_epochs
from dataflex_pipeline.pipeline.open_run import OpenRun
from dataflex_pipeline.store.stale import stale
from dataflex_pipeline.training.finished import has_trained

JUDGED_BY_CONTENT = frozenset(
    {"dataset", "eval_dataset", "dataset_dir", "model_name_or_path", "model_revision", "adapter_name_or_path"}
)
"""Keys that say where something is: a moved file is the same file, its content is what counts."""
JUDGED_BY_TRAINING = frozenset({"per_device_train_batch_size", "gradient_accumulation_steps"})
"""Their product is frozen in run.yaml: see `_changed_batch`."""
JUDGED_BY_STEPS = frozenset({"num_train_epochs"})
"""What it comes to is in update_step and warmup_step."""


def check_settings(run: OpenRun) -> None:
    """Refuse settings that a trained run was not made with.

    Only once a round is trained: before that, whatever is on disk is held against its own ingredients.

    Raises:
        StaleError: naming each changed key, old -> new.
    """
    if run.overwrite:
        return
    if not has_trained(run.store):
        _check_warmup(run)
        return
    settle_epochs(run)
    old, new = run.store.read()[0], dump_config(run.given)
    changed = [
        f"{name}: {_plain(old[name])} -> {_plain(new[name])}"
        for name in Config.model_fields
        if _decides(name) and name in old and old[name] != new[name]
    ]
    if _evaluates_by_logging(old) and _evaluates_by_logging(new):
        before, after = old["logging_steps"], new["logging_steps"]
        if before != after:
            changed.append(
                f"logging_steps: {before} -> {after} (without eval_steps it says when to evaluate)"
            )
    changed += _changed_batch(run, old, new)
    if changed:
        raise stale(run.store.settings, f"The run {run.folder.name}", changed)


def _check_warmup(run: OpenRun) -> None:
    """Refuse a warm-up for a run whose first round is scored with the model as it was given, and the reverse.

    Raises:
        StaleError: the scores of round 1 would be of another model.
    """
    if not run.store.exists() or not any(run.store.round(1).scores("any").parent.glob("*.parquet")):
        return
    before, now = run.store.read()[0]["warmup_step"], run.given.warmup_step
    if bool(before) != bool(now):
        changed = [f"warmup_step: {before} -> {now} (round 1 is scored with the model after it)"]
        raise stale(run.store.settings, f"The run {run.folder.name}", changed)


def _changed_batch(run: OpenRun, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return the keys by which another number of rows per step was asked for than the run has, old -> new.

    The same rows may be split otherwise, and over other processes.
    """
    names = [name for name in sorted(JUDGED_BY_TRAINING) if name in old and old[name] != new[name]]
    asked = math.prod(new[name] for name in JUDGED_BY_TRAINING)
    before = math.prod(old.get(name, new[name]) for name in JUDGED_BY_TRAINING)
    if not names or asked in (before, run.global_batch / launch.world_size()):
        return []
    rows = f"(a step of this run has {run.global_batch} rows)"
    return [f"{name}: {old[name]} -> {new[name]} {rows}" for name in names]


def _evaluates_by_logging(settings: Mapping[str, Any]) -> bool:
    return settings.get("eval_strategy") == "steps" and settings.get("eval_steps") is None


def _decides(name: str) -> bool:
    return role_of(name) == "run" and name not in JUDGED_BY_CONTENT | JUDGED_BY_TRAINING | JUDGED_BY_STEPS


def _plain(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
