"""A check of batching: the losses of eight rows together and one by one, on the model itself."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from dataflex_pipeline.checkup.findings import Finding
from dataflex_pipeline.checkup.memory import losses_memory
from dataflex_pipeline.features.losses import batch_loss_sums
from dataflex_pipeline.models.base import load_for_scoring, precision, resolve_device
from dataflex_pipeline.models.batches import Sequences

if TYPE_CHECKING:
    from dataflex_pipeline.config.fields import Config

ROWS = 8
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}
"""Largest difference of two mean losses, relative to 1 + loss: rounding, and nothing else."""


def check_model(config: Config, rows: pa.Table) -> Iterator[Finding]:
    """Yield whether the model gives sound losses, the same alone and in a batch.

    Args:
        config: names the model; demo stands for no model here. rows: prepared rows.

    Raises:
        UserError: the model cannot be loaded.
    """
    import torch

    from dataflex_pipeline.models.token_losses import token_losses

    device = resolve_device(config.device)
    model = load_for_scoring(config, None, device)
    chosen = different_lengths(rows)
    sequences = Sequences.of(chosen)
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    largest = int(sequences.ids.max())
    if largest >= vocabulary:
        found = f"token {largest} occurs, and the model knows {vocabulary}"
        yield Finding("vocabulary", "problem", found, "Use the model's own tokenizer.", "configuration")
        return
    yield Finding(
        "vocabulary", "ok", f"{vocabulary:,} tokens, the largest here is {largest:,}", "", "configuration"
    )
    yield losses_memory(config, model, sequences)
    everyone = np.arange(chosen.num_rows)
    counts = sequences.n_labels()
    with torch.inference_mode(), token_losses(model) as losses:
        together = batch_loss_sums(losses, sequences, everyone) / counts
        alone = [batch_loss_sums(losses, sequences, everyone[i : i + 1])[0] for i in everyone] / counts
    yield _losses(alone, vocabulary)
    yield _difference(together, alone, precision(config, device).dtype)


def different_lengths(rows: pa.Table) -> pa.Table:
    """Return eight usable rows from the shortest to the longest, so that a batch needs padding."""
    valid = rows.filter(rows.column("valid")).sort_by("n_tokens")
    places = np.unique(np.linspace(0, valid.num_rows - 1, ROWS).astype(int))
    return valid.take(pa.array(places))


def _losses(losses: np.ndarray, vocabulary: int) -> Finding:
    finite = np.isfinite(losses)
    found = f"mean loss {losses[finite].mean():.3f} nats per token" if finite.any() else "none is finite"
    if not finite.all():
        advice = "Use sound weights; for a model that was trained in bfloat16 set bf16: true."
        text = f"{(~finite).sum()} of {len(losses)} losses are not finite; {found}"
        return Finding("losses", "problem", text, advice, "configuration")
    if losses.mean() > math.log(vocabulary):
        advice = "Check that tokenizer, template and model belong together (a fresh model is like this, too)."
        text = f"{found}, worse than guessing ({math.log(vocabulary):.2f})"
        return Finding("losses", "warning", text, advice, "configuration")
    return Finding("losses", "ok", found, "", "configuration")


def _difference(together: np.ndarray, alone: np.ndarray, dtype: str) -> Finding:
    differing = float(np.max(np.abs(together - alone) / (1 + np.abs(alone)), initial=0.0))
    found = f"a batch of {len(alone)} and {len(alone)} of one row differ by {differing:.1g} (relative)"
    if differing <= TOLERANCE[dtype]:
        return Finding("batching", "ok", found, "", "configuration")
    advice = "The model's attention mask is not respected: try attn_implementation=eager, or another model."
    return Finding("batching", "problem", found, advice, "configuration")
