"""The gradients of rows, projected: each row's own gradient, Adam-preconditioned if asked, in K dimensions.

For a row's mean response loss l and the trainable parameters theta of a checkpoint:

    adam (the pool's side of LESS): u = Gamma(grad l), the update that Adam would make from that row
    sgd  (the target's side):       u = grad l

and what is kept is the direction of its random projection, (P u) / |P u|, with |u| and |P u| beside it, so
that a cosine is one dot product. Gradients are taken in one batched backward pass, layer by layer, and never
held for more than one parameter at a time.

Source: Xia et al., LESS: Selecting Influential Data for Targeted Instruction Tuning (2024), sections 4.1-4.2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
import pyarrow as pa
from pydantic import Field

from dataflex_pipeline import api
from dataflex_pipeline.features.capturing import COLUMNS, NOT_FINITE, check_moments, load, number_ingredients
from dataflex_pipeline.features.params import GradientParams, ProjectionParams, SketchParams, UpdateParams
from dataflex_pipeline.models.batches import Sequences, batch_on
from dataflex_pipeline.models.room import Room
from dataflex_pipeline.models.weights import row_flops
from dataflex_pipeline.schemas import GROUP, REASON, ROW, ROW_ID, VALID, column

if TYPE_CHECKING:
    import torch

    from dataflex_pipeline.gradients.capture import GradientCapture
    from dataflex_pipeline.gradients.stream import ProjectedGradients

Computed = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Losses [rows], projected gradients [rows, K], squared norms before projection [rows]."""


class Gradients(api.Feature):
    """Projected per-row gradients at one checkpoint."""

    version = 2
    of_trained_weights = True
    input_columns = COLUMNS

    class Params(SketchParams, UpdateParams):
        """Parameters of gradients."""

        side: Literal["adam", "sgd"] = Field(
            "sgd", description="Adam's update of the gradient, or the gradient"
        )

        @classmethod
        def of_pool(cls, params: GradientParams, seed: int) -> Self:
            """Return the pool's side; equal ones are computed once, whatever method asks."""
            update = params.part(UpdateParams) if params.gradient_type == "adam" else {}
            return cls(**params.part(ProjectionParams), **update, seed=seed, side=params.gradient_type)

        @classmethod
        def of_target(cls, params: GradientParams, seed: int) -> Self:
            """Return the target's side: plain gradients under the same projection."""
            return cls(**params.part(ProjectionParams), seed=seed, side="sgd")

    params: Params

    DTYPES: ClassVar[dict[str, pa.DataType]] = {"float16": pa.float16(), "float32": pa.float32()}

    def __init__(self, params: Any, config: Any) -> None:
        super().__init__(params, config)
        vector = pa.list_(self.DTYPES[params.dtype], params.proj_dim)
        self.schema = pa.schema(
            [
                ROW,
                ROW_ID,
                column(
                    "gradient", vector, "projected gradient, scaled to length 1 (0 where the gradient is 0)"
                ),
                column("projected_norm", pa.float32(), "length after projection, before scaling"),
                column("norm", pa.float64(), "length before projection"),
                column("loss", pa.float64(), "mean response loss, nats per token"),
                column("group", pa.string(), GROUP.metadata[b"description"].decode() + "; null in the pool"),
                VALID,
                REASON,
            ]
        )

    def check(self, need: api.Need, n_rows: int | None) -> None:
        """Refuse Adam's update of the model as it is given, and a projection that this machine cannot make.

        Raises:
            ConfigError: no warm-up makes the optimizer's moments; trak without its packages or a GPU.
        """
        check_moments(self.params.side, need, self.config)
        if self.params.projection == "trak":
            from dataflex_pipeline.gradients.projection import make_projection
            from dataflex_pipeline.models.base import resolve_device

            make_projection("trak", self.params.proj_dim, 0, device=resolve_device(self.config.device))

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
        """Load base, adapter and Adam states once; yield the function from rows to projected gradients."""
        from dataflex_pipeline.gradients.projection import make_projection
        from dataflex_pipeline.gradients.stream import ProjectedGradients

        loaded = load(given, self.config, progress)
        updates = loaded.adam_updates(self.params.side, self.params.adam_update)
        projection = make_projection(
            self.params.projection, self.params.proj_dim, self.params.seed, device=loaded.device
        )
        consumer = ProjectedGradients(projection, updates)
        with loaded.capturing(consumer) as (capture, room):

            def compute(rows: pa.Table) -> pa.Table:
                return self._table(rows, self._compute(loaded.model, capture, consumer, room, rows))

            yield compute

    def _compute(
        self, model: Any, capture: GradientCapture, consumer: ProjectedGradients, room: Room, rows: pa.Table
    ) -> Computed:
        from dataflex_pipeline.gradients.stream import projected_batch

        sequences = Sequences.of(rows.filter(rows.column("valid")))
        n_labels = sequences.n_labels()
        count = len(n_labels)
        losses, squares = np.full(count, np.nan), np.zeros(count)
        vectors = np.zeros((count, self.params.proj_dim), dtype=np.float32)
        if not count:
            return losses, vectors, squares

        def run(some: Sequences, batch: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            return projected_batch(capture, consumer, *batch_on(model, some, batch))

        def work(batch: np.ndarray) -> None:
            loss, projected, square = run(sequences, batch)
            losses[batch] = loss.cpu().double().numpy()
            vectors[batch] = projected.cpu().numpy()
            squares[batch] = square.cpu().numpy()

        room.settle(sequences, run, model.device)
        room.each_batch(sequences.lengths, n_labels, capture.max_labels, work)
        return losses, vectors, squares

    def _table(self, rows: pa.Table, computed: Computed) -> pa.Table:
        losses, vectors, squares = computed
        valid = rows.column("valid").to_numpy(zero_copy_only=False)
        finite = np.isfinite(losses) & np.isfinite(squares) & np.isfinite(vectors).all(axis=1)
        norms = np.linalg.norm(vectors.astype(np.float64), axis=1)  # [valid]
        with np.errstate(invalid="ignore", divide="ignore"):
            unit = np.where((finite & (norms > 0))[:, None], vectors / norms[:, None], 0.0)
        kept = valid.copy()
        kept[valid] = finite
        reason = rows.column("reason").to_pylist()
        for position in np.flatnonzero(valid & ~kept):
            reason[position] = NOT_FINITE
        numbers = np.dtype(self.params.dtype)
        full = np.zeros((rows.num_rows, self.params.proj_dim), dtype=numbers)
        full[valid] = unit.astype(numbers)
        flat = pa.array(full.reshape(-1), self.DTYPES[self.params.dtype])
        lists = pa.FixedSizeListArray.from_arrays(flat, self.params.proj_dim, mask=pa.array(~kept))
        columns = {
            "row": rows.column("row"),
            "row_id": rows.column("row_id"),
            "gradient": lists,
            "projected_norm": _spread(norms.astype(np.float32), valid, kept),
            "norm": _spread(np.sqrt(squares), valid, kept),
            "loss": _spread(losses, valid, kept),
            "group": rows.column("group")
            if "group" in rows.column_names
            else pa.nulls(len(rows), pa.string()),
            "valid": pa.array(kept),
            "reason": pa.array(reason, pa.string()),
        }
        return pa.table([columns[name] for name in self.schema.names], schema=self.schema)


def _spread(values: np.ndarray, valid: np.ndarray, kept: np.ndarray) -> pa.Array:
    """Return values of the valid rows at their places, null where the row has none. [rows]"""
    full = np.zeros(len(valid), dtype=values.dtype)
    full[valid] = values
    return pa.array(full, mask=~kept)
