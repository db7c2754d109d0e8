"""The memory of a round's training step, before the first one is taken.

Forward and backward of a row are measured on the model as it trains (models/memory.py), and the largest
batch of the round is worked out from them: per_device_train_batch_size rows as long as the round's longest,
the gradients, and Adam's moments. Where that is more than what is free, ``gradient_checkpointing: auto``
turns it on, which changes last digits only; what does not fit then is refused before anything is trained,
since on a CPU the system ends a process that takes more than there is. An accelerator's allocator raises an
error instead, so there the step is tried.

A quarter of the longest row is enough to see that a small model fits by far; the rest is measured only then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch  # noqa: TID253 (this module is only imported to train)

from dataflex_pipeline.errors import UserError
from dataflex_pipeline.models.batches import Sequences, padded
from dataflex_pipeline.models.memory import SHORTER, counts_itself, free_bytes, measure_batches, peak_of
from dataflex_pipeline.models.room import is_out_of_memory, memory_failure
from dataflex_pipeline.training.own_logits import LACKS

if TYPE_CHECKING:
    from dataflex_pipeline.config.fields import Config
    from dataflex_pipeline.training.trainer import WeightedTrainer

FAR_SHARE, SAFE_SHARE, MOST_SHARE = 0.2, 0.5, 0.7
"""Of the free memory: below the first nothing more is measured; above the second, ``auto`` recomputes
activations; above the third a step is refused. A process on a CPU grows by more than the storages that are
counted: a step of SmolLM2-135M counted at 4.4 GiB did not fit 5.5."""
ADAM_BYTES = 8
"""Bytes of a trained parameter's two moments."""
GIB = 1 << 30


@dataclass(frozen=True)
class Batch:
    """The largest batch of some rows: so many, all as long as the longest, whose tokens are these."""

    rows: int
    ids: np.ndarray

    @classmethod
    def of(cls, rows: Any, per_device: int) -> Batch:
        """Find it in a data set of rows with ``input_ids``."""
        column = rows.data.column("input_ids").combine_chunks()
        longest = int(np.argmax(np.diff(column.offsets.to_numpy())))
        return cls(per_device, column[longest].values.to_numpy())

    def __str__(self) -> str:
        return f"{self.rows} rows of up to {len(self.ids)} tokens"


def settle_memory(trainer: WeightedTrainer, config: Config) -> None:
    """Turn gradient checkpointing on where the first step needs it, or refuse to take it.

    Args:
        trainer: before it trains; its arguments and its model may be changed. config: of the run.

    Raises:
        UserError: a step or an evaluation will not fit.
    """
    free = free_bytes(trainer.args.device)
    if free is None or trainer.is_deepspeed_enabled:
        return
    batch = Batch.of(trainer.train_dataset, config.per_device_train_batch_size)
    with _untouched(trainer):
        needed = _step_bytes(trainer, batch, free)
        checkpointing = trainer.args.gradient_checkpointing
        if needed > SAFE_SHARE * free and config.gradient_checkpointing == "auto" and not checkpointing:
            _recompute(trainer)
            before, needed = needed, _step_bytes(trainer, batch, free)
            trainer.conductor.note(
                f"gradient_checkpointing: auto is on: a step takes about {before / GIB:.1f} GiB without it "
                f"and {needed / GIB:.1f} with it ({batch}), and {free / GIB:.1f} GiB are free."
            )
        if not counts_itself(trainer.args.device):
            if needed > MOST_SHARE * free:
                raise _too_large(config, trainer, batch, needed, free)
            _check_evaluation(trainer, config, free)


def _check_evaluation(trainer: WeightedTrainer, config: Config, free: int) -> None:
    if trainer.eval_dataset is None:
        return
    batch = Batch.of(trainer.eval_dataset, config.per_device_eval_batch_size)
    with torch.no_grad():
        needed = _batch_bytes(batch, free, lambda *some: _losses(trainer, *some), trainer.args.device)
    if needed > MOST_SHARE * free:
        raise UserError(
            f"An evaluation would take about {needed / GIB:.1f} GiB, and {free / GIB:.1f} GiB are free.",
            f"A forward pass takes {batch} (per_device_eval_batch_size).",
            "Lower per_device_eval_batch_size, or set eval_strategy: no.",
        )


