"""The influence of rows, exactly: each row's update against the directions of the target.

For a row's mean response loss l and the trainable parameters theta of a checkpoint:

    adam: u = Gamma(grad l), the update that Adam would make from that row        sgd: u = grad l

and what is kept are <u, D> for every direction D of the target_directions feature, and |u|: a row's mean of
cosines with a target group is <u, D_g> / |u|. Gradients are taken in one batched backward pass, and never
held for more than one parameter at a time; nothing of their size, or of a projection's, is written.

Source: Xia et al., LESS: Selecting Influential Data for Targeted Instruction Tuning (2024), section 4.2-4.3,
its mean of cosines written as one inner product, which needs no projection.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pyarrow as pa

from dataflex_pipeline import api
from dataflex_pipeline.features.capturing import (
    COLUMNS,
    NOT_FINITE,
    Loaded,
    check_moments,
    load,
    number_ingredients,
)
from dataflex_pipeline.features.params import DirectionParams, GradientParams, InfluenceParams, UpdateParams
from dataflex_pipeline.gradients.similarity import DIRECTIONS
from dataflex_pipeline.models.batches import Sequences, batch_on
from dataflex_pipeline.models.room import Room
from dataflex_pipeline.models.weights import row_flops
from dataflex_pipeline.schemas import REASON, ROW, ROW_ID, VALID, column

if TYPE_CHECKING:
    from torch import Tensor

    from dataflex_pipeline.gradients.capture import GradientCapture
    from dataflex_pipeline.gradients.directions import Directions
    from dataflex_pipeline.gradients.influence import Influences

DOTS = "dots"
Computed = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Losses [rows], inner products with all targets' directions [rows, G], norms [rows]."""


