"""The plan of a round's training, and its result."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dataflex_pipeline.errors import CorruptError, RunError
from dataflex_pipeline.store.fingerprint import digest


@dataclass(frozen=True)
class RoundPlan:
    """One round: a stretch of optimizer steps of the whole run, with the rows that it trains on.

    Attributes:
        round: number of the round; 0 is the warm-up.
        first_step, last_step: the round trains steps first_step .. last_step - 1 of the whole run.
        horizon: steps of the whole run, over which the learning-rate schedule extends.
        global_batch: rows per optimizer step.
        index: INDEX table of this round, (last_step - first_step) x global_batch positions in order.
        previous: checkpoint folder of the round before; None for the warm-up.
        work: folder for checkpoints inside the round; may hold those of a killed call.
        checkpoint: where the finished checkpoint becomes visible.
        ingredients: what the checkpoint is made from; its digest is the checkpoint's fingerprint.
    """

    round: int
    first_step: int
    last_step: int
    horizon: int
    global_batch: int
    index: pa.Table
    previous: Path | None
    work: Path
    checkpoint: Path
    ingredients: Mapping[str, Any]

    @property
    def run_folder(self) -> Path:
        """The folder of the run: the one that holds the round's folder."""
        return self.checkpoint.parent.parent

    @property
    def rows_name(self) -> str:
        """Under which name a training notes how many rows it takes at a time, where these are fewer than set.

        The name is another one for other settings.
        """
        return f"rows-{digest(self.ingredients)}"

    @property
    def pieces_name(self) -> str:
        """Under which name a training notes from which step on its micro-batches are taken in pieces."""
        return f"pieces-{digest(self.ingredients)}"

    def describe(self) -> dict[str, Any]:
        """Return the plan as plain values, with a digest of the index's rows and weights."""
        rows = self.index.column("row").to_numpy().astype("<i8")
        weights = self.index.column("weight").to_numpy().astype("<f4")
        return {
            "round": self.round,
            "first_step": self.first_step,
            "last_step": self.last_step,
            "horizon": self.horizon,
            "global_batch": self.global_batch,
            "index": hashlib.blake2b(rows.tobytes() + weights.tobytes(), digest_size=16).hexdigest(),
        }

    def check(self) -> None:
        """Check that the plan fits itself.

        Raises:
            RunError: steps outside the horizon, or a first round with a previous checkpoint (or a later
                one without).
            CorruptError: the index has not exactly one line per training position, in order, or a weight
                is not a finite number >= 0.
        """
        if not 0 <= self.first_step < self.last_step <= self.horizon:
            raise RunError(
                f"Round {self.round} would train steps {self.first_step} to {self.last_step}.",
                f"The run has {self.horizon} steps, and a round trains at least one of them.",
                "Ask for a round within the horizon, or plan the run anew with other *_step settings.",
            )
        if (self.previous is None) != (self.first_step == 0):
            raise RunError(
                f"Round {self.round} starts at step {self.first_step} from "
                f"{self.previous or 'no earlier checkpoint'}.",
                "The first step has nothing before it, and every later one continues a checkpoint.",
                "Run the rounds in order, beginning with the warm-up.",
            )
        self._check_index()

    def _check_index(self) -> None:
        wanted = (self.last_step - self.first_step) * self.global_batch
        positions = self.index.column("position").to_numpy()
        if not np.array_equal(positions, np.arange(wanted)):
            raise CorruptError(
                f"The index of round {self.round} has {len(positions)} positions where steps x global_batch "
                f"= {wanted} were expected, or they are not 0, 1, 2, ...",
                "Training with too few positions would begin a second pass over them unnoticed.",
                "Select the round again with --overwrite.",
            )
        weights = self.index.column("weight").to_numpy()
        if not (np.isfinite(weights).all() and (weights >= 0).all()):
            raise CorruptError(
                f"The index of round {self.round} has weights that are negative or not finite.",
                "They multiply the loss of their rows.",
                "Select the round again with --overwrite.",
            )


@dataclass(frozen=True)
class RoundResult:
    """What came out of a round.

    Attributes:
        steps: optimizer steps trained in it (fewer than planned when it stopped early).
        mean_learning_rate: mean of the rates applied in those steps.
        train_loss: mean of the weighted training loss over those steps, nats per token.
        metrics: of the last evaluation on the target, such as ``eval_loss``; empty without one.
        seconds: wall time of the training, repeated stretches of killed calls not counted.
        stopped_early: early stopping ended the run in this round.
        best: round, step, metric and value of the best evaluation so far; None without one.
        notices: what was said about how this model is trained.
    """

    steps: int
    mean_learning_rate: float
    train_loss: float
    metrics: Mapping[str, float]
    seconds: float
    stopped_early: bool
    best: Mapping[str, Any] | None
    notices: Sequence[str] = ()

    def plain(self) -> dict[str, Any]:
        """Return the result as plain values for the marker."""
        return asdict(self)