def _step_bytes(trainer: WeightedTrainer, batch: Batch, free: int) -> float:
    def run(sequences: Sequences, rows: np.ndarray) -> None:
        torch.autograd.backward(_losses(trainer, sequences, rows))
        _drop_gradients(trainer)

    trained: int = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    return _batch_bytes(batch, free, run, trainer.args.device) + ADAM_BYTES * trained


def _batch_bytes(
    batch: Batch, free: int, run: Callable[[Sequences, np.ndarray], object], device: torch.device
) -> float:
    """Return about what a batch takes; where a row alone does not fit, a row's share times their number."""
    part = max(1, len(batch.ids) // SHORTER)
    ids = batch.ids[:part]
    short = Sequences(ids, ids, np.array([0, part]))
    peaks: list[int] = []

    def measure() -> None:
        peaks.append(peak_of(lambda: run(short, np.arange(1)), device))

    if memory_failure(measure) is not None:
        return float(free) * batch.rows
    roughly = float(peaks[0]) * batch.rows * len(batch.ids) / part
    if roughly < FAR_SHARE * free:
        return roughly
    sizes: list[float] = []

    def closely() -> None:
        found = measure_batches(run, batch.ids, device, lambda size: size <= free)
        sizes.append(found.of_batch(batch.rows, len(batch.ids)))

    return sizes[0] if memory_failure(closely) is None else roughly


def _losses(trainer: WeightedTrainer, sequences: Sequences, rows: np.ndarray) -> torch.Tensor:
    """Return the summed loss of rows as the trainer computes it, from TRL's fused head where that works."""
    arrays = padded(sequences, rows)
    ids, labels, mask = (torch.from_numpy(array).to(trainer.args.device) for array in arrays)
    inputs = {"input_ids": ids, "labels": labels, "attention_mask": mask, "use_cache": False}
    with trainer.compute_loss_context_manager():
        try:
            found: torch.Tensor = trainer.model(**inputs, fused_lm_head=True).log_probs.sum()
        except LACKS as error:
            if is_out_of_memory(error):
                raise
            found = trainer.model(**inputs).loss
    return found


def _recompute(trainer: WeightedTrainer) -> None:
    arguments = {"use_reentrant": False}
    trainer.args.gradient_checkpointing = True
    trainer.args.gradient_checkpointing_kwargs = arguments
    trainer.model.gradient_checkpointing_enable(arguments)


def _drop_gradients(trainer: WeightedTrainer) -> None:
    for parameter in trainer.model.parameters():
        parameter.grad = None


@contextmanager
def _untouched(trainer: WeightedTrainer) -> Iterator[None]:
    """Leave random numbers, gradients and the mode of the model as they were."""
    device = torch.device(trainer.args.device)
    own = counts_itself(device)
    devices = [torch.accelerator.current_device_index()] if own else []
    was_training = trainer.model.training
    trainer.model.train()
    try:
        with torch.random.fork_rng(devices=devices, device_type=device.type if own else "cuda"):
            yield
    finally:
        trainer.model.train(was_training)
        _drop_gradients(trainer)


def _too_large(config: Config, trainer: WeightedTrainer, batch: Batch, needed: float, free: int) -> UserError:
    ways = ["lower cutoff_len (in a new run)"]
    if batch.rows > 1:
        ways.insert(
            0, "lower per_device_train_batch_size and raise gradient_accumulation_steps (in a new run)"
        )
    if not trainer.args.gradient_checkpointing:
        ways.insert(0, "set gradient_checkpointing: true")
    if config.finetuning_type == "full":
        ways.append("set finetuning_type: lora")
    advice = ", or ".join(ways)
    return UserError(
        f"A training step would take about {needed / GIB:.1f} GiB, and {free / GIB:.1f} GiB are free.",
        f"A forward pass takes {batch} (per_device_train_batch_size) and keeps what the way back needs.",
        f"{advice[0].upper()}{advice[1:]}.",
    )
