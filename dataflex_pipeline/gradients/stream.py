"""The consumer that LESS needs: gradient -> Adam update -> projection, each parameter dropped at once."""

from __future__ import annotations

from collections.abc import Mapping

import torch  # noqa: TID253  (imported lazily with the whole layer)
from torch import Tensor  # noqa: TID253

from dataflex_pipeline.gradients.adam import AdamUpdate
from dataflex_pipeline.gradients.capture import GradientCapture
from dataflex_pipeline.gradients.projection import Projection
from dataflex_pipeline.models.base import widest_float


class ProjectedGradients:
    """Adds up the projected (Adam-preconditioned) gradients of a batch.

    Args:
        projection: see projection.py.
        updates: parameter name -> its Adam update, for every trainable parameter; None: plain gradients.
    """

    def __init__(self, projection: Projection, updates: Mapping[str, AdamUpdate] | None = None) -> None:
        self._projection, self._updates = projection, updates
        self._sums = torch.empty(0, projection.dim)
        self._squares = torch.empty(0)

    def begin(self, rows: int, device: torch.device | str) -> None:
        """Start a batch of so many rows."""
        self._sums = torch.zeros(rows, self._projection.dim, device=device)
        self._squares = torch.zeros(rows, dtype=widest_float(device), device=device)

    def __call__(self, name: str, rows: slice, gradient: Tensor) -> None:
        """Add one parameter's gradients [b, *shape]; they are overwritten."""
        gradient = gradient.contiguous()
        if self._updates is not None:
            self._updates[name].apply_(gradient)
        flat = gradient.view(len(gradient), -1)
        self._squares[rows] += torch.linalg.vector_norm(flat, dim=1).to(self._squares.dtype).square()
        self._projection.add(name, flat, self._sums[rows])

    def result(self) -> tuple[Tensor, Tensor]:
        """Return the batch's projections [B, K] float32 and squared norms before projection [B], in float64
        but on Apple's GPUs.

        A row whose gradient is not finite has a squared norm that is not finite.
        """
        return self._sums, self._squares


def projected_batch(
    capture: GradientCapture, consumer: ProjectedGradients, ids: Tensor, labels: Tensor, attention: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return losses [B], projected gradients [B, K] and squared norms [B] of one batch.

    Args:
        capture: open, made with ``consumer``. ids, labels, attention: [B, T] each
    """
    consumer.begin(len(ids), ids.device)
    losses = capture.run(ids, labels, attention)
    return (losses, *consumer.result())
