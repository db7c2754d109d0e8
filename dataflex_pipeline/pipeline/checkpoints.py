"""The checkpoints that features are computed with: of a round, inside one, or the model as it is given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dataflex_pipeline import api
from dataflex_pipeline.errors import ConfigError, RunError
from dataflex_pipeline.features.plan import feature_class
from dataflex_pipeline.models.base import adapter_folder
from dataflex_pipeline.models.source import model_digest
from dataflex_pipeline.pipeline.open_run import OpenRun
from dataflex_pipeline.store.fingerprint import digest, files_digest
from dataflex_pipeline.store.stale import found_ingredients
from dataflex_pipeline.training.kept import checkpoints_of, kept_folder, kept_steps

FRESH_ADAPTER = ("lora_rank", "lora_alpha", "lora_target", "seed")
"""Settings that the weights of a fresh adapter follow from."""


def check_kept_checkpoints(run: OpenRun, name: str) -> None:
    """Refuse a method that needs the checkpoints inside a round where the training would not keep any.

    Raises:
        ConfigError: ``keep_checkpoints`` is not set, or no round has a checkpoint inside it.
    """
    config = run.given
    method, _ = run.method(name)
    if not method.every_checkpoint:
        return
    if not config.warmup_step:
        raise ConfigError(
            f"The method {name} was told to score with all checkpoints of a round (checkpoints: all), and "
            "warmup_step is 0.",
            "Without a warm-up round 1 is scored with the model as it is given, which is one.",
            f"Set warmup_step to the steps of a warm-up, or {name}.checkpoints: last.",
        )
    steps = min(config.warmup_step, config.update_step or config.warmup_step)
    if kept_steps(config, 0, steps):
        return
    raise ConfigError(
        f"The method {name} was told to score with all checkpoints of a round (checkpoints: all), and keep_"
        f"checkpoints is {str(config.keep_checkpoints).lower()}, save_steps {config.save_steps or 'null'}.",
        "Of a round only the end would be there.",
        f"Set keep_checkpoints: true and save_steps below {steps} (the steps of a round), or "
        f"{name}.checkpoints: last.",
    )


def checkpoints_before(run: OpenRun, number: int, name: str) -> tuple[api.Checkpoint, ...]:
    """Return all checkpoints of the round before round ``number``, its end last.

    Raises:
        RunError: none inside that round was kept.
    """
    found = checkpoints_of(run.store.round(number - 1).checkpoint)
    if len(found) > 1:
        return found
    raise RunError(
        f"The method {name} was told to score with all checkpoints of round {number - 1} "
        "(checkpoints: all), and only its end was kept.",
        "Checkpoints inside a round are kept if its training is told so beforehand.",
        f"Set {name}.checkpoints: last, or start a run of another name with keep_checkpoints: true and "
        "save_steps below the steps of a round.",
    )


def is_given(run: OpenRun, checkpoint: int | str) -> bool:
    """Whether a checkpoint is the model as the run was given it: "base", or round 0 without a warm-up."""
    return checkpoint == "base" or (checkpoint == 0 and not run.given.warmup_step)


def adapter_digest(run: OpenRun) -> str | None:
    """Return the digest of the adapter that the run begins with, if there is one."""
    name = run.given.adapter_name_or_path
    if name is None:
        return None
    paths = sorted(adapter_folder(name).glob("adapter_*"))
    return files_digest(paths, [path.name for path in paths])


def _given_model(run: OpenRun, need: api.Need) -> dict[str, Any]:
    """Return what the model is made from that the run was given.

    Gradients are those of the weights that would be trained: of a fresh adapter too, where none is given.
    """
    config, adapter = run.given, adapter_digest(run)
    found = {"model": model_digest(run.config, run.memo.digest), "adapter": adapter}
    if feature_class(need).of_trained_weights:
        found["finetuning_type"] = config.finetuning_type
        if config.finetuning_type == "lora" and adapter is None:
            found |= {name: getattr(config, name) for name in FRESH_ADAPTER}
    return found


def checkpoint_of(run: OpenRun, need: api.Need) -> tuple[Path | None, str | None]:
    """Return the folder of the checkpoint that a need names, and its fingerprint.

    Neither without a checkpoint; no folder for the model that the run was given.
    """
    if need.checkpoint is None:
        return None, None
    if is_given(run, need.checkpoint):
        return None, digest(_given_model(run, need))
    end = run.store.round(int(need.checkpoint)).checkpoint
    made_from = found_ingredients(end) or {}
    if need.step is None:
        return end, digest(made_from)
    # One inside a round is made from the same as its end; the step tells them apart.
    return kept_folder(end, need.step), digest({**made_from, "step": need.step})