class Influence(api.Feature):
    """Inner products of every row's update with the target's directions, at one checkpoint."""

    of_trained_weights = True
    input_columns = COLUMNS

    class Params(InfluenceParams):
        """Parameters of influence."""

        @classmethod
        def of_pool(cls, params: GradientParams, directions: DirectionParams) -> Self:
            """Return the pool's side; equal ones are computed once, whatever method asks."""
            update = params.part(UpdateParams) if params.gradient_type == "adam" else {}
            return cls(**update, side=params.gradient_type, directions=directions)

    params: Params

    def __init__(self, params: Any, config: Any) -> None:
        super().__init__(params, config)
        meaning = "inner product with each direction of the target, in the order of their labels"
        self.schema = pa.schema(
            [
                ROW,
                ROW_ID,
                *(column(name, pa.list_(pa.float64()), meaning) for name in self.columns_of_targets),
                column("norm", pa.float64(), "length of the update (sgd: of the gradient)"),
                column("loss", pa.float64(), "mean response loss, nats per token"),
                VALID,
                REASON,
            ]
        )

    @property
    def columns_of_targets(self) -> list[str]:
        """The columns of inner products: ``dots``, and one for each further target."""
        return [DOTS, *(f"{DOTS}_{number}" for number in range(1, 1 + len(self.params.more)))]

    def needs(self, need: api.Need) -> Mapping[str, api.Need]:
        """Ask for the target's directions at the same checkpoint."""
        asked = zip(self.columns_of_targets, (self.params.directions, *self.params.more), strict=True)
        return {
            name.replace(DOTS, "directions"): replace(
                need, feature="target_directions", kind=None, split="target", params=params
            )
            for name, params in asked
        }

    def check(self, need: api.Need, n_rows: int | None) -> None:
        """Refuse Adam's update of the model as it is given.

        Raises:
            ConfigError: no warm-up makes the optimizer's moments.
        """
        check_moments(self.params.side, need, self.config)

    def ingredients(self) -> dict[str, Any]:
        """Return the precision and attention kernel, which move the last digits."""
        return number_ingredients(self.config)

    def row_flops(self, tokens: float) -> float:
        """Return those of a forward and a backward pass."""
        return row_flops(self.config, tokens, passes=3)

    @contextmanager
    def open(
        self, given: api.FeatureInput, progress: api.Progress
    ) -> Iterator[Callable[[pa.Table], pa.Table]]:
        """Load model, Adam states and directions once; yield the function from rows to influence."""
        from dataflex_pipeline.gradients.influence import Influences

        loaded = load(given, self.config, progress)
        targets = self._directions(loaded)
        updates = loaded.adam_updates(self.params.side, self.params.adam_update)
        consumer = Influences([directions.tensors for directions in targets], updates)
        with loaded.capturing(consumer) as (capture, room):

            def compute(rows: pa.Table) -> pa.Table:
                computed = self._compute(loaded.model, capture, consumer, room, rows)
                return self._table(rows, computed, consumer.counts)

            yield compute

    def unit_update(self, loaded: Loaded, rows: pa.Table) -> dict[str, Tensor]:
        """Return the update of one row, scaled to length 1 (0 where it is 0). [numel] each

        Args:
            loaded: the model. rows: the row.
        """

        from dataflex_pipeline.gradients.directions import RowGradients

        updates = loaded.adam_updates(self.params.side, self.params.adam_update)
        consumer = RowGradients(loaded.trainable, 1, loaded.device)
        with loaded.capturing(consumer) as (capture, _):
            consumer.expect([0], [1.0])
            capture.run(*batch_on(loaded.model, Sequences.of(rows), np.array([0])))
        if updates is not None:
            for name, update in updates.items():
                update.apply_(consumer.sums[name])
        norm = float(consumer.norms(1))
        return {name: sums[0] / norm if norm > 0 else sums[0] for name, sums in consumer.sums.items()}

    def _directions(self, loaded: Loaded) -> list[Directions]:
        from dataflex_pipeline.gradients.directions import check_room, file_bytes, read_directions

        tables = list(loaded.given.tables.values())  # in the order of needs
        size = sum(file_bytes(table.folder / DIRECTIONS) for table in tables)
        moments = 2 if self.params.side == "adam" else 0
        check_room(size, loaded.trainable, moments, loaded.device, self.params.directions.per)
        return [
            read_directions(table.folder / DIRECTIONS, table.fingerprint, loaded.trainable, loaded.device)
            for table in tables
        ]

    def _compute(
        self, model: Any, capture: GradientCapture, consumer: Influences, room: Room, rows: pa.Table
    ) -> Computed:
        import torch

        from dataflex_pipeline.gradients.influence import influence_batch

        sequences = Sequences.of(rows.filter(rows.column("valid")))
        n_labels = sequences.n_labels()
        count = len(n_labels)
        losses, squares = np.full(count, np.nan), np.zeros(count)
        dots = np.zeros((count, consumer.n_directions))

        def run(some: Sequences, batch: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            return influence_batch(capture, consumer, *batch_on(model, some, batch))

        def work(batch: np.ndarray) -> None:
            found = run(sequences, batch)
            losses[batch], dots[batch], squares[batch] = (each.cpu().double().numpy() for each in found)

        if count:
            room.settle(sequences, run, model.device)
            room.each_batch(sequences.lengths, n_labels, capture.max_labels, work)
        return losses, dots, np.sqrt(squares)

    def _table(self, rows: pa.Table, computed: Computed, counts: list[int]) -> pa.Table:
        valid = rows.column("valid").to_numpy(zero_copy_only=False)
        losses, dots, norms = computed
        finite = np.isfinite(losses) & np.isfinite(norms) & np.isfinite(dots).all(axis=1)  # [valid]
        columns = {name: np.full(len(valid), np.nan) for name in ("norm", "loss")}
        columns["norm"][valid] = np.where(finite, norms, np.nan)
        columns["loss"][valid] = losses
        pieces = np.split(dots, np.cumsum(counts)[:-1], axis=1)  # [valid, G] of each target
        for name, piece in zip(self.columns_of_targets, pieces, strict=True):
            columns[name] = np.empty(len(valid), dtype=object)
            for place, row in zip(np.flatnonzero(valid), piece, strict=True):
                columns[name][place] = row
        return self.table(rows, columns, NOT_FINITE)
