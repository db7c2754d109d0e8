"""The CUDA kernels of the ``traker`` package as a projection, where that package is installed.

Every parameter is projected by a projector of its own, with a seed from (seed, name), and the results add
up: the same distribution as one projection of the concatenated gradient, without ever concatenating. The
kernels' signs are not scaled, so the sums are divided by sqrt(K) here. The numbers are those of the kernels
(which depend on the GPU), not those of ``rademacher``.
"""

from __future__ import annotations

import math
from typing import Any

import torch  # noqa: TID253  (imported lazily with the whole layer)

from dataflex_pipeline.errors import ConfigError
from dataflex_pipeline.seeds import derive_seed

DIM_STEP = 512
"""The kernels make multiples of this many dimensions."""
MOST_ROWS = 32
"""Rows that one call of a kernel takes."""


class TrakProjection:
    """Dense random signs by the ``fast_jl`` kernels.

    Raises:
        ConfigError: the packages are not installed, the device is no GPU, or K is no multiple of 512.
    """

    def __init__(self, dim: int, seed: int, device: str) -> None:
        if not device.startswith("cuda"):
            raise _unusable(f"Its kernels run on NVIDIA GPUs only, and the device is {device}.")
        if dim % DIM_STEP:
            raise _unusable(f"Its kernels make multiples of {DIM_STEP} dimensions, and proj_dim is {dim}.")
        self.dim = dim
        self._seed = seed
        self._device = torch.device(device)
        self._projector = _projector_class()
        self._made: dict[str, Any] = {}

    def add(self, name: str, block: torch.Tensor, into: torch.Tensor) -> None:
        """Add the projection of ``block`` [b, numel] to ``into`` [b, K]."""
        if name not in self._made:
            seed = derive_seed(self._seed, "trak", name) % (1 << 31)
            device = self._device if self._device.index is not None else torch.device("cuda", 0)
            self._made[name] = self._projector(block.shape[1], self.dim, seed, _signs(), device, MOST_ROWS)
        for first in range(0, block.shape[0], MOST_ROWS):
            rows = slice(first, first + MOST_ROWS)
            projected = self._made[name].project(block[rows].contiguous(), model_id=0)
            into[rows].add_(projected, alpha=1.0 / math.sqrt(self.dim))


def _projector_class() -> Any:
    try:
        import fast_jl  # type: ignore[import-not-found]  # noqa: F401
        from trak.projectors import CudaProjector  # type: ignore[import-not-found]
    except ImportError as error:
        raise _unusable(f"The packages traker and fast_jl are not there ({error}).") from error
    return CudaProjector


def _signs() -> Any:
    from trak.projectors import ProjectionType

    return ProjectionType.rademacher


def _unusable(why: str) -> ConfigError:
    return ConfigError(
        "projection: trak was set.",
        why,
        "Set projection: rademacher (the same distribution, on any device) or countsketch (much faster).",
    )
