"""Exact nearest vectors, cosines and kernel sums on an accelerator: products of blocks, all pairs compared.

What cells leave out (cells.py) is there for CPUs: an accelerator compares a million vectors with a million in
seconds to minutes. Products are in full float32, whatever training is allowed; under a narrow kernel in
float64, as on a CPU (density.py).

The k smallest |a - b|^2 = |a|^2 + |b|^2 - 2ab of a product may miss a tie by its rounding, up to about 1e-6
for vectors of length 1. More than k are kept therefore, until what is left out is farther than the k-th by
MARGIN; distances taken anew from the vectors then decide (search.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch  # noqa: TID253  (imported where a device other than the CPU was found)

from dataflex_pipeline.neighbours.density import FLAT, WIDE, Sums

ELEMENTS = 1 << 27
"""Products in memory at a time (512 MiB in float32), unless one row alone has more."""
MARGIN = 2e-5
"""Squared distance within which products do not tell vectors of length 1 apart; ten times their rounding."""


@contextmanager
def full_float32() -> Iterator[None]:
    """Let matrix products be in full float32 while the context lasts."""
    settings = torch.backends.cuda.matmul
    name, full = ("fp32_precision", "ieee") if hasattr(settings, "fp32_precision") else ("allow_tf32", False)
    before = getattr(settings, name)
    setattr(settings, name, full)
    try:
        yield
    finally:
        setattr(settings, name, before)


def block_hits(
    targets: np.ndarray, vectors: np.ndarray, k: int, device: str
) -> tuple[np.ndarray, np.ndarray]:
    """Return the k smallest squared distances of each target to some vectors, rising, and their places.

    Args:
        targets: [m, D] float32 vectors: [n, D] float32 k: wanted. device: torch device.

    Returns:
        squared distances, infinite where there are fewer than k. [m, k] float32
        places among the vectors, -1 likewise. [m, k] int64
    """
    squares = np.full((len(targets), k), np.inf, dtype=np.float32)
    places = np.full((len(targets), k), -1, dtype=np.int64)
    count = min(k, len(vectors))
    with full_float32(), torch.inference_mode():
        others = _on(device, vectors)
        lengths = others.square().sum(1)  # [n]
        step = max(1, ELEMENTS // max(1, len(vectors)))
        for first in range(0, len(targets), step):
            block = _on(device, targets[first : first + step])
            values = torch.addmm(lengths, block, others.T, alpha=-2)  # [b, n]
            found = values.topk(count, dim=1, largest=False)
            rows = slice(first, first + len(block))
            squares[rows, :count] = (found.values + block.square().sum(1, keepdim=True)).cpu().numpy()
            places[rows, :count] = found.indices.cpu().numpy()
    return squares, places


def _on(device: str, array: np.ndarray) -> torch.Tensor:
    """Return an array on a device; what Arrow lends read-only is copied, which torch asks for."""
    return torch.from_numpy(array if array.flags.writeable else array.copy()).to(device)


class DeviceCosines:
    """Cosines of vectors with targets that stay on a device.

    Args:
        targets: of length 1. [M, D] float32 device: torch device.
    """

    def __init__(self, targets: np.ndarray, device: str) -> None:
        self._targets, self._device = _on(device, targets), device

    def nearest(self, vectors: np.ndarray) -> np.ndarray:
        """Return which target each vector has the largest cosine with, the first of equals. [n] int64"""
        return self._blocks(vectors, lambda cosines: cosines.argmax(1), np.empty(len(vectors), np.int64))

    def all(self, vectors: np.ndarray) -> np.ndarray:
        """Return the cosine of each vector with each target. [n, M] float32"""
        found = np.empty((len(vectors), len(self._targets)), np.float32)
        return self._blocks(vectors, lambda cosines: cosines, found)

    def _blocks(
        self, vectors: np.ndarray, keep: Callable[[torch.Tensor], torch.Tensor], found: np.ndarray
    ) -> np.ndarray:
        """Fill an array with what is kept of the products of each block of vectors."""
        step = max(1, ELEMENTS // max(1, len(self._targets)))
        with full_float32(), torch.inference_mode():
            for first in range(0, len(vectors), step):
                block = _on(self._device, vectors[first : first + step])
                found[first : first + step] = keep(block @ self._targets.T).cpu().numpy()
        return found


class DeviceKernel:
    """Kernel sums of vectors among all of them, as `kernel_sums` gives them.

    Args:
        vectors: held on the device. [S, D] float32
        sigma: width of the kernel, positive. K: nearest vectors that count.
        gaussian: whether the Gaussian density is wanted too. device: torch device.
    """

    def __init__(self, vectors: np.ndarray, sigma: float, K: int, gaussian: bool, device: str) -> None:
        self._vectors = _on(device, vectors)
        self._K, self._gaussian = min(K, len(vectors)), gaussian
        self._number = torch.float32 if sigma >= WIDE else torch.float64
        self._scale = 1 / sigma**2 if sigma < FLAT else 0.0
        squares = np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64)
        self._squares = torch.from_numpy(self._scale * squares).to(self._number).to(device)  # [S]

    def sums(self, places: np.ndarray, done: Callable[[int], None] = lambda count: None) -> Sums:
        """Return the sums of the vectors at some places.

        Args:
            places: which vectors. [n] done: is called with the number of vectors after each chunk.
        """
        rho = np.empty(len(places))
        density = np.empty(len(places)) if self._gaussian else None
        step = max(1, ELEMENTS // max(1, len(self._vectors)))
        with full_float32(), torch.inference_mode():
            for first in range(0, len(places), step):
                chunk = torch.from_numpy(places[first : first + step]).to(self._vectors.device)
                values = self._values(chunk)
                rows = slice(first, first + len(chunk))
                rho[rows] = self._rho(values).cpu().numpy()
                if density is not None:
                    largest = values.topk(self._K, dim=1).values.double()
                    density[rows] = (((largest - 1) / 2).exp().sum(1) / self._K).cpu().numpy()
                done(len(chunk))
        return Sums(np.maximum(rho, 1.0), density)

    def _values(self, chunk: torch.Tensor) -> torch.Tensor:
        """Return t = 1 - d^2 / sigma^2 of some vectors with all. [n, S]"""
        queries = self._vectors[chunk].to(self._number) * (2 * self._scale)
        values = queries @ self._vectors.to(self._number).T
        values += (1 - self._squares[chunk])[:, None]
        return values.sub_(self._squares)

    def _rho(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sums of the K largest t, those below 0 left out. [n] float64"""
        sums = values.clamp(min=0).sum(1, dtype=torch.float64)
        many = ((values > 0).sum(1) > self._K).nonzero().flatten()
        if len(many):
            sums[many] = values[many].topk(self._K, dim=1).values.sum(1, dtype=torch.float64)
        return sums
