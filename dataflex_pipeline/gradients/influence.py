"""The consumer of exact influence: gradient -> Adam update -> products with directions, dropped at once.

For a row's update u (or plain gradient) and directions D_1..D_G (directions.py), parameter by parameter:

    <u, D_g> = sum over the parameters p of <u_p, D_g,p>          |u|^2 = sum of |u_p|^2

One matrix product per parameter serves all directions of a target; several targets have a product each, so
that what one gives does not depend on the others. On a CPU the update, the products and the length are made
in one sweep of tiles that stay in its cache: a gradient is written once and read once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch  # noqa: TID253  (imported lazily with the whole layer)
from torch import Tensor  # noqa: TID253

from dataflex_pipeline.gradients.adam import AdamUpdate, tiles
from dataflex_pipeline.gradients.capture import GradientCapture
from dataflex_pipeline.models.base import widest_float


class Influences:
    """Adds up the inner products of a batch's (Adam-preconditioned) gradients with directions.

    Args:
        targets: the directions of each, by parameter name, for every trainable parameter. [G, numel] float32
        updates: parameter name -> its Adam update, for every trainable parameter; None: plain gradients.

    Attributes:
        counts: directions of each target.
        n_directions: of all targets, G in all.
    """

    def __init__(
        self, targets: Sequence[Mapping[str, Tensor]], updates: Mapping[str, AdamUpdate] | None = None
    ) -> None:
        self._targets, self._updates = targets, updates
        self.counts = [len(next(iter(directions.values()))) for directions in targets]
        self.n_directions = sum(self.counts)
        self._dots = torch.empty(0, self.n_directions)
        self._squares = torch.empty(0)

    def begin(self, rows: int, device: torch.device | str) -> None:
        """Start a batch of so many rows."""
        kind = widest_float(device)
        self._dots = torch.zeros(rows, self.n_directions, dtype=kind, device=device)
        self._squares = torch.zeros(rows, dtype=kind, device=device)

    def __call__(self, name: str, rows: slice, gradient: Tensor) -> None:
        """Add one parameter's gradients [b, *shape]; they are overwritten."""
        flat = gradient.contiguous().view(len(gradient), -1)
        update = None if self._updates is None else self._updates[name]
        products = list(zip(torch.split(self._dots[rows], self.counts, dim=1), self._targets, strict=True))
        squares = self._squares[rows]
        with full_products(flat.device):
            for tile in tiles(flat):
                piece = flat[:, tile]  # [b, tile]
                if update is not None:
                    update.apply_to(piece, tile)
                for dots, directions in products:
                    dots += (piece @ directions[name][:, tile].T).to(dots.dtype)
                squares += torch.linalg.vector_norm(piece, dim=1).to(squares.dtype).square()

    def result(self) -> tuple[Tensor, Tensor]:
        """Return the batch's inner products and squared norms, in float64 but on Apple's GPUs.

        A row whose gradient is not finite has a squared norm that is not finite.

        Returns:
            Inner products, target after target. [B, G]
            Squared norms. [B]
        """
        return self._dots, self._squares


@contextmanager
def full_products(device: torch.device) -> Iterator[None]:
    """Take products of float32 as float32: TensorFloat-32 keeps 10 bits, and these are bound by memory."""
    if device.type != "cuda":
        yield
        return
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def influence_batch(
    capture: GradientCapture, consumer: Influences, ids: Tensor, labels: Tensor, attention: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return losses [B], inner products with the directions [B, G] and squared norms [B] of one batch.

    Args:
        capture: open, made with ``consumer``. ids, labels, attention: [B, T] each
    """
    consumer.begin(len(ids), ids.device)
    losses = capture.run(ids, labels, attention)
    return (losses, *consumer.result())
