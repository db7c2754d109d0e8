"""The slow way that is always right: one forward and backward per row, by autograd."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch  # noqa: TID253  (imported lazily with the whole layer)
from torch import Tensor, nn  # noqa: TID253

from dataflex_pipeline.schemas import IGNORED

Batch = tuple[Tensor, Tensor, Tensor]
FLOOR = 1e-3
"""Gradients below this part of the model's typical size are all rounding (as of a key's bias, which is 0)."""


def alone(ids: Tensor, labels: Tensor, attention: Tensor, row: int) -> Batch:
    """Return one row of a batch without its padding. [1, tokens] each"""
    kept = attention[row].bool()
    return ids[row, kept][None], labels[row, kept][None], attention[row, kept][None]


def row_gradients(
    row_losses: Callable[[Tensor, Tensor, Tensor], Tensor],
    parameters: Mapping[str, nn.Parameter],
    batch: Batch,
    consumer: Callable[[str, slice, Tensor], None],
) -> None:
    """Give the consumer the gradients of every row, one row at a time; ``.grad`` is None afterwards.

    Args:
        row_losses: from a batch to its rows' losses. parameters: those wanted, by name.
        batch: ids, labels, attention mask. [B, T] each
        consumer: as `GradientConsumer`.
    """
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    try:
        for row in range(batch[0].shape[0]):
            single = alone(*batch, row)
            if bool((single[1][:, 1:] != IGNORED).any()):
                loss = row_losses(*single).sum()
                if loss.requires_grad:  # it does not where none of these parameters has a part in it
                    torch.autograd.backward(loss)
            for name, parameter in parameters.items():
                gradient, parameter.grad = parameter.grad, None
                found = torch.zeros_like(parameter) if gradient is None else gradient
                consumer(name, slice(row, row + 1), found.detach().float()[None])
    finally:
        for parameter in parameters.values():
            parameter.requires_grad_(False)
            parameter.grad = None


class Comparison:
    """Compares the gradients of one row of a batch with those expected of it.

    Args:
        row: of the batch.
    """

    def __init__(self, row: int) -> None:
        self._row = row
        self._expected: dict[str, Tensor] = {}
        self._errors: dict[str, tuple[float, float, int]] = {}

    def expect(self, name: str, rows: slice, gradient: Tensor) -> None:
        """Take what autograd says. gradient: [1, *shape]"""
        self._expected[name] = gradient[0]

    def __call__(self, name: str, rows: slice, gradient: Tensor) -> None:
        """Take what was captured. gradient: [b, *shape]"""
        if rows.start <= self._row < rows.stop and name in self._expected:
            expected = self._expected.pop(name)
            error = float((gradient[self._row - rows.start] - expected).norm())
            self._errors[name] = error, float(expected.norm()), expected.numel()

    def relative(self) -> dict[str, float]:
        """Return each parameter's difference over the size of what was expected of it."""
        total = sum(size for _, _, size in self._errors.values())
        typical = (sum(norm**2 for _, norm, _ in self._errors.values()) / max(1, total)) ** 0.5
        sizes = {n: max(norm, FLOOR * typical * size**0.5) for n, (_, norm, size) in self._errors.items()}
        return {n: error / sizes[n] if sizes[n] else error for n, (error, _, _) in self._errors.items()}

    def different(self, tolerance: float) -> list[str]:
        """Return the parameters whose captured gradient is another one, by a relative difference."""
        return [name for name, error in self.relative().items() if not error <= tolerance]
