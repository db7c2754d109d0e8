"""Random projections of gradients, added up parameter by parameter; no matrix is ever stored whole.

For a vector x over all trainable parameters, S x in R^K with E <Sx, Sy> = <x, y>:

- ``countsketch`` (Charikar, Chen and Farach-Colton, 2002): coordinate i goes to one bucket h(i) with one
  sign s(i), (Sx)_k = sum over h(i) = k of s(i) x_i. Linear time, whatever K.
- ``rademacher`` (the published choice of LESS): S_ki = +-1 / sqrt(K), independent. Time P x K.

Both have Var <Sx, Sy> = (|x|^2 |y|^2 + <x, y>^2 - 2 sum_i x_i^2 y_i^2) / K. The randomness of coordinate i
of a parameter comes from (seed, name of the parameter, i) by Philox, so that the matrix does not depend on
device, batch, order or sharding. Nothing is rescaled by the shape of a parameter.

Philox-4x32 with 10 rounds (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3",
SC 2011, section 3.3). A counter of four 32-bit words and a key of two give four random words. One round:

    (c0, c1, c2, c3) <- (hi(M1 c2) ^ c1 ^ k0, lo(M1 c2), hi(M0 c0) ^ c3 ^ k1, lo(M0 c0))
    (k0, k1)         <- (k0 + W0, k1 + W1)    between rounds, modulo 2^32

Words live in int64 tensors in [0, 2^32): the product of two of them wraps modulo 2^64, which leaves both
halves right once the sign bits of the shifted upper half are masked off.

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

from dataflex_pipeline.errors import ConfigError, did_you_mean
from dataflex_pipeline.seeds import derive_seed

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
MASK = 0xFFFFFFFF

Words = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def philox(counter: Words, key: int) -> Words:
    """Return four random words for every counter.

    Args:
        counter: four int64 tensors of values in [0, 2^32), of shapes that broadcast.
        key: 64 bits; the lower half is the first key word.

    Returns:
        Four int64 tensors of values in [0, 2^32), of the broadcast shape.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key & MASK, (key >> 32) & MASK
    for _ in range(ROUNDS):
        first, second = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((second >> 32) & MASK) ^ c1 ^ k0,
            second & MASK,
            ((first >> 32) & MASK) ^ c3 ^ k1,
            first & MASK,
        )
        k0, k1 = (k0 + KEY_STEPS[0]) & MASK, (k1 + KEY_STEPS[1]) & MASK
    return c0, c1, c2, c3


