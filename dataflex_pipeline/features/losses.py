"""The losses of rows: mean negative log-likelihood of the response tokens, in nats per token.

    l_i = (1 / T_i) sum over t with labels_t != -100, t >= 1, of -log p(labels_t | tokens before t)

T_i counts those tokens. Rows are batched by length under a budget of padded tokens (models/batches.py), and
logits are made only where there is a label (models/token_losses.py). Log-probabilities are taken in float32,
sums in float64; dropout is off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from dataflex_pipeline.api import Feature, FeatureInput, Progress
from dataflex_pipeline.models.batches import Sequences, batch_on
from dataflex_pipeline.models.room import Room
from dataflex_pipeline.models.source import number_ingredients
from dataflex_pipeline.models.weights import row_flops
from dataflex_pipeline.schemas import LOSSES

if TYPE_CHECKING:
    from dataflex_pipeline.models.token_losses import TokenLosses


def batch_loss_sums(losses: TokenLosses, sequences: Sequences, rows: np.ndarray) -> np.ndarray:
    """Return the summed negative log-likelihood (nats) of each row of one batch. [B] float64"""
    from dataflex_pipeline.models.token_losses import predicting

    ids, labels, attention = batch_on(losses.model, sequences, rows)
    predicts = predicting(labels, attention)
    if not bool(predicts.any()):
        return np.zeros(len(rows))
    nll = losses(ids, labels, attention, predicts)  # [W]
    owner = predicts.nonzero()[:, 0].cpu().numpy()  # [W] row inside the batch
    return np.bincount(owner, weights=nll.cpu().double().numpy(), minlength=len(rows))


def mean_losses(losses: TokenLosses, sequences: Sequences, max_tokens: int | Room) -> np.ndarray:
    """Return every row's mean loss in nats per response token; NaN where it has none. [rows] float64

    Args:
        losses: of the model (`token_losses`). sequences: the rows. max_tokens: padded tokens per batch.
    """
    n_labels = sequences.n_labels()
    sums = np.zeros(len(n_labels))

    def work(rows: np.ndarray) -> None:
        sums[rows] = batch_loss_sums(losses, sequences, rows)

    room = Room.of(max_tokens)
    room.settle(sequences, partial(batch_loss_sums, losses), losses.model.device)
    room.each_batch(sequences.lengths, n_labels, losses.max_labels, work)
    with np.errstate(invalid="ignore"):
        return np.where(n_labels > 0, sums / n_labels, np.nan)


class Losses(Feature):
    """Mean response loss of every row at one checkpoint."""

    version = 2
    schema = LOSSES
    input_columns = ("row", "row_id", "input_ids", "labels", "valid", "reason")

    def ingredients(self) -> dict[str, Any]:
        """Return the precision and attention kernel, which move the last digits."""
        return number_ingredients(self.config)

    def row_flops(self, tokens: float) -> float:
        """Return those of a forward pass."""
        return row_flops(self.config, tokens, passes=1)

    @contextmanager
    def open(self, given: FeatureInput, progress: Progress) -> Iterator[Callable[[pa.Table], pa.Table]]:
        """Load base and adapter once; yield the function from rows to losses."""
        import torch

        from dataflex_pipeline.models.base import load_for_scoring, resolve_device
        from dataflex_pipeline.models.token_losses import token_losses

        device = resolve_device(self.config.device)
        model = load_for_scoring(self.config, given.checkpoint, device)
        room = Room(
            self.config.score_batch_tokens, progress.say, folder=given.folder, advance=progress.advance
        )
        with torch.inference_mode(), token_losses(model, progress.say) as losses:

            def compute(rows: pa.Table) -> pa.Table:
                return loss_table(losses, rows, room)

            yield compute


def loss_table(losses: TokenLosses, rows: pa.Table, max_tokens: int | Room) -> pa.Table:
    """Return the losses of one part; rows that are not valid keep their reason and have no loss."""
    valid = rows.column("valid").to_numpy(zero_copy_only=False)
    kept = Sequences.of(rows.filter(pa.array(valid)))
    loss = np.full(rows.num_rows, np.nan)
    n_tokens = np.zeros(rows.num_rows, dtype=np.int32)
    if valid.any():
        loss[valid] = mean_losses(losses, kept, max_tokens)
        n_tokens[valid] = kept.n_labels()
    finite = np.isfinite(loss)
    reason = rows.column("reason").to_pylist()
    for position in np.flatnonzero(valid & ~finite):
        reason[position] = "the loss is not finite"
    return pa.table(
        {
            "row": rows.column("row"),
            "row_id": rows.column("row_id"),
            "loss": pa.array(loss, mask=~finite),
            "n_tokens": pa.array(n_tokens),
            "valid": pa.array(finite),
            "reason": pa.array(reason, pa.string()),
        },
        schema=LOSSES,
    )
