"""The responses of rows as sequences of their own, each behind the beginning of the chat template.

A row of several answers has a sequence for each run of labelled tokens. The same tokens are predicted as in
the whole row: where its first token carries a label, which nothing stands before, it is left out here too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from dataflex_pipeline.models.batches import Sequences
from dataflex_pipeline.schemas import IGNORED

TOO_LONG = "a response by itself is longer than the model's table of positions"


@dataclass(frozen=True)
class Responses:
    """Responses by themselves.

    Attributes:
        sequences: the beginning, which carries no labels, and a response, which does. [responses]
        owners: the row of each, rising. [responses]
    """

    sequences: Sequences
    owners: np.ndarray


def responses_alone(rows: Sequences, beginning: Sequence[int]) -> Responses:
    """Cut the responses out of rows.

    Args:
        rows: whole. beginning: token ids that stand before each response, at least one.
    """
    labels = rows.labels.astype(np.int64)
    labels[rows.starts[:-1][rows.lengths > 0]] = IGNORED
    owner = np.repeat(np.arange(len(rows.lengths)), rows.lengths)  # [total]
    learnt = labels != IGNORED
    follows = np.zeros(len(labels), dtype=bool)  # whether a token goes on with the response before it
    follows[1:] = learnt[1:] & learnt[:-1] & (owner[1:] == owner[:-1])
    firsts = np.flatnonzero(learnt & ~follows)
    kept = labels[learnt]
    number = np.cumsum(learnt & ~follows)[learnt] - 1  # [kept] which response a token belongs to
    sizes = np.bincount(number, minlength=len(firsts)).astype(np.int64)
    starts = np.concatenate([[0], np.cumsum(sizes + len(beginning))])
    is_label = np.ones(starts[-1], dtype=bool)
    places = starts[:-1, None] + np.arange(len(beginning))  # [responses, beginning]
    is_label[places] = False
    ids, own = np.empty(starts[-1], dtype=np.int64), np.full(starts[-1], IGNORED, dtype=np.int64)
    ids[places] = np.asarray(beginning)
    ids[is_label] = own[is_label] = kept
    return Responses(Sequences(ids, own, starts), owner[firsts])


def mean_losses_alone(
    rows: Sequences, beginning: Sequence[int], mean_losses: Callable[[Sequences], np.ndarray]
) -> np.ndarray:
    """Return the mean loss of every row's response tokens by themselves, in nats. [rows] float64

    Args:
        rows: whole. beginning: token ids that stand before each response.
        mean_losses: from sequences to their mean losses. [sequences] float64

    Returns:
        The mean over all response tokens of a row, whichever of its answers they are in; NaN without any.
    """
    alone = responses_alone(rows, beginning)
    counts, n_rows = alone.sequences.n_labels(), len(rows.lengths)
    sums = np.bincount(alone.owners, weights=mean_losses(alone.sequences) * counts, minlength=n_rows)
    totals = np.bincount(alone.owners, weights=counts, minlength=n_rows)
    with np.errstate(invalid="ignore"):
        return np.where(totals > 0, sums / totals, np.nan)


def without_too_long(rows: pa.Table, beginning: Sequence[int], limit: int | None) -> pa.Table:
    """Set the rows aside that have a response which is longer, behind the beginning, than a model takes.

    Args:
        rows: with ids, labels and validity. beginning: token ids before each response.
        limit: tokens; None: there is none.
    """
    if limit is None:
        return rows
    valid = np.flatnonzero(rows.column("valid").to_numpy(zero_copy_only=False))
    alone = responses_alone(Sequences.of(rows.take(pa.array(valid))), beginning)
    long = valid[np.unique(alone.owners[alone.sequences.lengths > limit])]
    return set_aside(rows, dict.fromkeys(long.tolist(), TOO_LONG))


def set_aside(rows: pa.Table, reasons: Mapping[int, str]) -> pa.Table:
    """Return rows of which some are not valid any more.

    Args:
        rows: with valid and reason. reasons: why, by place among the rows.
    """
    valid = rows.column("valid").to_numpy(zero_copy_only=False).copy()
    valid[list(reasons)] = False
    reason = [reasons.get(place, given) for place, given in enumerate(rows.column("reason").to_pylist())]
    for name, values in (("valid", pa.array(valid)), ("reason", pa.array(reason, pa.string()))):
        rows = rows.set_column(rows.schema.get_field_index(name), name, values)
    return rows


def losses_of_valid(rows: pa.Table, losses_of: Callable[[Sequences], np.ndarray]) -> dict[str, np.ndarray]:
    """Return the columns of losses, NaN where rows are not valid.

    Args:
        rows: with ids, labels and validity. losses_of: from rows to their losses. [rows] float64

    Returns:
        loss, in nats per token, and n_tokens, the response tokens that it is the mean over. [rows] each.
    """
    valid = rows.column("valid").to_numpy(zero_copy_only=False)
    loss, n_tokens = np.full(len(valid), np.nan), np.zeros(len(valid), dtype=np.int32)
    if valid.any():
        kept = Sequences.of(rows.filter(pa.array(valid)))
        loss[valid], n_tokens[valid] = losses_of(kept), kept.n_labels()
    return {"loss": loss, "n_tokens": n_tokens}
