"""Training a round on its weighted index, going on from the checkpoint of the round before."""

from __future__ import annotations

import shutil
import time
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

from dataflex_pipeline import launch
from dataflex_pipeline.api import Progress, Silent
from dataflex_pipeline.config.fields import Config
from dataflex_pipeline.config.load import SentConfig
from dataflex_pipeline.errors import CorruptError, RunError
from dataflex_pipeline.features.plan import opened
from dataflex_pipeline.launch.team import Job, Place, Team
from dataflex_pipeline.models.source import attention_kernel, model_digest
from dataflex_pipeline.pipeline.base_model import adapter_digest
from dataflex_pipeline.pipeline.checkpoints import check_kept_checkpoints
from dataflex_pipeline.pipeline.damage import check_checkpoint, remember_checkpoint
from dataflex_pipeline.pipeline.index import read_index
from dataflex_pipeline.pipeline.open_run import OpenRun
from dataflex_pipeline.pipeline.output import Outcome, Output, note
from dataflex_pipeline.pipeline.prepare import has_target, open_split
from dataflex_pipeline.store.atomic import set_aside
from dataflex_pipeline.store.fingerprint import digest
from dataflex_pipeline.store.parquet import read_whole
from dataflex_pipeline.store.stale import found_ingredients, is_complete
from dataflex_pipeline.store.tables import TableFile
from dataflex_pipeline.training import RoundPlan, RoundResult, read_marker, train_round
from dataflex_pipeline.training.marker import verify_checkpoint

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


def step_range(run: OpenRun, number: int) -> tuple[int, int]:
    """Return the optimizer steps of a round over the whole run: first, and last not included."""
    config = run.given
    if number == 0:
        return 0, config.warmup_step
    first = config.warmup_step + (number - 1) * config.update_step
    return first, first + config.update_step


def _training_settings(config: Config) -> dict[str, Any]:
    """Return what of the settings a checkpoint is made from.

    Without ``eval_steps``, ``logging_steps`` says when evaluations happen, and with them which weights are
    best and when early stopping fires. An attention kernel, a factor of the load-balancing loss, a
    quantization and tf32 are named only where there is one.
    """
    settings: dict[str, Any] = {name: getattr(config, name) for name in TRAINING_KEYS}
    if config.eval_strategy == "steps":
        settings["eval_steps"] = config.eval_steps or config.logging_steps
    for name in ("attn_implementation", "router_aux_loss_coef", "quantization_bit", "tf32"):
        value = getattr(config, name)
        if value is not None and value is not False:
            settings[name] = value
    return settings


