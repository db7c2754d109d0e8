"""The cost model: FLOPs of rows, bytes of tables and of a model in memory. No torch, nothing measured.

For a row of T tokens, R of them predicted, on a model of hidden size d, L layers, n parameters in the linear
layers but the head, V words, p trained parameters (2 FLOPs per multiply-add):

    losses            F = 2 (n + a) T + 4 L d T^2 + 2 d V R      a: the adapter's p, 0 without one
    gradients, LoRA   2 F + 4 p T          backward through the activations costs F, the adapter's own 4 p T
    gradients, full   3 F + 20 p           Adam's update and the projection of a whole gradient: 20 p
    a training row    the same without the 20 p, its logits at every position (R = T)
    a drawn token     2 (n + a) + 2 d V
    an embedding      2 n_e T              for an encoder of n_e parameters

docs/scaling.md holds these against measurements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

ID_BYTES = 16.0
"""A row_id of 32 random hex characters, packed or as zstd leaves it: 4 bits each."""
INDEX_BYTES = 37.0
"""One training position of an index: row_id, row, weight, probability and score."""
ADAM_STATES = 8
"""Bytes per trained parameter of Adam's two moments in float32."""
UPDATE_FLOPS = 20.0
COUNT_BYTES = 1.0
"""A count of tokens or samples (int32): small numbers that repeat, kept as a dictionary."""
NARROW = ("row", "position", "valid", "reason", "group")
"""Columns that take next to nothing on disk: they count up, or hold few different values."""


@dataclass(frozen=True)
class ModelShape:
    """What of a model its costs depend on.

    Attributes:
        parameters: all of them, an adapter included.
        linear: those of linear layers, without head and adapter.
        trained: those that are trained. adapter: those of the adapter; 0 where all weights are trained.
        hidden, layers, vocabulary: d, L and V. weight_bytes: of all parameters as they are loaded.
    """

    parameters: int
    linear: int
    trained: int
    adapter: int
    hidden: int
    layers: int
    vocabulary: int
    weight_bytes: int

    @property
    def gradient_bytes(self) -> int:
        """Bytes of the trained parameters' gradients in training."""
        per_parameter = 4 if self.adapter else self.weight_bytes // max(self.parameters, 1)
        return per_parameter * self.trained

    @property
    def adam_bytes(self) -> int:
        """Bytes of Adam's two moments."""
        return ADAM_STATES * self.trained


@dataclass(frozen=True)
class RowCounts:
    """How much there is of something: sums over the rows that are usable.

    Attributes:
        rows: all of them. valid: those that can be used. tokens, squares: sums of T and of T^2.
        responses: sum of the predicted tokens R. exact: counted, not scaled up from a sample.
    """

    rows: int
    valid: float
    tokens: float
    squares: float
    responses: float
    exact: bool = True

    @classmethod
    def of(cls, table: pa.Table) -> RowCounts:
        """Count prepared rows."""
        kept = table.filter(table.column("valid"))
        lengths = kept.column("n_tokens").to_numpy().astype(np.float64)
        responses = float(kept.column("n_response_tokens").to_numpy().sum())
        squares = float((lengths**2).sum())
        return cls(table.num_rows, kept.num_rows, float(lengths.sum()), squares, responses)

    def scaled(self, rows: int) -> RowCounts:
        """Return the same mix in another number of rows, in all."""
        if rows == self.rows:
            return self
        return replace(self._times(rows / self.rows), rows=rows)

    def drawn(self, positions: int) -> RowCounts:
        """Return what so many usable rows of this mix come to."""
        return replace(self._times(positions / self.valid), rows=positions, valid=positions)

    def _times(self, share: float) -> RowCounts:
        sums = (self.tokens * share, self.squares * share, self.responses * share)
        return RowCounts(round(self.rows * share), self.valid * share, *sums, exact=False)


def loss_flops(model: ModelShape, counts: RowCounts) -> float:
    """Return the FLOPs of a forward pass over rows, logits only where there is a label."""
    return (
        2.0 * (model.linear + model.adapter) * counts.tokens
        + 4.0 * model.layers * model.hidden * counts.squares
        + 2.0 * model.hidden * model.vocabulary * counts.responses
    )


def gradient_flops(model: ModelShape, counts: RowCounts) -> float:
    """Return the FLOPs of per-row gradients: forward, backward, Adam's update and projection."""
    forward = loss_flops(model, counts)
    if model.adapter:
        return 2.0 * forward + 4.0 * model.trained * counts.tokens
    return 3.0 * forward + UPDATE_FLOPS * model.trained * counts.valid


def training_flops(model: ModelShape, counts: RowCounts) -> float:
    """Return the FLOPs of training on rows: forward and backward, logits at every position."""
    everywhere = RowCounts(counts.rows, counts.valid, counts.tokens, counts.squares, counts.tokens)
    forward = loss_flops(model, everywhere)
    if model.adapter:
        return 2.0 * forward + 4.0 * model.trained * counts.tokens
    return 3.0 * forward


def generation_flops(model: ModelShape, tokens: float) -> float:
    """Return the FLOPs of drawing tokens, attention aside."""
    return 2.0 * (model.linear + model.adapter + model.hidden * model.vocabulary) * tokens


def embedding_flops(parameters: int, tokens: float) -> float:
    """Return the FLOPs of embedding texts of so many tokens in all."""
    return 2.0 * parameters * tokens


def row_bytes(schema: pa.Schema | Sequence[pa.Field]) -> float:
    """Return the bytes on disk of one row of a table of numbers, by the widths of its columns.

    Row numbers, flags, reasons and groups are next to nothing after encoding; a row_id takes ID_BYTES.

    Raises:
        ValueError: a column has no width of its own (text, lists of any length).
    """
    return sum(_width(field) for field in schema)


def has_widths(schema: pa.Schema) -> bool:
    """Return whether `row_bytes` knows the width of every column."""
    return not any(_is_open(field) for field in schema)


def _is_open(field: pa.Field) -> bool:
    fixed = pa.types.is_fixed_size_list(field.type) or pa.types.is_primitive(field.type)
    return not (fixed or field.name in ("row_id", *NARROW))


def _width(field: pa.Field) -> float:
    kind = field.type
    if _is_open(field):
        raise ValueError(f"the column {field.name} of type {kind} has no fixed width")
    if field.name in NARROW or field.name == "row_id":
        return ID_BYTES if field.name == "row_id" else 0.0
    if pa.types.is_int32(kind):
        return COUNT_BYTES
    bits = kind.list_size * kind.value_type.bit_width if pa.types.is_fixed_size_list(kind) else kind.bit_width
    return float(bits / 8)
