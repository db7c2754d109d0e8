"""The memory of a round's training step, before the first one is taken.

Forward and backward of a row are measured on the model as it trains (models/memory.py), and the largest
batch of the round is worked out from them: per_device_train_batch_size rows as long as the round's longest,
the gradients, and Adam's moments. Where that comes near what is free, ``gradient_checkpointing: auto`` turns
recomputation on, and then fewer rows are taken at a time: a step's loss is a sum over its rows, so a smaller
micro-batch with as many more of them per step changes last digits only. A single row that does not fit is
refused before anything is trained, since on a CPU the system ends a process that takes more than there is.
An accelerator's allocator raises an error instead, so there it is tried.

All processes of a launch take as many rows at a time as the one with the least room. The number is noted in
the unfinished round's folder, so that a training which was killed goes on with the same micro-batches.

A quarter of the longest row is enough to see that a small model fits by far; the rest is measured only then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch  # noqa: TID253 (this module is only imported to train)

from dataflex_pipeline.errors import UserError
from dataflex_pipeline.models.base import free_memory
from dataflex_pipeline.models.batches import Sequences, padded
from dataflex_pipeline.models.memory import (
    SHORTER,
    counts_itself,
    free_bytes,
    measure_batches,
    peak_of,
    share_of,
)
from dataflex_pipeline.models.room import is_out_of_memory, memory_failure
from dataflex_pipeline.store.agreed import agreed, agreed_file
from dataflex_pipeline.store.atomic import write_text
from dataflex_pipeline.training.arguments import balances_experts
from dataflex_pipeline.training.own_logits import LACKS

if TYPE_CHECKING:
    from dataflex_pipeline.config.fields import Config
    from dataflex_pipeline.training.trainer import WeightedTrainer

FAR_SHARE, ROWS_SHARE, SAFE_SHARE, MOST_SHARE = 0.2, 0.4, 0.5, 0.5
"""Of the free memory: below the first nothing more is measured; above the second fewer rows are taken at a
time; above the third ``auto`` recomputes activations; above the fourth a single row is refused. A process on
a CPU grows by more than the storages that are counted: SmolLM2-135M by 1.5 times a step that was counted at
9.3 GiB, and by 1.8 times one of 2.4 GiB with recomputed activations."""
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
        return f"{self.rows} row{'s' if self.rows > 1 else ''} of up to {len(self.ids)} tokens"


@dataclass(frozen=True)
class Needs:
    """What batches take, in bytes.

    Attributes:
        fixed: of any batch. per_row: of each row as long as the longest.
        held: gradients that stay from one micro-batch to the next; where a step has one, there are none.
        undivided: rows at a time with which a step has one micro-batch; 0: it has several anyway.
    """

    fixed: float
    per_row: float
    held: float = 0.0
    undivided: int = 0

    def of(self, rows: int) -> float:
        """Return what so many rows at a time take."""
        return self.fixed + rows * self.per_row + (0.0 if rows == self.undivided else self.held)

    def most_rows(self, rows: int, bytes_: float) -> int:
        """Return the most rows at a time, of those that divide so many, which take no more bytes; else 1."""
        parts = (rows // n for n in range(1, rows + 1) if rows % n == 0)
        return next((part for part in parts if self.of(part) <= bytes_), 1)


@dataclass(frozen=True)
class Settled:
    """What the memory makes of a round's training steps.

    Attributes:
        batch: the largest one, as it is set. free: bytes; None where the system does not tell.
        needed: bytes of a step with as many rows at a time as are taken; 0 where nothing was measured.
        rows: at a time, as they are taken. steps: micro-batches per optimizer step, as set and as taken.
        recomputes: whether activations are recomputed because of it.
    """

    batch: Batch
    free: int | None
    needed: float
    rows: int
    steps: tuple[int, int]
    recomputes: bool

    @property
    def division(self) -> str:
        """The settings that change, as they are written."""
        set_, taken = self.steps
        return (
            f"per_device_train_batch_size {self.batch.rows} -> {self.rows}, gradient_accumulation_steps "
            f"{set_} -> {taken}"
        )

    def plain(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {
            "free_bytes": self.free,
            "step_bytes": round(self.needed),
            "longest_row": len(self.batch.ids),
            "per_device_train_batch_size": [self.batch.rows, self.rows],
            "gradient_accumulation_steps": list(self.steps),
            "gradient_checkpointing_turned_on": self.recomputes,
        }

    def __str__(self) -> str:
        if self.free is None:
            return "what is free is not known here, so steps are taken as they are set"
        taken = replace(self.batch, rows=self.rows)
        said = f"a step takes about {self.needed / GIB:.2f} GiB ({taken}), and {self.free / GIB:.1f} are free"
        said += "; gradient_checkpointing: auto is on" if self.recomputes else ""
        return said if self.rows == self.batch.rows else f"{said}; {self.division}"


def settle_memory(trainer: WeightedTrainer, config: Config) -> Settled | None:
    """Recompute activations and take fewer rows at a time where a step needs it, or refuse to take it.

    Args:
        trainer: before it trains; its arguments and its model may be changed. config: of the run.

    Returns:
        What steps were settled to; None for a training by DeepSpeed, which is as it is set.

    Raises:
        UserError: a step of a single row or an evaluation of one will not fit.
    """
    if trainer.is_deepspeed_enabled:
        return None
    free_memory()
    free = free_bytes(trainer.args.device)
    with _untouched(trainer):
        settled = _settle_step(trainer, config, free)
        if trainer.eval_dataset is not None:
            _settle_evaluation(trainer, free)
    free_memory()
    return settled


def _settle_step(trainer: WeightedTrainer, config: Config, free: int | None) -> Settled:
    batch = Batch.of(trainer.train_dataset, trainer.args.per_device_train_batch_size)
    plan, first = trainer.conductor.plan, trainer.args.process_index == 0
    set_, recomputed = trainer.args.gradient_accumulation_steps, trainer.args.gradient_checkpointing
    own, figures, needs = batch.rows, "", Needs(0.0, 0.0)
    if free is not None:
        needs = _settled_needs(trainer, config, batch, free)
        own = _rows_that_fit(trainer, config, batch, needs, free)
        figures = _figures("A step", needs, batch.rows, own, free)
    kept = agreed(plan.work, plan.rows_name) if first else None
    rows = _least(trainer, own if kept is None or batch.rows % kept else min(own, kept))
    trainer.take_rows_at_a_time(rows)
    settled = Settled(
        batch,
        free,
        needs.of(rows),
        rows,
        (set_, trainer.args.gradient_accumulation_steps),
        trainer.args.gradient_checkpointing and not recomputed,
    )
    if rows == batch.rows:
        return settled
    if rows < own:
        figures = "This round began so" if rows == kept else "Another process has room for no more"
    dropout = ", but for dropout, which draws other numbers" if config.lora_dropout else ""
    trainer.conductor.note(
        f"{figures}: {settled.division} for this training; the numbers of the run stay as they are{dropout}."
    )
    if first and rows != kept:
        plan.work.mkdir(parents=True, exist_ok=True)
        write_text(agreed_file(plan.work, plan.rows_name), f"{rows}\n")
    return settled


def _settled_needs(trainer: WeightedTrainer, config: Config, batch: Batch, free: int) -> Needs:
    """Return what a step takes, after turning recomputation on where auto asks for it."""
    needs = _step_needs(trainer, batch, free)
    needed = needs.of(batch.rows)
    if trainer.args.gradient_checkpointing or config.gradient_checkpointing != "auto":
        return needs
    if needed <= SAFE_SHARE * free:
        return needs
    _recompute(trainer)
    needs = _step_needs(trainer, batch, free)
    trainer.conductor.note(
        f"gradient_checkpointing: auto is on: a step takes about {needed / GIB:.1f} GiB without it "
        f"and {needs.of(batch.rows) / GIB:.1f} with it ({batch}), and {free / GIB:.1f} GiB are free."
    )
    return needs


def _rows_that_fit(trainer: WeightedTrainer, config: Config, batch: Batch, needs: Needs, free: int) -> int:
    # A load-balancing loss is a mean over micro-batches: with others it would be another loss.
    alone = balances_experts(config, trainer.model)
    rows = batch.rows if alone else needs.most_rows(batch.rows, _rows_share(trainer) * free)
    if not counts_itself(trainer.args.device) and needs.of(rows) > MOST_SHARE * free:
        raise _too_large(config, trainer, replace(batch, rows=rows), needs.of(rows), free)
    return rows


def _figures(what: str, needs: Needs, before: int, rows: int, free: int) -> str:
    return (
        f"{what} takes about {needs.of(before) / GIB:.1f} GiB with {before} rows at a time and "
        f"{needs.of(rows) / GIB:.1f} with {rows}, and {free / GIB:.1f} GiB are free"
    )


def _settle_evaluation(trainer: WeightedTrainer, free: int | None) -> None:
    batch = Batch.of(trainer.eval_dataset, trainer.args.per_device_eval_batch_size)
    own, figures = batch.rows, ""
    if free is not None:
        with torch.no_grad():
            needs = _needs(batch, free, lambda *some: _losses(trainer, *some), trainer.args.device)
        own = needs.most_rows(batch.rows, _rows_share(trainer) * free)
        figures = _figures("An evaluation", needs, batch.rows, own, free)
        if not counts_itself(trainer.args.device) and needs.of(own) > MOST_SHARE * free:
            raise UserError(
                f"An evaluation would take about {needs.of(own) / GIB:.1f} GiB, and {free / GIB:.1f} GiB are "
                "free.",
                f"A forward pass takes {replace(batch, rows=own)}, the fewest there are.",
                "Set eval_strategy: no, or lower cutoff_len (in a new run).",
            )
    rows = _least(trainer, own)
    if rows == batch.rows:
        return
    if rows < own:
        figures = "Another process has room for no more"
    trainer.args.per_device_eval_batch_size = rows
    trainer.conductor.note(
        f"{figures}: per_device_eval_batch_size {batch.rows} -> {rows} for this training; evaluations give "
        "the same numbers."
    )


def _least(trainer: WeightedTrainer, rows: int) -> int:
    """Return the smallest of what the processes have room for."""
    own = torch.tensor([rows], device=trainer.args.device)
    return int(trainer.accelerator.gather(own).min())


def _rows_share(trainer: WeightedTrainer) -> float:
    """Return the share of the free memory that the rows taken at a time may need."""
    device = trainer.args.device
    return share_of(device) if counts_itself(device) else ROWS_SHARE


def _step_needs(trainer: WeightedTrainer, batch: Batch, free: int) -> Needs:
    def run(sequences: Sequences, rows: np.ndarray) -> None:
        torch.autograd.backward(_losses(trainer, sequences, rows))
        _drop_gradients(trainer)

    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    found = _needs(batch, free, run, trainer.args.device)
    return replace(
        found,
        fixed=found.fixed + ADAM_BYTES * sum(p.numel() for p in trained),
        held=float(sum(p.numel() * p.element_size() for p in trained)),
        undivided=batch.rows if trainer.args.gradient_accumulation_steps == 1 else 0,
    )


def _needs(
    batch: Batch, free: int, run: Callable[[Sequences, np.ndarray], object], device: torch.device
) -> Needs:
    """Return about what batches take; where a row alone does not fit, a part's share times its length."""
    part = max(1, len(batch.ids) // SHORTER)
    ids = batch.ids[:part]
    short = Sequences(ids, ids, np.array([0, part]))
    peaks: list[int] = []

    def measure() -> None:
        peaks.append(peak_of(lambda: run(short, np.arange(1)), device))

    if memory_failure(measure) is not None:
        return Needs(0.0, float(free))
    roughly = Needs(0.0, float(peaks[0]) * len(batch.ids) / part)
    if roughly.of(batch.rows) < FAR_SHARE * free:
        return roughly
    found: list[Needs] = []

    def closely() -> None:
        seen = measure_batches(run, batch.ids, device, lambda size: size <= free)
        found.append(Needs(seen.fixed, seen.per_row + len(batch.ids) * seen.per_token))

    return found[0] if memory_failure(closely) is None else roughly


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
    why = ", the fewest there are,"
    if batch.rows > 1:
        why = " (fewer at a time would be another load-balancing loss)"
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
        f"A forward pass takes {batch}{why} and keeps what the way back needs.",
        f"{advice[0].upper()}{advice[1:]}.",
    )
