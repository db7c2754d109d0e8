"""The end of a training whose memory is too small, in words, and what goes on from there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from dataflex_pipeline.errors import UserError
from dataflex_pipeline.models.memory import free_bytes
from dataflex_pipeline.models.room import give_memory_back, is_out_of_memory
from dataflex_pipeline.store.agreed import agreed_file
from dataflex_pipeline.store.atomic import write_text
from dataflex_pipeline.store.stale import MARKER
from dataflex_pipeline.training.arguments import balances_experts
from dataflex_pipeline.training.pieces import RowTooLargeError

if TYPE_CHECKING:
    from dataflex_pipeline.config.fields import Config
    from dataflex_pipeline.training.trainer import WeightedTrainer

GIB = 1 << 30


def divides(trainer: WeightedTrainer, config: Config) -> bool:
    """Whether a training takes a micro-batch that does not fit in smaller pieces, and goes on.

    A load-balancing loss of experts is a mean over the rows at hand, so that pieces would give another loss;
    DeepSpeed's weights and gradients may be sharded; of several processes one cannot take more pieces.
    """
    return (
        trainer.args.world_size == 1
        and not trainer.is_deepspeed_enabled
        and not balances_experts(config, trainer.model)
    )


@contextmanager
def explained_memory(trainer: WeightedTrainer, config: Config) -> Iterator[None]:
    """Turn a memory that is too small into an error that says what to set and where the training goes on."""
    said = None
    try:
        yield
    except RowTooLargeError as error:
        said = error.what
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        said = f"The memory of {trainer.args.device} is too small in step {trainer.state.global_step + 1}: "
        said += str(error).splitlines()[0]
    if said is not None:  # outside, so that nothing of the failed step is held any more
        trainer.model.zero_grad(set_to_none=True)
        give_memory_back()
        raise _too_small(trainer, config, said)


def _too_small(trainer: WeightedTrainer, config: Config, said: str) -> UserError:
    free = free_bytes(trainer.args.device)
    there = "" if free is None else f"; {free / GIB:.2f} GiB are free beside the model and the optimizer"
    rows, fewer = trainer.args.per_device_train_batch_size, _note_fewer_rows(trainer, config)
    why = f"A forward pass takes at most {rows} rows of up to {config.cutoff_len:,} tokens{there}."
    again = f"run the same command again: it goes on from {_last_checkpoint(trainer)}"
    if fewer:
        first = f"{again[0].upper()}{again[1:]} with {fewer} of {rows} rows at a time."
        return UserError(said, why, f"{first} {_advice(trainer)}")
    return UserError(said, why, f"{_advice(trainer)} Then {again}.")


def _advice(trainer: WeightedTrainer) -> str:
    ways = [] if trainer.args.gradient_checkpointing else ["set gradient_checkpointing: true"]
    ways = ways if trainer.model.training else ["set eval_strategy: no"]  # it failed in an evaluation
    ways += ["end what else uses the device"]
    text = ", or ".join(ways)
    return (
        f"{text[0].upper()}{text[1:]}; a new run may lower cutoff_len, or per_device_train_batch_size with "
        "more gradient_accumulation_steps."
    )


def _last_checkpoint(trainer: WeightedTrainer) -> str:
    plan = trainer.conductor.plan
    folders = plan.work.glob("checkpoint-*")
    steps = [int(each.name.partition("-")[2]) for each in folders if (each / MARKER).is_file()]
    return f"the checkpoint of step {max(steps)}" if steps else f"the beginning of round {plan.round}"


def _note_fewer_rows(trainer: WeightedTrainer, config: Config) -> int:
    """Note for the next call that it takes fewer rows at a time, and return how many; 0 where it does not."""
    rows, plan = trainer.args.per_device_train_batch_size, trainer.conductor.plan
    if rows == 1 or trainer.is_deepspeed_enabled or balances_experts(config, trainer.model):
        return 0
    if divides(trainer, config):  # a row alone did not fit
        return 0
    fewer = max(part for part in range(1, rows) if rows % part == 0)
    plan.work.mkdir(parents=True, exist_ok=True)
    write_text(agreed_file(plan.work, plan.rows_name), f"{fewer}\n")
    return fewer
