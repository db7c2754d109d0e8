"""The checkpoints that features are computed with: of a round, inside one, or the model as it is given."""

from __future__ import annotations

from pathlib import Path

from dataflex_pipeline import api
from dataflex_pipeline.errors import ConfigError, RunError
from dataflex_pipeline.features.plan import feature_class
from dataflex_pipeline.pipeline.base_model import base_fingerprint, is_given
from dataflex_pipeline.pipeline.open_run import OpenRun
from dataflex_pipeline.store.fingerprint import digest
from dataflex_pipeline.store.stale import found_ingredients
from dataflex_pipeline.training.kept import checkpoints_of, kept_folder, kept_steps


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


def checkpoint_of(run: OpenRun, need: api.Need) -> tuple[Path | None, str | None]:
    """Return the folder of the checkpoint that a need names, and its fingerprint.

    Neither without a checkpoint; no folder for the model that the run was given.
    """
    if need.checkpoint is None:
        return None, None
    if is_given(run, need.checkpoint):
        return None, base_fingerprint(run, of_trained_weights=feature_class(need).of_trained_weights)
    end = run.store.round(int(need.checkpoint)).checkpoint
    made_from = found_ingredients(end) or {}
    if need.step is None:
        return end, digest(made_from)
    # One inside a round is made from the same as its end; the step tells them apart.
    return kept_folder(end, need.step), digest({**made_from, "step": need.step})
