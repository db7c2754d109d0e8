"""Rows of different lengths as padded batches, and logits only where there is a label.

Rows are batched by length under a budget of padded tokens. Logits are made only at chosen positions: a hook
on the output embedding keeps just those hidden states, so whatever a model does to its logits afterwards
(scaling, soft-capping) still happens.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from dataflex_pipeline.schemas import IGNORED

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

LOGIT_ELEMENTS = 1 << 28
"""Logits per batch at most (1 GiB in float32), for large vocabularies."""


@dataclass(frozen=True)
class Sequences:
    """Token sequences of different lengths, end to end.

    Attributes:
        ids, labels: all tokens of all rows. [total]
        starts: where each row begins, then total. [rows + 1]
    """

    ids: np.ndarray
    labels: np.ndarray
    starts: np.ndarray

    @classmethod
    def of(cls, rows: pa.Table) -> Sequences:
        """Take ``input_ids`` and ``labels`` of prepared rows."""
        ids = rows.column("input_ids").combine_chunks()
        labels = rows.column("labels").combine_chunks()
        starts = ids.offsets.to_numpy()
        first, last = starts[0], starts[-1]
        own = labels.offsets.to_numpy()
        return cls(
            ids.values.to_numpy()[first:last], labels.values.to_numpy()[own[0] : own[-1]], starts - first
        )

    @property
    def lengths(self) -> np.ndarray:
        """Tokens per row. [rows]"""
        return np.diff(self.starts)

    def n_labels(self) -> np.ndarray:
        """Return the predicted tokens per row: labels at positions 1 and later. [rows]"""
        counted = (self.labels != IGNORED).astype(np.int64)
        nonempty = self.starts[:-1][self.lengths > 0]
        counted[nonempty] = 0  # position 0 has nothing before it to be predicted from
        total = np.concatenate([[0], np.cumsum(counted)])
        per_row: np.ndarray = total[self.starts[1:]] - total[self.starts[:-1]]
        return per_row


def length_batches(
    lengths: np.ndarray, n_labels: np.ndarray, max_tokens: int, max_labels: int
) -> list[np.ndarray]:
    """Group rows of similar length so that no batch exceeds the budgets; a row over them stands alone.

    Args:
        lengths: tokens per row. [rows] n_labels: predicted tokens per row. [rows]
        max_tokens: padded tokens per batch. max_labels: predicted tokens per batch.

    Returns:
        Row numbers per batch, longest rows first.
    """
    order = np.argsort(-lengths, kind="stable")
    batches: list[np.ndarray] = []
    begin, labels = 0, 0
    for position, row in enumerate(order):
        widest = int(lengths[order[begin]])
        too_wide = widest * (position - begin + 1) > max_tokens
        too_many = labels + int(n_labels[row]) > max_labels
        if position > begin and (too_wide or too_many):
            batches.append(order[begin:position])
            begin, labels = position, 0
        labels += int(n_labels[row])
    batches.append(order[begin:])
    return batches


def label_budget(model: PreTrainedModel) -> int:
    """Return how many predicted tokens a batch may have, so that its logits stay within LOGIT_ELEMENTS."""
    return max(1, LOGIT_ELEMENTS // int(model.config.get_text_config().vocab_size))


@contextmanager
def logits_only_at(model: PreTrainedModel) -> Iterator[Callable[[torch.Tensor], None]]:
    """Make the model's logits only at chosen positions while the context lasts.

    Yields:
        A function that takes the boolean mask [B, T] of wanted positions for the next forward call. The
        logits of that call have the shape [1, wanted, V], in row-major order of the mask.
    """
    wanted: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = args[0]  # [B, T, H]
        return (hidden[wanted[0]].unsqueeze(0), *args[1:])  # [1, wanted, H]

    def choose(mask: torch.Tensor) -> None:
        wanted[:] = [mask]

    handle = model.get_output_embeddings().register_forward_pre_hook(keep)
    try:
        yield choose
    finally:
        handle.remove()


def batch_on(
    model: PreTrainedModel, sequences: Sequences, rows: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return rows padded on the right, on the model's device: ids, labels, attention mask. [B, T] each

    On an accelerator T is rounded up (`round_length`): its kernels work in tiles, and its allocator keeps
    memory by size. On a CPU padding is work, and there is none beyond the longest row.
    """
    import torch

    longest = int(sequences.lengths[rows].max(initial=1))
    if model.device.type != "cpu":
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        longest = max(longest, min(round_length(longest), limit or sys.maxsize))
    ids, labels, attention = (
        torch.from_numpy(array).to(model.device) for array in padded(sequences, rows, longest)
    )
    return ids, labels, attention


def round_length(tokens: int) -> int:
    """Return a length rounded up to a multiple of 64, or of 32, 16, 8, so that an eighth is added at most."""
    multiple = 64
    while multiple > 1 and multiple * 8 > tokens:
        multiple //= 2
    return -(-tokens // multiple) * multiple


def padded(
    sequences: Sequences, rows: np.ndarray, length: int = 1
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pad rows on the right to a common length.

    A row is filled up with its own last token: the padding token is embedded as zeros in many models,
    and where a norm divides by the size of that (Gemma 3n), gradients are no numbers.

    Args:
        sequences, rows: the rows. length: tokens per row at least.

    Returns:
        ids, labels (padding -100) and the attention mask, int64. [B, T] each.
    """
    lengths = sequences.lengths[rows]
    filled = np.arange(lengths.max(initial=length)) < lengths[:, None]
    labels = np.full(filled.shape, IGNORED, dtype=np.int64)
    spans = [slice(sequences.starts[row], sequences.starts[row + 1]) for row in rows]
    last = [sequences.ids[span.stop - 1] if span.stop > span.start else 0 for span in spans]
    ids = np.repeat(np.asarray(last, dtype=np.int64)[:, None], filled.shape[1], axis=1)
    ids[filled] = np.concatenate([sequences.ids[span] for span in spans])
    labels[filled] = np.concatenate([sequences.labels[span] for span in spans])
    return ids, labels, filled.astype(np.int64)
