"""Two short rounds of training, in a folder that is thrown away: the time and disk of a step.

The model is trained by the very code that a run trains with, on sampled rows; the second round goes on from
the checkpoint of the first, as rounds do. A listener to the training's progress tells its steps and its
evaluation apart; what a round takes beside them (loading, setting up, the checkpoint, the picture) is what
remains, and what only the first round of a command takes (importing the trainer) is what it takes more.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from dataflex_pipeline.api import Silent
from dataflex_pipeline.config.fields import Config
from dataflex_pipeline.errors import UserError
from dataflex_pipeline.estimate.costs import ModelShape
from dataflex_pipeline.estimate.machine import begin_peak, peak_bytes
from dataflex_pipeline.estimate.sample import write_parts
from dataflex_pipeline.schemas import INDEX
from dataflex_pipeline.seeds import derive_seed
from dataflex_pipeline.store.parts import PartedTable
from dataflex_pipeline.training import RoundPlan, train_round
from dataflex_pipeline.training.foreseen import ASIDE

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LARGEST_CHECKPOINT = 4 << 30
"""Bytes of a checkpoint that is still worth writing for an estimate."""
LEAST_STEPS, MOST_STEPS = 4, 16
PATIENCE = 10
"""Budgets that the first step may take if there is to be a second round; much of it is paid only once."""
EVALUATED_ROWS = 64
"""Rows of the target that an evaluation is measured on."""


@dataclass(frozen=True)
class TrainingCost:
    """What training was seen to take.

    Attributes:
        once_seconds: paid by the first round of a command only. start_seconds: by every round, beside steps.
        step_seconds: of one optimizer step. steps: that it was measured over.
        evaluation_seconds: of evaluating one token of the target; 0 where nothing is evaluated.
        checkpoint: the folder of the last checkpoint. checkpoint_bytes: of all of its files.
        log_bytes: what a round's folder has beside it, for one step. peak_bytes: of memory.
    """

    once_seconds: float
    start_seconds: float
    step_seconds: float
    evaluation_seconds: float
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
    config: Config,
    pool: PartedTable,
    target: PartedTable | None,
    batch: int,
    scratch: Path,
    budget: float,
    device: str,
) -> TrainingCost:
    """Train one step, and then as many as fit the budget; each round evaluates once if those of the run do.

    Args:
        config: of the run. pool, target: sampled rows, all valid. batch: rows per optimizer step.
        scratch: an empty folder. budget: seconds for the steps. device: where it trains.

    Raises:
        UserError: the disk or the memory is too small, or the model cannot be trained.
    """
    wanted = target if config.eval_strategy != "no" else None
    if wanted is not None:
        few = wanted.part(0, wanted.schema.names).slice(0, EVALUATED_ROWS)
        wanted = write_parts(few, scratch / "evaluated")
    strategy = "no" if wanted is None else "epoch"
    short = config.model_copy(update=ASIDE | {"eval_strategy": strategy})
    begin_peak(device)
    first = last = _round(short, (pool, wanted), batch, None, 1, scratch)
    if first.step <= PATIENCE * budget:
        steps = int(min(MOST_STEPS, max(LEAST_STEPS, budget / max(first.step, 1e-3))))
        last = _round(short, (pool, wanted), batch, first.checkpoint, steps, scratch)
    start = last.beside
    tokens = 0 if wanted is None else int(few.column("n_tokens").to_numpy().sum())
    return TrainingCost(
        once_seconds=max(0.0, first.whole - start - last.step - last.evaluation),
        start_seconds=start,
        step_seconds=last.step,
        evaluation_seconds=last.evaluation / tokens if tokens else 0.0,
        steps=last.steps,
        checkpoint=last.checkpoint,
        checkpoint_bytes=_size(last.checkpoint),
        log_bytes=(_size(last.checkpoint.parent) - _size(last.checkpoint)) // last.steps,
        peak_bytes=peak_bytes(device),
    )


class _Clock(Silent):
    """Notes when a training begins its steps, ends each of them, and says what an evaluation found."""

    def __init__(self) -> None:
        self.begun = 0.0
        self.steps: list[float] = []
        self.evaluated: float | None = None

    def start(self, what: str, total: int | None, unit: str, done: int = 0) -> None:
        """Note the beginning."""
        self.begun = time.perf_counter()

    def advance(self, n: int) -> None:
        """Note the end of a step."""
        self.steps.append(time.perf_counter())

    def say(self, line: str) -> None:
        """Note the end of the evaluation; the line about a step itself comes before it."""
        self.evaluated = time.perf_counter()


@dataclass(frozen=True)
class _Timed:
    """A short round: its steps, its checkpoint, and the seconds of all of it, a step and the evaluation."""

    steps: int
    checkpoint: Path
    whole: float
    step: float
    evaluation: float

    @property
    def beside(self) -> float:
        """Seconds beside the steps and the evaluation."""
        return max(0.0, self.whole - self.steps * self.step - self.evaluation)


def _round(
    config: Config,
    tables: tuple[PartedTable, PartedTable | None],
    batch: int,
    previous: Path | None,
    steps: int,
    scratch: Path,
) -> _Timed:
    (pool, target), number = tables, 0 if previous is None else 1
    folder = scratch / "run" / f"round-{number:02d}"
    plan = RoundPlan(
        round=number,
        first_step=number,
        last_step=number + steps,
        horizon=max(config.horizon, MOST_STEPS + 1),
        global_batch=batch,
        index=_index(pool, steps * batch, config.seed),
        previous=previous,
        work=folder / "work",
        checkpoint=folder / "checkpoint",
        ingredients={"output": "estimate", "steps": steps},
    )
    plan.work.mkdir(parents=True)
    clock, began = _Clock(), time.perf_counter()
    train_round(config, plan, pool, target, clock)
    whole, ends = time.perf_counter() - began, clock.steps
    # The first step of several sets up what the others find ready: it counts as part of the beginning.
    step = (ends[-1] - ends[0]) / (steps - 1) if steps > 1 else ends[0] - clock.begun
    evaluation = 0.0 if target is None or clock.evaluated is None else clock.evaluated - ends[-1]
    return _Timed(steps, plan.checkpoint, whole, step, evaluation)


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
