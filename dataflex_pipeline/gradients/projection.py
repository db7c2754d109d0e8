"""Random projections of gradients, added up parameter by parameter; no matrix is ever stored whole.

For a vector x over all trainable parameters, S x in R^K with E <Sx, Sy> = <x, y>:

- ``countsketch`` and ``countshift`` (sketches.py): every coordinate goes to one bucket with one sign. Linear
  time, whatever K.
- ``rademacher`` (the published choice of LESS): S_ki = +-1 / sqrt(K), independent. Time P x K.

All have Var <Sx, Sy> = (|x|^2 |y|^2 + <x, y>^2 - 2 sum_i x_i^2 y_i^2) / K (countshift: at most that). The
randomness of coordinate i of a parameter comes from (seed, name of the parameter, i) by Philox (philox.py),
so that the matrix does not depend on device, batch, order or sharding. Nothing is rescaled by the shape of a
parameter.

``trak`` takes the CUDA kernels of the ``traker`` package, where it is installed. Every parameter is
projected by a projector of its own, with a seed from (seed, name), and the results add up: the same
distribution as one projection of the concatenated gradient, without ever concatenating. The kernels' signs
are not scaled, so the sums are divided by sqrt(K) here. The numbers are those of the kernels (which depend
on the GPU), not those of ``rademacher``.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch  # noqa: TID253  (imported lazily with the whole layer)

from dataflex_pipeline.accelerators import with_index
from dataflex_pipeline.errors import ConfigError, did_you_mean
from dataflex_pipeline.gradients.philox import counter_words, random_octets
from dataflex_pipeline.gradients.sketches import CountShift, CountSketch, table_limit
from dataflex_pipeline.seeds import derive_seed

CPU_SIGNS, DEVICE_SIGNS = 1 << 20, 1 << 26
"""Elements of the dense sign matrix that exist at a time: few for a CPU's cache, many for a GPU's cores."""
NAMES = ("countsketch", "countshift", "rademacher", "trak")


class Projection(Protocol):
    """A random linear map from all trainable parameters to K dimensions."""

    dim: int

    def add(self, name: str, block: torch.Tensor, into: torch.Tensor) -> None:
        """Add the projection of one parameter's part of the vectors.

        Args:
            name: of the parameter. block: its coordinates. [b, numel] float32, contiguous
            into: what the projections are added to. [b, K] float32
        """


def make_projection(
    name: str, proj_dim: int, seed: int, cache_bytes: int | None = None, device: str = "cpu"
) -> Projection:
    """Return the projection that the setting ``projection`` names.

    Args:
        name: countsketch, countshift, rademacher or trak. proj_dim: K. seed: 64 bits.
        cache_bytes: at most this much of a sketch's tables is kept; None: as the device has room.
        device: where the gradients are; trak needs a GPU.

    Raises:
        ConfigError: unknown name, a dimension below 1, trak without its package or a GPU.
    """
    if not 1 <= proj_dim < 1 << 31:
        raise ConfigError(
            f"proj_dim: {proj_dim} was set.",
            "Gradients are projected to that many dimensions, which must be 1 or more (and below 2^31).",
            "Set proj_dim to 4096, say; more dimensions make similarities more exact and take more disk.",
        )
    if name == "countsketch":
        return CountSketch(proj_dim, seed, table_limit(device) if cache_bytes is None else cache_bytes)
    if name == "countshift":
        return CountShift(proj_dim, seed, table_limit(device) if cache_bytes is None else cache_bytes)
    if name == "rademacher":
        return Rademacher(proj_dim, seed)
    if name == "trak":
        return TrakProjection(proj_dim, seed, device)
    raise ConfigError(
        f"projection: {name} was set.{did_you_mean(name, NAMES)}",
        f"It is not a projection; {', '.join(NAMES)} are.",
        "Set projection: countsketch, or one of the others.",
    )


class Rademacher:
    """A dense matrix of +-1 / sqrt(K), generated some coordinates at a time.

    The sign of coordinate i in dimension k is bit k mod 32 of word (k mod 128) // 32 of the Philox block
    with the counter (i, k // 128): minus where it is 1.
    """

    def __init__(self, dim: int, seed: int) -> None:
        self.dim = dim
        self._seed = seed
        self._scale = 1.0 / math.sqrt(dim)

    def add(self, name: str, block: torch.Tensor, into: torch.Tensor) -> None:
        """Add the projection of ``block`` [b, numel] to ``into`` [b, K]."""
        elements = CPU_SIGNS if block.device.type == "cpu" else DEVICE_SIGNS
        step = max(1, elements // self.dim)
        for first in range(0, block.shape[1], step):
            part = block[:, first : first + step]
            signs = self.signs(name, first, part.shape[1], block.device)
            into.addmm_(part, signs, alpha=self._scale)

    def signs(self, name: str, first: int, count: int, device: torch.device) -> torch.Tensor:
        """Return the signs of ``count`` coordinates of a parameter from ``first`` on. [count, K] float32"""
        key = derive_seed(self._seed, "rademacher", name)
        low, high = counter_words(torch.arange(first, first + count, device=device)[:, None])
        groups = torch.arange((self.dim + 127) // 128, device=device)[None, :]
        octets = random_octets((low, high, groups, torch.zeros_like(groups)), key)  # [count, G, 16] uint8
        signs = _octet_signs(device).index_select(0, octets.flatten().int())
        return signs.view(count, -1)[:, : self.dim]


def _octet_signs(device: torch.device) -> torch.Tensor:
    """Return the eight signs of each value of a byte, lowest bit first. [256, 8] float32"""
    values = torch.arange(256, device=device)[:, None]
    return (1 - 2 * ((values >> torch.arange(8, device=device)) & 1)).float()


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
            device = torch.device(with_index(str(self._device)))
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
