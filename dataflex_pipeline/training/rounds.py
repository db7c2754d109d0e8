"""Training of a round: from the checkpoint before it to its own, killed and continued at any moment."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dataflex_pipeline import launch
from dataflex_pipeline.api import Progress, Silent
from dataflex_pipeline.errors import ConfigError, RunError
from dataflex_pipeline.store.atomic import commit, write_text
from dataflex_pipeline.store.fingerprint import digest
from dataflex_pipeline.store.parts import PartedTable
from dataflex_pipeline.store.run import BEST
from dataflex_pipeline.store.stale import MARKER
from dataflex_pipeline.training.course import LOG, Judge
from dataflex_pipeline.training.kept import publish_kept
from dataflex_pipeline.training.marker import Marker, read_marker
from dataflex_pipeline.training.plan import RoundPlan, RoundResult
from dataflex_pipeline.training.resume import (
    Start,
    already_there,
    check_start,
    checkpoint_before,
    newest_inside,
)

if TYPE_CHECKING:
    from trl import SFTConfig

    from dataflex_pipeline.config.fields import Config
    from dataflex_pipeline.training.conductor import Conductor
    from dataflex_pipeline.training.first_step import Settled
    from dataflex_pipeline.training.trainer import WeightedTrainer


def train_round(
    config: Config, plan: RoundPlan, pool: PartedTable, target: PartedTable | None, progress: Progress
) -> RoundResult:
    """Train one round and make its checkpoint visible, whole.

    A finished checkpoint with the same ingredients is returned as it is. A killed call is continued from
    its newest complete checkpoint inside the round (``save_steps``), else from the round's start; the
    result is the same, bit for bit, on a CPU.

    Args:
        config: model, optimizer, evaluation; ``model_name_or_path`` names a real folder or hub model.
        plan: the round.
        pool: the prepared pool that the index was selected from.
        target: the prepared target; needed when ``eval_strategy`` is not "no".
        progress: where to report to.

    Returns:
        What the marker of the checkpoint records too.

    Raises:
        UserError: settings that cannot work, a previous checkpoint that is damaged or does not fit, an
            index that does not fit, a loss that is not finite, a full disk. The round's checkpoint is then
            not there.
    """
    plan.check()
    finished = already_there(plan)
    if finished is None:
        # Every process trains, the first one reports.
        listener = progress if launch.rank() == 0 else Silent()
        job = _Job(config, plan, pool, target, listener, _check_settings(config, plan, target))
        finished = _run(job, checkpoint_before(plan))
    assert finished.result is not None  # noqa: S101 (only finished markers get here)
    return RoundResult(**finished.result)


@dataclass(frozen=True)
class _Job:
    """What one call of `train_round` works on."""

    config: Config
    plan: RoundPlan
    pool: PartedTable
    target: PartedTable | None
    progress: Progress
    rule: Judge


def _run(job: _Job, before: Marker | None) -> Marker:
    from accelerate import PartialState

    from dataflex_pipeline.models.base import free_memory, no_bars
    from dataflex_pipeline.training.arguments import tracker_environment, training_arguments

    plan = job.plan
    with tracker_environment(job.config, plan.run_folder), no_bars():
        arguments = training_arguments(job.config, plan)
        inside = _newest_inside(job, arguments)
        if inside is None or not inside.finished:
            start = Start.of(plan, job.config, inside, before, job.progress)
            check_start(start, job.config)
            _train(job, start, arguments)
            free_memory()
            inside = _newest_inside(job, arguments)
    if inside is None or not inside.finished:
        raise RunError(
            f"The training of round {plan.round} ended without a checkpoint.",
            "The trainer stopped before the round's last step.",
            "Run the same command again; if it stays, please report it with the versions in run.yaml.",
        )
    if PartialState().is_main_process:
        _publish(job.config, plan, inside, job.progress)
    PartialState().wait_for_everyone()
    return inside


def _newest_inside(job: _Job, arguments: SFTConfig) -> Marker | None:
    """Return the newest checkpoint inside the round; the first process looks and tidies up, and tells."""
    import torch
    from accelerate.utils import broadcast

    first = arguments.process_index == 0
    found = newest_inside(job.config, job.plan, job.progress) if first else None
    step = broadcast(torch.tensor([-1 if found is None else found.step], device=arguments.device)).item()
    if first or step < 0:
        return found
    folder = job.plan.work / f"checkpoint-{step}"
    launch.await_file(folder / MARKER)
    return read_marker(folder)


def _check_settings(config: Config, plan: RoundPlan, target: PartedTable | None) -> Judge:
    from dataflex_pipeline.training.arguments import check_settings

    if config.eval_strategy != "no" and target is None:
        raise ConfigError(
            f"eval_strategy: {config.eval_strategy} was set, and there is no target.",
            "An evaluation needs rows to evaluate on.",
            "Set eval_dataset, or eval_strategy: no.",
        )
    rule = Judge.of(config)
    check_settings(config, plan.global_batch)
    return rule


def settled_step(
    config: Config, plan: RoundPlan, pool: PartedTable, target: PartedTable | None
) -> Settled | None:
    """Return what the memory makes of a round's training steps, without a step; see `train_round`.

    Returns:
        None for a training by DeepSpeed.

    Raises:
        UserError: settings that cannot work, or a step of a single row that will not fit.
    """
    from dataflex_pipeline.models.base import no_bars
    from dataflex_pipeline.training.arguments import tracker_environment, training_arguments

    plan.check()
    job = _Job(config, plan, pool, target, Silent(), _check_settings(config, plan, target))
    with tracker_environment(config, plan.run_folder), no_bars():
        start = Start.of(plan, config, None, checkpoint_before(plan), job.progress)
        return _settled_trainer(job, start, training_arguments(config, plan))[1]


def _settled_trainer(job: _Job, start: Start, arguments: SFTConfig) -> tuple[WeightedTrainer, Settled | None]:
    """Return a trainer whose steps fit the memory, and what they were settled to."""
    from dataflex_pipeline.training.conductor import Conductor
    from dataflex_pipeline.training.first_step import settle_memory
    from dataflex_pipeline.training.too_small import divides
    from dataflex_pipeline.training.unmasked import leave_out_masks

    conductor = Conductor(job.config, job.plan, start.course, start.log, job.rule, job.progress)
    trainer = _trainer(job, start, conductor, arguments)
    leave_out_masks(trainer, job.config)
    settled = settle_memory(trainer, job.config)
    if divides(trainer, job.config):
        trainer.watch_memory(job.config.lora_dropout > 0)
    return trainer, settled


def _train(job: _Job, start: Start, arguments: SFTConfig) -> None:
    from dataflex_pipeline.training.sharded import release
    from dataflex_pipeline.training.too_small import explained_memory

    plan, config = job.plan, job.config
    trainer, _ = _settled_trainer(job, start, arguments)
    total = plan.last_step - plan.first_step
    job.progress.start(f"train round {plan.round}", total, "steps", done=start.step - plan.first_step)
    try:
        with explained_memory(trainer, config):
            trainer.train(resume_from_checkpoint=None if start.folder is None else str(start.folder))
    finally:
        job.progress.finish()
        _forget_deepspeed(config)
    if trainer.is_deepspeed_enabled:
        release(trainer.model_wrapped)


def _forget_deepspeed(config: Config) -> None:
    """Take back what makes transformers shard every model that is loaded from here on (ZeRO-3)."""
    if config.deepspeed is not None:
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()


def _trainer(job: _Job, start: Start, conductor: Conductor, arguments: SFTConfig) -> WeightedTrainer:
    from transformers import PrinterCallback

    from dataflex_pipeline.models.adapters import fresh_seed, load_for_training
    from dataflex_pipeline.models.base import precision
    from dataflex_pipeline.models.source import attention_notice
    from dataflex_pipeline.models.tokenizer import load_tokenizer
    from dataflex_pipeline.training.arguments import (
        announce_to_lark,
        balances_experts,
        check_router_coefficient,
    )
    from dataflex_pipeline.training.positions import PaddingCollator, target_positions, training_positions
    from dataflex_pipeline.training.trainer import WeightedTrainer
    from dataflex_pipeline.training.unused import settle_unused

    config, device = job.config, str(arguments.device)
    # Several visible GPUs and one process: the trainer would copy the model to each for every batch.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    for notice in (*precision(config, device).notices, attention_notice(config)):
        if notice is not None:
            conductor.note(notice)
    if config.gradient_checkpointing == "auto" and arguments.gradient_checkpointing:
        job.progress.say(f"gradient_checkpointing: auto is on, since training runs on {device}")
    tokenizer = load_tokenizer(config, job.progress.say)
    model = load_for_training(config, start.folder, device, fresh_seed(config), conductor.note)
    check_router_coefficient(config, model)
    settle_unused(arguments, model, lora=config.finetuning_type == "lora")
    embedding = model.get_input_embeddings()  # whose weight is empty where ZeRO-3 shards it
    vocabulary = int(getattr(embedding, "base_layer", embedding).num_embeddings)
    wanted = None if config.eval_strategy == "no" else job.target
    announce_to_lark(config)
    trainer = WeightedTrainer(
        conductor,
        config.seed,
        aux_loss_asked=bool(config.router_aux_loss_coef),
        model=model,
        args=arguments,
        train_dataset=training_positions(
            job.plan, job.pool, vocabulary, by_length=not balances_experts(config, model)
        ),
        eval_dataset=None if wanted is None else target_positions(wanted, vocabulary),
        processing_class=tokenizer,
        data_collator=PaddingCollator(),
    )
    trainer.remove_callback(PrinterCallback)
    conductor.trainer = trainer
    return trainer


def _publish(config: Config, plan: RoundPlan, marker: Marker, progress: Progress) -> None:
    """Make the finished round visible: its log, the plot, the best checkpoint, and last the checkpoint."""
    folder = plan.work / f"checkpoint-{marker.step}"
    write_text(plan.checkpoint.parent / LOG, (folder / LOG).read_text())
    if config.plot_loss:
        from dataflex_pipeline.training.plot import plot_training

        plot_training(plan.run_folder, plan.round)
    best = marker.course["best"]
    if config.load_best_model_at_end and best is not None and best["round"] == plan.round:
        _publish_best(plan, best["step"])
    publish_kept(config, plan, marker.step, progress)
    commit(folder, plan.checkpoint)
    shutil.rmtree(plan.work)


def _publish_best(plan: RoundPlan, step: int) -> None:
    fresh, final = plan.work / f"{BEST}-{step}", plan.run_folder / BEST
    if not fresh.exists():
        moved = read_marker(final)
        if moved is None or moved.step != step or moved.fingerprint != digest(plan.ingredients):
            raise RunError(
                f"The best checkpoint of round {plan.round} (step {step}) is neither in {fresh} "
                f"nor in {final}.",
                "load_best_model_at_end: true promises those weights, and no other file holds them.",
                f"Remove {plan.work} and run the same command again; the round is then trained anew.",
            )
        return  # moved there by a call that was killed right after
    replaced = plan.work / "replaced"
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        commit(final, replaced)
    commit(fresh, final)
