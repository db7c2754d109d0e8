"""Checks of the memory: what losses, gradients and a training step take, and how large batches become."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pyarrow as pa

from dataflex_pipeline.api import FeatureInput, Need, Silent
from dataflex_pipeline.checkup.findings import Finding
from dataflex_pipeline.features.losses import batch_loss_sums
from dataflex_pipeline.features.plan import make_feature
from dataflex_pipeline.models.batches import Sequences
from dataflex_pipeline.models.room import Room, memory_failure

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from dataflex_pipeline.config.fields import Config

GIB = 1 << 30
LESS_TOKENS = "Lower cutoff_len, or use a machine with more memory."
SIZED = "score_batch_tokens: "
"""How the line begins that says how large batches are."""


def losses_memory(config: Config, model: PreTrainedModel, sequences: Sequences) -> Finding:
    """Measure what losses take, and say how much of it fits.

    Args:
        config: of the run. model: loaded for scoring. sequences: rows that are looked at.
    """
    import torch

    from dataflex_pipeline.models.memory import free_bytes
    from dataflex_pipeline.models.token_losses import token_losses

    said: list[str] = []
    room = Room(config.score_batch_tokens, said.append)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    free = free_bytes(model.device)
    found = f"the model takes {weights / GIB:.2f} GiB"
    found += "" if free is None else f", and {free / GIB:.1f} GiB are free beside it"
    with torch.inference_mode(), token_losses(model) as losses:
        failure = memory_failure(
            lambda: room.settle(sequences, partial(batch_loss_sums, losses), model.device)
        )
    if failure is not None:
        return Finding("model memory", "problem", f"{found}; {failure}", LESS_TOKENS, "configuration")
    return Finding("model memory", "ok", "; ".join([found, *said]), "", "configuration")


def gradients_memory(config: Config, rows: pa.Table) -> Iterator[Finding]:
    """Yield what gradients of rows take, plain ones of the model as it is given; nothing where it is set.

    Args:
        config: of the run. rows: a few prepared rows.

    Raises:
        UserError: the model cannot be loaded for gradients.
    """
    if config.score_batch_tokens != "auto":
        return
    listener = _Listener()
    feature = make_feature(Need("gradients"), config)
    with tempfile.TemporaryDirectory(prefix="dataflex-doctor-") as folder:
        # The rows are given to the function itself, which reads no table.
        given = FeatureInput(cast(Any, None), "doctor", None, None, {}, Path(folder))
        with feature.open(given, listener) as compute:
            failure = memory_failure(lambda: compute(rows))
    sized = [line for line in listener.lines if line.startswith(SIZED)]
    if failure is not None:
        yield Finding("gradient memory", "problem", failure, LESS_TOKENS, "configuration")
    elif sized:
        yield Finding("gradient memory", "ok", sized[-1], "", "configuration")


def training_memory(config: Config, rows: pa.Table, global_batch: int) -> Iterator[Finding]:
    """Yield what a training step takes with the longest of some rows, and how its rows are divided.

    Args:
        config: of the run. rows: prepared rows. global_batch: rows per optimizer step.

    Raises:
        UserError: a row alone does not fit, or the model cannot be trained.
    """
    from dataflex_pipeline.training.foreseen import foreseen_step

    step = foreseen_step(config, rows, global_batch)
    if step is None:
        found = "trainings by DeepSpeed are as they are set; what their steps take is not foreseen"
        yield Finding("training memory", "ok", found, "", "configuration")
    else:
        yield Finding("training memory", "ok", str(step), "", "configuration")


class _Listener(Silent):
    """Keeps what was said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        """Keep a line."""
        self.lines.append(line)