def counter_words(numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Split non-negative int64 numbers into their lower and upper 32-bit words."""
    return numbers & MASK, numbers >> 32


CACHE_BYTES = 1 << 30
"""Buckets and signs are kept up to this; those of further parameters are made anew for every batch."""
SIGN_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 26}
"""Elements of the dense sign matrix that exist at a time: few for a CPU's cache, many for a GPU's cores."""
CACHED_ELEMENTS = 1 << 18
"""Elements that a CPU works on at a time (1 MiB)."""
COORDINATES = 1 << 24
"""Coordinates whose buckets are made at a time; each takes about 50 bytes while that lasts."""
NAMES = ("countsketch", "rademacher", "trak")


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
    name: str, proj_dim: int, seed: int, cache_bytes: int = CACHE_BYTES, device: str = "cpu"
) -> Projection:
    """Return the projection that the setting ``projection`` names.

    Args:
        name: countsketch, rademacher or trak. proj_dim: K. seed: 64 bits.
        cache_bytes: at most this much of countsketch's buckets is kept.
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
        return CountSketch(proj_dim, seed, cache_bytes)
    if name == "rademacher":
        return Rademacher(proj_dim, seed)
    if name == "trak":
        from dataflex_pipeline.gradients.projection import TrakProjection

        return TrakProjection(proj_dim, seed, device)
    raise ConfigError(
        f"projection: {name} was set.{did_you_mean(name, NAMES)}",
        f"It is not a projection; {', '.join(NAMES)} are.",
        "Set projection: countsketch, or one of the others.",
    )


class CountSketch:
    """One signed bucket per coordinate.

    Coordinate i takes the words 2 (i mod 2) and 2 (i mod 2) + 1 of the Philox block i // 2: the bucket is the
    first word times K, shifted right by 32; the sign is minus where the second word is odd.
    """

    def __init__(self, dim: int, seed: int, cache_bytes: int = CACHE_BYTES) -> None:
        self.dim = dim
        self._seed = seed
        self._left = cache_bytes
        self._codes: dict[str, torch.Tensor] = {}
        self._sorted: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    def add(self, name: str, block: torch.Tensor, into: torch.Tensor) -> None:
        """Add the sketch of ``block`` [b, numel] to ``into`` [b, K]."""
        if block.device.type == "cuda":
            self.add_sorted(name, block, into)
            return
        code = self._code(name, block.shape[1], block.device)
        # On a CPU every row's sums are made by one thread in the order of the coordinates. What exists of the
        # signed block at a time stays in its cache: a third of the time of a large parameter done whole.
        step = max(1, CACHED_ELEMENTS // max(1, len(block)))
        for first in range(0, block.shape[1], step):
            bucket, sign = _decoded(code[first : first + step])
            signed = block[:, first : first + step] * sign
            into.scatter_add_(1, bucket.expand(signed.shape), signed)

    def add_sorted(self, name: str, block: torch.Tensor, into: torch.Tensor) -> None:
        """Do the same bucket by bucket: a fixed order of additions where scatters have none (CUDA)."""
        order, starts, sign = self._by_bucket(name, block.shape[1], block.device)
        sums = torch.nn.functional.embedding_bag(
            order, block.T.contiguous(), starts, mode="sum", per_sample_weights=sign
        )  # [K, b]
        into += sums.T

    def buckets(self, name: str, numel: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return bucket (int64) and sign (float32) of each coordinate of a parameter. [numel] each"""
        return _decoded(self._code(name, numel, device))

    def _code(self, name: str, numel: int, device: torch.device) -> torch.Tensor:
        code = self._codes.get(name)
        if code is None:
            code = self._make_codes(name, numel, device)
            if self._take(code):
                self._codes[name] = code
        return code

    def _make_codes(self, name: str, numel: int, device: torch.device) -> torch.Tensor:
        """Return 2 x bucket + (1 where the sign is minus). [numel] int32, int64 for K over 2^30"""
        dtype = torch.int32 if self.dim <= 1 << 30 else torch.int64
        key = derive_seed(self._seed, "countsketch", name)
        zero = torch.zeros((), dtype=torch.int64, device=device)
        parts = []
        for first in range(0, numel, COORDINATES):
            last = min(first + COORDINATES, numel)
            blocks = torch.arange(first // 2, (last + 1) // 2, device=device)
            a, b, c, d = philox((*counter_words(blocks), zero, zero), key)
            bucket_word, sign_word = torch.stack([a, c], 1).flatten(), torch.stack([b, d], 1).flatten()
            code = ((bucket_word * self.dim) >> 32) * 2 + (sign_word & 1)
            parts.append(code[: last - first].to(dtype))
        return torch.cat(parts)

    def _by_bucket(
        self, name: str, numel: int, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        known = self._sorted.get(name)
        if known is not None:
            return known
        bucket, sign = self.buckets(name, numel, device)
        self._forget(name)
        ordered, order = torch.sort(bucket, stable=True)
        starts = torch.searchsorted(ordered, torch.arange(self.dim, device=device))
        made = (order.int(), starts.int(), sign[order])
        if self._take(*made):
            self._sorted[name] = made
        return made

    def _take(self, *arrays: torch.Tensor) -> bool:
        needed = sum(array.numel() * array.element_size() for array in arrays)
        if needed > self._left:
            return False
        self._left -= needed
        return True

    def _forget(self, name: str) -> None:
        code = self._codes.pop(name, None)
        if code is not None:
            self._left += code.numel() * code.element_size()


def _decoded(code: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return buckets (int64) and signs (float32) from 2 x bucket + (1 where the sign is minus). [n] each"""
    return (code >> 1).long(), (1 - 2 * (code & 1)).float()


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
        step = max(1, SIGN_ELEMENTS.get(block.device.type, SIGN_ELEMENTS["cpu"]) // self.dim)
        for first in range(0, block.shape[1], step):
            part = block[:, first : first + step]
            signs = self.signs(name, first, part.shape[1], block.device)
            into.addmm_(part, signs, alpha=self._scale)

    def signs(self, name: str, first: int, count: int, device: torch.device) -> torch.Tensor:
        """Return the signs of ``count`` coordinates of a parameter from ``first`` on. [count, K] float32"""
        key = derive_seed(self._seed, "rademacher", name)
        low, high = counter_words(torch.arange(first, first + count, device=device)[:, None])
        groups = torch.arange((self.dim + 127) // 128, device=device)[None, :]
        words = torch.stack(philox((low, high, groups, torch.zeros_like(groups)), key), 2)  # [count, G, 4]
        shifts = torch.arange(0, 32, 8, device=device)
        octets = (words[..., None] >> shifts) & 255  # [count, G, 4, 4]
        table = _octet_signs(device)
        return table[octets.reshape(count, -1)].view(count, -1)[:, : self.dim]


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
