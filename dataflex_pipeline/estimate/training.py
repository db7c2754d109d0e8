"""Up to three short rounds of training, in a folder that is thrown away: the time and disk of a step.

The model is trained by the very code that a run trains with, on sampled rows. What a round takes beside its
steps (loading, writing the checkpoint) and what is paid only once (importing the trainer) come out of the
difference between the rounds.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from dataflex_pipeline.api import Silent
from dataflex_pipeline.config.fields import Config
from dataflex_pipeline.errors import UserError
from dataflex_pipeline.estimate.costs import ModelShape
from dataflex_pipeline.estimate.machine import begin_peak, peak_bytes
from dataflex_pipeline.schemas import INDEX
from dataflex_pipeline.seeds import derive_seed
from dataflex_pipeline.store.parts import PartedTable
from dataflex_pipeline.training import RoundPlan, train_round

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LARGEST_CHECKPOINT = 4 << 30
"""Bytes of a checkpoint that is still worth writing for an estimate."""
LEAST_STEPS, MOST_STEPS = 4, 24
ASIDE: dict[str, Any] = {
    "eval_strategy": "no",
    "load_best_model_at_end": False,
    "early_stopping_steps": None,
    "save_steps": None,
    "keep_checkpoints": False,
    "deepspeed": None,
    "report_to": "none",
    "use_swanlab": False,
    "swanlab_lark_webhook_url": None,
    "swanlab_lark_secret": None,
}
"""Settings of a run that the short rounds leave out: they evaluate nothing and tell nobody."""


@dataclass(frozen=True)
class TrainingCost:
    """What training was seen to take.

    Attributes:
        once_seconds: paid by the first round of a command only. start_seconds: by every round, beside steps.
        step_seconds: of one optimizer step. steps: that it was measured over.
        checkpoint: the folder of the last checkpoint. checkpoint_bytes: of all of its files.
        log_bytes: what a round's folder has beside it, for one step. peak_bytes: of memory.
    """

    once_seconds: float
    start_seconds: float
    step_seconds: float
    steps: int
    checkpoint: Path
    checkpoint_bytes: int
    log_bytes: int
    peak_bytes: int


def shape_of(model: PreTrainedModel) -> ModelShape:
    """Count the parameters of a model that is ready to be trained."""
    own = model.config.get_text_config()
    adapter = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    linear = sum(
        module.weight.numel()
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D") and "lora_" not in name and "lm_head" not in name
    )
    return ModelShape(
        parameters=sum(p.numel() for p in model.parameters()),
        linear=linear,
        trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        adapter=adapter,
        hidden=int(own.hidden_size),
        layers=int(own.num_hidden_layers),
        vocabulary=int(own.vocab_size),
        weight_bytes=sum(p.numel() * p.element_size() for p in model.parameters()),
    )


def load_shape(config: Config, device: str) -> tuple[ModelShape, float]:
    """Load the model once as a round does; return its shape and the seconds that loading the base took."""
    from dataflex_pipeline.models.adapters import wrap_for_training
    from dataflex_pipeline.models.base import load_base

    began = time.perf_counter()
    base = load_base(config, device)
    seconds = time.perf_counter() - began
    return shape_of(wrap_for_training(config, base, 0)), seconds


def checkpoint_bytes(shape: ModelShape) -> int:
    """Return about what a checkpoint takes on disk: the trained weights and Adam's moments."""
    weights = 4 * shape.adapter if shape.adapter else shape.weight_bytes
    return weights + shape.adam_bytes


def measure_training(
    config: Config, pool: PartedTable, batch: int, scratch: Path, budget: float, device: str
) -> TrainingCost:
    """Train one step, one again, and as many as fit the budget, each time from the untrained model.

    Args:
        config: of the run. pool: sampled rows, all valid. batch: rows per optimizer step.
        scratch: an empty folder. budget: seconds for the last round. device: where it trains.

    Raises:
        UserError: the disk or the memory is too small, or the model cannot be trained.
    """
    short = config.model_copy(update=ASIDE)
    begin_peak(device)
    first = warm = last = _round(short, pool, batch, 1, scratch / "first")
    if first.training <= budget:
        warm = last = _round(short, pool, batch, 1, scratch / "second")
    if warm.training <= budget / 2:
        steps = int(min(MOST_STEPS, max(LEAST_STEPS, 2 * budget / max(warm.training, 1e-3))))
        last = _round(short, pool, batch, steps, scratch / "third")
    step = last.training / last.steps
    if last.steps > 1:  # what a round spends before its first step is in both
        step = max(0.0, last.whole - warm.whole) / (last.steps - 1) or step
    return TrainingCost(
        once_seconds=max(0.0, first.whole - warm.whole),
        start_seconds=max(0.0, warm.whole - step),
        step_seconds=step,
        steps=last.steps,
        checkpoint=last.checkpoint,
        checkpoint_bytes=_size(last.checkpoint),
        log_bytes=(_size(last.checkpoint.parent) - _size(last.checkpoint)) // last.steps,
        peak_bytes=peak_bytes(device),
    )


@dataclass(frozen=True)
class _Timed:
    """A short round: its steps, its checkpoint, the seconds of all of it and of its training loop."""

    steps: int
    checkpoint: Path
    whole: float
    training: float


def _round(config: Config, pool: PartedTable, batch: int, steps: int, folder: Path) -> _Timed:
    plan = RoundPlan(
        round=0,
        first_step=0,
        last_step=steps,
        horizon=max(config.horizon, steps),
        global_batch=batch,
        index=_index(pool, steps * batch, config.seed),
        previous=None,
        work=folder / "round-00" / "work",
        checkpoint=folder / "round-00" / "checkpoint",
        ingredients={"output": "estimate", "steps": steps},
    )
    plan.work.mkdir(parents=True)
    began = time.perf_counter()
    result = train_round(config, plan, pool, None, Silent())
    return _Timed(steps, plan.checkpoint, time.perf_counter() - began, result.seconds)


def _index(pool: PartedTable, positions: int, seed: int) -> pa.Table:
    rows = np.random.default_rng(derive_seed(seed, "estimate index")).integers(0, pool.n_rows, positions)
    ids = pool.take(rows, ["row_id"]).column("row_id")
    ones = np.ones(positions)
    columns = {
        "position": np.arange(positions),
        "row": rows,
        "row_id": ids,
        "weight": ones.astype(np.float32),
        "probability": ones / pool.n_rows,
        "score": pa.nulls(positions, pa.float64()),
    }
    return pa.table(columns, schema=INDEX)


def check_room(shape: ModelShape, scratch: Path) -> None:
    """Check that two checkpoints fit the disk of the scratch folder.

    Raises:
        UserError: they do not.
    """
    wanted, free = 3 * checkpoint_bytes(shape), shutil.disk_usage(scratch).free
    if wanted > free:
        raise UserError(
            f"The calibration trains a few steps and writes checkpoints of "
            f"{checkpoint_bytes(shape) / 1e9:.1f} GB below {scratch.parent}.",
            f"{free / 1e9:.1f} GB are free there.",
            "Set the environment variable TMPDIR to a folder on a larger disk.",
        )


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
