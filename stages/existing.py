"""What is on disk, held against the present settings, before anything is written."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dataflex_pipeline import launch
from dataflex_pipeline.api import Split
from dataflex_pipeline.config.fields import Config, role_of
from dataflex_pipeline.config.load import dump_config
from dataflex_pipeline.store.parts import PartedTable
from dataflex_pipeline.store.stale import found_ingredients, is_complete, is_current, stale
from dataflex_pipeline.store.tables import TableFile

from .context import Context
from .damage import check_outputs
from .prepare import Source, open_split, table_folder
from .score import is_scored, plan_scoring
from .select_index import wanted_index, wanted_probabilities, wanted_warmup_index, warmup_draw
from .train_round import wanted_checkpoint

JUDGED_BY_CONTENT = frozenset(
    {"dataset", "eval_dataset", "dataset_dir", "model_name_or_path", "model_revision", "adapter_name_or_path"}
)
"""Keys that say where something is: a moved file is the same file, its content is what counts."""
JUDGED_BY_TRAINING = frozenset({"per_device_train_batch_size", "gradient_accumulation_steps"})
"""Their product is frozen in run.yaml: see `_changed_batch`."""


def check_settings(context: Context) -> None:
    """Refuse settings that a trained run was not made with.

    Only once the warm-up is trained: before that, whatever is on disk is held against its own ingredients.

    Raises:
        StaleError: naming each changed key, old -> new.
    """
    if context.overwrite or not is_complete(context.run.round(0).checkpoint):
        return
    old, new = context.run.read()[0], dump_config(context.given)
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
    changed += _changed_batch(context, old, new)
    if changed:
        raise stale(context.run.settings, f"The run {context.run.folder.name}", changed)


def _changed_batch(context: Context, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return the keys by which another number of rows per step was asked for than the run has, old -> new.

    The same rows may be split otherwise, and over other processes.
    """
    names = [name for name in sorted(JUDGED_BY_TRAINING) if name in old and old[name] != new[name]]
    asked = math.prod(new[name] for name in JUDGED_BY_TRAINING)
    before = math.prod(old.get(name, new[name]) for name in JUDGED_BY_TRAINING)
    if not names or asked in (before, context.global_batch / launch.world_size()):
        return []
    rows = f"(a step of this run has {context.global_batch} rows)"
    return [f"{name}: {old[name]} -> {new[name]} {rows}" for name in names]


def _evaluates_by_logging(settings: Mapping[str, Any]) -> bool:
    return settings.get("eval_strategy") == "steps" and settings.get("eval_steps") is None


def _decides(name: str) -> bool:
    return role_of(name) == "run" and name not in JUDGED_BY_CONTENT | JUDGED_BY_TRAINING


def _plain(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def check_existing(context: Context, last: int, sources: Mapping[Split, Source]) -> None:
    """Hold every finished output up to round ``last`` against what the present settings would make.

    A command that would stop in the middle thus stops before it has written anything. With ``--overwrite``
    there is nothing to refuse.

    Raises:
        StaleError: an output was made with other settings. CorruptError: it cannot be read.
    """
    if context.overwrite or not context.run.exists():
        return
    check_settings(context)
    for split, source in sources.items():
        folder = table_folder(context, split)
        if not is_current(folder, source.wanted, f"The {split}"):
            return
        PartedTable.open(folder)
    check_outputs(context, last)
    for number in range(last + 1):
        index_there = _warmup_index(context) if number == 0 else _scored_index(context, number)
        if not index_there or not _checkpoint(context, number):
            return


def _warmup_index(context: Context) -> bool:
    wanted = wanted_warmup_index(open_split(context, "pool"), warmup_draw(context))
    return is_current(context.run.round(0).index, wanted, "The index of the warm-up")


def _scored_index(context: Context, number: int) -> bool:
    """Hold a round's scores, probabilities and index against the settings; False where one is missing."""
    name, where = context.given.component_name, context.run.round(number)
    check_index_method(where.index, number, name)
    scoring = plan_scoring(context, number, name)
    label = f"of round {number}"
    if not is_scored(context, scoring):
        return False
    scores = TableFile(where.scores(name))
    wanted = wanted_probabilities(context, scoring, scores)
    if not is_current(where.probabilities(name), wanted, f"The {name} probabilities {label}"):
        return False
    index = wanted_index(context, scoring, scores, TableFile(where.probabilities(name)).fingerprint)
    return is_current(where.index, index, f"The index {label}")


def check_index_method(index: Path, number: int, name: str) -> None:
    """Refuse to go on with another method than the one that made a round's index."""
    made = (found_ingredients(index) or {}).get("method", name)
    if made != name:
        raise stale(index, f"The index of round {number}", [f"method: {made} -> {name}"])


def _checkpoint(context: Context, number: int) -> bool:
    where = context.run.round(number)
    if not is_complete(where.checkpoint):
        return False
    wanted = wanted_checkpoint(context, number, TableFile(where.index).fingerprint)
    return is_current(where.checkpoint, wanted, f"The checkpoint of round {number}")
