"""The Parquet schemas: every column with its unit and meaning as field metadata."""

from __future__ import annotations

from collections.abc import Iterable

import pyarrow as pa

IGNORED = -100
"""Label of a token that carries no loss."""

SCHEMA_VERSION = "1"

ORIGINAL = "original_"
"""How the columns of the user's own data are called in a prepared data set: this, then their own name."""


def own_names(names: Iterable[str]) -> list[str]:
    """Return what the columns of the user's own data among these are called there."""
    return [name.removeprefix(ORIGINAL) for name in names if name.startswith(ORIGINAL)]


def column(name: str, kind: pa.DataType, meaning: str, *, nullable: bool = True) -> pa.Field:
    """Return a field that carries its meaning (and unit) as metadata."""
    return pa.field(name, kind, nullable=nullable, metadata={"description": meaning})


ROW = column("row", pa.int64(), "position of the row in the prepared pool, from 0", nullable=False)
ROW_ID = column("row_id", pa.string(), "content hash of the row (hex)", nullable=False)
VALID = column("valid", pa.bool_(), "whether the row can be used here", nullable=False)
REASON = column("reason", pa.string(), "why the row is not valid; null where it is")

NOTE = column(
    "note",
    pa.string(),
    "what of this row was read otherwise than it is written, or passed over; null for nothing",
)

MESSAGE = pa.struct(
    [
        column("role", pa.string(), "system, user, assistant, tool"),
        column("content", pa.string(), "text of the message"),
    ]
)

PREPARED = pa.schema(
    [
        ROW,
        ROW_ID,
        column("source", pa.string(), "name of the data set that the row came from", nullable=False),
        column("messages", pa.list_(MESSAGE), "the conversation", nullable=False),
        column("input_ids", pa.list_(pa.int32()), "token ids after the chat template and truncation"),
        column(
            "labels", pa.list_(pa.int32()), "token ids that carry loss, -100 elsewhere; length of input_ids"
        ),
        column(
            "n_tokens",
            pa.int32(),
            "all tokens of the row, prompt and response: those in input_ids",
            nullable=False,
        ),
        column("n_response_tokens", pa.int32(), "tokens that carry loss", nullable=False),
        VALID,
        REASON,
        NOTE,
    ]
)
"""Columns of every prepared data set; then come `PLACE`, of a target ``group``, and ``original_*``."""

PLACE = pa.schema(
    [
        column("file", pa.string(), "name of the row's file within its data set; null for one of the hub"),
        column(
            "line",
            pa.int64(),
            "place in that file, from 1: the line of text, of a JSON array the element, else the row",
        ),
    ]
)
"""Where a row was read; tables of earlier versions have not these columns, and are used as they are."""

GROUP = column("group", pa.string(), "target group that the row belongs to", nullable=False)

SCORES = pa.schema(
    [
        ROW,
        ROW_ID,
        column("score", pa.float64(), "the method's score, higher is better; null where not valid"),
        VALID,
        REASON,
    ]
)
"""First columns of every score table; the method's own columns follow."""

PROBABILITIES = pa.schema(
    [
        ROW,
        ROW_ID,
        column(
            "probability", pa.float64(), "sampling probability; sums to 1 over valid rows", nullable=False
        ),
    ]
)

SELECTION = pa.schema(
    [
        column("rank", pa.int64(), "place in the selection, from 1, first selected first", nullable=False),
        ROW,
        ROW_ID,
        column("source", pa.string(), "name of the data set that the row came from"),
        column("score", pa.float64(), "score of the row, higher is better; null where it has none"),
        column("probability", pa.float64(), "probability that the row was drawn with", nullable=False),
        column("weight", pa.float32(), "loss weight of the row; mean 1 over the selection", nullable=False),
    ]
)
"""The rows that were chosen, one line each; a row drawn several times has as many lines."""

PASSED_OVER = pa.schema(
    [
        ROW,
        ROW_ID,
        column("source", pa.string(), "name of the data set that the row came from"),
        column("score", pa.float64(), "score of the row, higher is better; null where it has none"),
        column("like_row", pa.int64(), "selected row that it resembles most; null without an embedding"),
        column("like_row_id", pa.string(), "content hash of that row (hex)"),
        column("similarity", pa.float64(), "cosine of the two embeddings, above max_similarity"),
    ]
)
"""Rows that a selection with ``max_similarity`` passed over, in the order in which they were looked at."""

INDEX = pa.schema(
    [
        column("position", pa.int64(), "training position within the round, from 0", nullable=False),
        ROW,
        ROW_ID,
        column("weight", pa.float32(), "loss weight of this position; mean 1 over the round", nullable=False),
        column("probability", pa.float64(), "probability that the row was drawn with", nullable=False),
        column("score", pa.float64(), "score of the row; null for the warm-up"),
    ]
)

LOSSES = pa.schema(
    [
        ROW,
        ROW_ID,
        column("loss", pa.float64(), "mean negative log-likelihood of the response, nats per token"),
        column(
            "n_tokens",
            pa.int32(),
            "response tokens that the mean is over: n_response_tokens of the prepared row, not its n_tokens",
            nullable=False,
        ),
        VALID,
        REASON,
    ]
)