class Checkpoint(Output):
    """The checkpoint at the end of a round.

    Args:
        run: that it belongs to.
        number: the round; 0 is the warm-up.
    """

    def __init__(self, run: OpenRun, number: int) -> None:
        self.number, self.where = number, run.store.round(number)
        super().__init__(
            run,
            f"round {number} checkpoint",
            f"train, {'warm-up' if number == 0 else f'round {number}'}",
            f"The checkpoint of round {number}",
            self.where.checkpoint,
            (self.where.index,),
        )
        self.follows = (f"round {number} index", f"round {number - 1} checkpoint")

    def inputs(self) -> dict[str, Any]:
        """Return the index, the checkpoint before, model, rows, and the settings of the training."""
        run, number = self.run, self.number
        before = self._previous()
        config = run.config.model_copy(update={"attn_implementation": attention_kernel(run.config)})
        evaluates = has_target(run) and run.given.eval_strategy != "no"
        return {
            "output": "checkpoint",
            "round": number,
            "index": TableFile(self.where.index).fingerprint,
            "previous": None if before is None else digest(found_ingredients(before) or {}),
            "model": model_digest(run.config, run.memo.digest),
            "adapter": adapter_digest(run),
            "pool": open_split(run, "pool").fingerprint,
            "target": open_split(run, "target").fingerprint if evaluates else None,
            "global_batch": run.global_batch,
            "training": _training_settings(config),
        }

    def check(self) -> None:
        """Check the files against the digests in the marker, of those kept inside the round too."""
        check_checkpoint(self.run, self.number)

    def make(self) -> Outcome:
        """Train the round unless its checkpoint is there.

        Raises:
            RunError: the round before is not trained, or the run was ended by early stopping.
        """
        run = self.run
        run.check_round(self.number)
        check_kept_checkpoints(run, run.given.component_name)
        read_index(run, self.number)
        if self._previous() is not None:
            self._check_previous()
        if run.overwrite:
            self._set_aside_damaged()
        outcome = super().make()
        if not outcome.done:
            # left over by a kill between the last rename and the end
            shutil.rmtree(self.where.work, ignore_errors=True)
        return outcome

    def write(self) -> None:
        """Train the round, on all processes of the launch."""
        run, number, began = self.run, self.number, time.monotonic()
        first, last = step_range(run, number)
        job = Training(
            config=run.config,
            pool=open_split(run, "pool").folder,
            target=open_split(run, "target").folder if has_target(run) else None,
            index=self.where.index,
            round=number,
            first_step=first,
            last_step=last,
            horizon=run.given.horizon,
            global_batch=run.global_batch,
            previous=self._previous(),
            work=self.where.work,
            checkpoint=self.where.checkpoint,
            ingredients=self.inputs(),
        )
        team = launch.current()
        with nullcontext() if team is None else team.give(job, run.given.ddp_timeout):
            job.train(run.progress)
        remember_checkpoint(run, number)
        note(run, "train", number, began, on_device=True)

    def _previous(self) -> Path | None:
        """Return the checkpoint that the training continues; None for the first round that is trained."""
        first = self.number == self.run.given.first_round
        return None if first else self.run.store.round(self.number - 1).checkpoint

    def _set_aside_damaged(self) -> None:
        if self.path.exists():
            try:
                verify_checkpoint(self.path, self.run.memo.output_digest)
            except CorruptError:
                set_aside(self.path)

    def _check_previous(self) -> None:
        before = Checkpoint(self.run, self.number - 1)
        if not is_complete(before.path):
            raise RunError(
                f"Round {self.number} cannot train: round {before.number} has no finished checkpoint "
                f"({before.path}).",
                "Optimizer, schedule and weights carry over from round to round.",
                f"Run `dataflex {'warmup' if self.number == 1 else f'round {before.number}'}` first.",
            )
        if before.ended_early:
            raise RunError(
                f"Round {self.number} was asked for, and the run ended in round {before.number} by early "
                "stopping.",
                f"The target loss had not improved for {self.run.given.early_stopping_steps} evaluations.",
                "Use the checkpoint in best/ (or the last one), or start a run of another name without it.",
            )

    @property
    def ended_early(self) -> bool:
        """Whether early stopping ended the run in this round."""
        marker = read_marker(self.path)
        return marker is not None and bool((marker.result or {}).get("stopped_early"))

    def describe(self) -> str:
        """Return steps, losses and learning rate."""
        marker = read_marker(self.path)
        if marker is None or marker.result is None:
            return "not finished"
        result = RoundResult(**marker.result)
        text = (
            f"{result.steps} steps, train loss {result.train_loss:.4f}, "
            f"mean lr {result.mean_learning_rate:.3g}"
        )
        if "eval_loss" in result.metrics:
            text += f", target loss {result.metrics['eval_loss']:.4f}"
        return text + (", stopped early" if result.stopped_early else "")


class Training(Job):
    """A round to train; the fields not named here are those of its `RoundPlan`.

    Attributes:
        config: of the run.
        pool: the prepared pool.
        target: the prepared target; None without one.
        index: the file of the round's index.
    """

    config: SentConfig
    pool: Place
    target: Place | None
    index: Place
    round: int
    first_step: int
    last_step: int
    horizon: int
    global_batch: int
    previous: Place | None
    work: Place
    checkpoint: Place
    ingredients: dict[str, Any]

    def do(self, team: Team) -> None:
        """Train the round together with rank 0, which reports."""
        self.train(Silent())

    def train(self, progress: Progress) -> None:
        """Train the round; called in every process of a launch."""
        launch.await_file(self.index)
        planned = {each.name: getattr(self, each.name) for each in fields(RoundPlan)}
        plan = RoundPlan(**planned | {"index": read_whole(self.index)})
        target = None if self.target is None else opened(self.target)
        train_round(self.config, plan, opened(self.pool), target, progress)
