"""The sketches: random projections in linear time, whatever K is. Every coordinate goes to one signed bucket.

(Sx)_k = sum over the coordinates i with h(i) = k of s(i) x_i, with independent signs s(i):

- ``countsketch``: h(i) is drawn for every coordinate (Charikar, Chen and Farach-Colton, 2002).
- ``countshift``: the coordinates of a parameter are cut into chunks of K, and chunk q is rotated by a random
  number c_q of places: h(qK + j) = (j + c_q) mod K. A chunk is then added as it stands in memory: no bucket
  is looked up, and nothing has to be sorted for a fixed order of additions.

In both, two coordinates that can meet do so with probability 1 / K, so that with w_ij = x_i^2 y_j^2 +
x_i y_i x_j y_j,

    Var <Sx, Sy> = 1/K sum over the pairs i != j that can meet of w_ij.

Under countsketch those are all pairs, (|x|^2 |y|^2 + <x, y>^2 - 2 sum_i x_i^2 y_i^2) / K in all; under
countshift those of one chunk cannot meet, and since w_ij + w_ji = (x_i y_j + x_j y_i)^2 its variance is never
larger. Where two chunks get the same rotation all their K pairs meet at once, each with signs of its own.

The sums of a row are made by elementwise additions in an order of their own, so they are bit-equal whatever
other rows stand beside it: chunk after chunk on a CPU; on other devices by halves (the second half of the
chunks onto the first, until one is left), which takes few large operations. Signs and rotations come from
(seed, name of the parameter, number of coordinate or chunk) by Philox.
"""

from __future__ import annotations

from collections.abc import Callable

import torch  # noqa: TID253  (imported lazily with the whole layer)

from dataflex_pipeline.gradients.philox import counter_words, philox, random_octets
from dataflex_pipeline.seeds import derive_seed

CACHED_ELEMENTS = 1 << 18
"""Elements that a CPU works on at a time (1 MiB)."""
COORDINATES = 1 << 24
"""Coordinates whose tables are made at a time; each takes about 50 bytes while that lasts."""
HOST_TABLES = 1 << 30
"""Bytes of tables that are kept in a CPU's memory, and where a device does not say what is free."""
DEVICE_TABLES = 4 << 30
"""Bytes of tables that an accelerator keeps at least, unless that is more than a quarter of what is free."""

Table = tuple[torch.Tensor, ...]


def table_limit(device: str | torch.device) -> int:
    """Return how many bytes of tables a device may keep.

    1 GiB on a CPU. On an accelerator a tenth of its free memory, or 4 GiB where that is less, but never more
    than a quarter of what is free. It changes times, and no number.
    """
    device = torch.device(device)
    if device.type in ("cpu", "mps"):  # Apple's GPUs share the memory of the CPU
        return HOST_TABLES
    try:
        free, _ = torch.accelerator.get_memory_info(device)
    except (RuntimeError, NotImplementedError):
        return HOST_TABLES
    return max(free // 10, min(DEVICE_TABLES, free // 4))


class Tables:
    """Tables of parameters: kept up to a number of bytes; of those beyond, the one that was asked for last.

    A parameter comes in several blocks of rows, one after the other, so that its table is made at most once
    per batch.

    Args:
        limit: bytes that are kept.
    """

    def __init__(self, limit: int) -> None:
        self._left = limit
        self._kept: dict[tuple[str, str], Table] = {}
        self._last: tuple[tuple[str, str], Table] | None = None

    def get(self, kind: str, parameter: str, make: Callable[[], Table]) -> Table:
        """Return the table of some kind of a parameter, made by ``make`` where it is not at hand."""
        name = kind, parameter
        if name in self._kept:
            return self._kept[name]
        if self._last is not None and self._last[0] == name:
            return self._last[1]
        self._last = None  # before the next one is made, so that two never exist beside the kept ones
        table = make()
        needed = sum(part.numel() * part.element_size() for part in table)
        if needed <= self._left:
            self._left -= needed
            self._kept[name] = table
        else:
            self._last = name, table
        return table


class CountSketch:
    """One signed bucket per coordinate.

    Coordinate i takes the words 2 (i mod 2) and 2 (i mod 2) + 1 of the Philox block i // 2: the bucket is the
    first word times K, shifted right by 32; the sign is minus where the second word is odd.

    Args:
        dim: K. seed: 64 bits. limit: bytes of tables that are kept.
    """

    def __init__(self, dim: int, seed: int, limit: int = HOST_TABLES) -> None:
        self.dim = dim
        self._seed = seed
        self._tables = Tables(limit)

    def add(self, name: str, block: torch.Tensor, into: torch.Tensor) -> None:
        """Add the sketch of ``block`` [b, numel] to ``into`` [b, K]."""
        if block.device.type != "cpu":
            self.add_sorted(name, block, into)
            return
        (code,) = self._tables.get("code", name, lambda: (self._code(name, block.shape[1], block.device),))
        # On a CPU every row's sums are made by one thread in the order of the coordinates. What exists of the
        # signed block at a time stays in its cache: a third of the time of a large parameter done whole.
        step = max(1, CACHED_ELEMENTS // max(1, len(block)))
        for first in range(0, block.shape[1], step):
            bucket, sign = _decoded(code[first : first + step])
            signed = block[:, first : first + step] * sign
            into.scatter_add_(1, bucket.expand(signed.shape), signed)

    def add_sorted(self, name: str, block: torch.Tensor, into: torch.Tensor) -> None:
        """Do the same bucket by bucket: a fixed order of additions where scatters have none."""
        order, starts, sign = self._tables.get(
            "by bucket", name, lambda: self._by_bucket(name, block.shape[1], block.device)
        )
        signed = torch.mul(block.T, sign[:, None]).contiguous()  # [numel, b]
        into += torch.nn.functional.embedding_bag(order, signed, starts, mode="sum").T

    def buckets(self, name: str, numel: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return bucket (int64) and sign (float32) of each coordinate of a parameter. [numel] each"""
        return _decoded(self._code(name, numel, device))

    def _code(self, name: str, numel: int, device: torch.device) -> torch.Tensor:
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

    def _by_bucket(self, name: str, numel: int, device: torch.device) -> Table:
        """Return the coordinates by bucket [numel], where each bucket begins [K], and the signs [numel]."""
        code = self._code(name, numel, device)
        ordered, order = torch.sort(code >> 1, stable=True)
        starts = torch.searchsorted(ordered, torch.arange(self.dim, dtype=ordered.dtype, device=device))
        return order.int(), starts.int(), (1 - 2 * (code & 1)).to(torch.int8)


def _decoded(code: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return buckets (int64) and signs (float32) from 2 x bucket + (1 where the sign is minus). [n] each"""
    return (code >> 1).long(), (1 - 2 * (code & 1)).float()


class CountShift:
    """One rotation per chunk of K coordinates, one sign per coordinate.

    The sign of coordinate i is bit i mod 128 of the four words of the Philox block with the counter
    (i // 128, 0), lowest bit of the first word first: minus where it is 1. Chunk q is rotated by c_q = the
    first word of the block with the counter (q, 1), times K, shifted right by 32.

    Args:
        dim: K. seed: 64 bits. limit: bytes of tables that are kept.
    """

    def __init__(self, dim: int, seed: int, limit: int = HOST_TABLES) -> None:
        self.dim = dim
        self._seed = seed
        self._tables = Tables(limit)
        self._shifts: dict[str, list[int]] = {}

    def add(self, name: str, block: torch.Tensor, into: torch.Tensor) -> None:
        """Add the sketch of ``block`` [b, numel] to ``into`` [b, K]."""
        if block.device.type != "cpu":
            self.add_by_halves(name, block, into)
            return
        (signs,) = self._tables.get("signs", name, lambda: (self.signs(name, block.shape[1], block.device),))
        shifts = self.shifts(name, block.shape[1])
        sums = block.new_zeros(
            len(block), 2 * self.dim
        )  # what a rotation moves past K is added back at the end
        chunks = max(1, CACHED_ELEMENTS // self.dim)  # whose signs are floats at a time
        for first in range(0, len(shifts), chunks):
            span = slice(first * self.dim, (first + chunks) * self.dim)
            floats = signs[span].float().split(self.dim)  # type: ignore[no-untyped-call]
            parts = block[:, span].split(self.dim, 1)  # type: ignore[no-untyped-call]
            for shift, sign, part in zip(shifts[first : first + chunks], floats, parts, strict=True):
                sums.narrow(1, shift, len(sign)).addcmul_(part, sign)
        into += sums[:, : self.dim]
        into += sums[:, self.dim :]

    def add_by_halves(self, name: str, block: torch.Tensor, into: torch.Tensor) -> None:
        """Do the same in few large operations, with a fixed order of additions."""
        numel = block.shape[1]
        signs, order = self._tables.get("rotated", name, lambda: self._rotated(name, numel, block.device))
        signed = block * signs
        whole = numel // self.dim
        if whole:
            chunks = signed.index_select(1, order).view(len(block), whole, self.dim)
            while whole > 1:
                half = (whole + 1) // 2
                chunks[:, : whole - half] += chunks[:, half:whole]
                whole = half
            into += chunks[:, 0]
        rest = signed[:, numel - numel % self.dim :]
        if rest.shape[1]:
            shift = self.shifts(name, numel)[-1]
            kept = min(rest.shape[1], self.dim - shift)
            into[:, shift : shift + kept] += rest[:, :kept]
            into[:, : rest.shape[1] - kept] += rest[:, kept:]

    def signs(self, name: str, numel: int, device: torch.device) -> torch.Tensor:
        """Return the sign of each coordinate of a parameter. [numel] int8"""
        key = derive_seed(self._seed, "countshift", name)
        zero = torch.zeros((), dtype=torch.int64, device=device)
        bits = torch.arange(8, dtype=torch.uint8, device=device)
        parts = []
        for first in range(0, numel, COORDINATES):
            last = min(first + COORDINATES, numel)
            blocks = torch.arange(first // 128, -(-last // 128), device=device)
            octets = random_octets((*counter_words(blocks), zero, zero), key).flatten()
            minus = (octets[:, None] >> bits) & 1  # [coordinates / 8, 8] uint8
            parts.append(1 - 2 * minus.flatten()[: last - first].to(torch.int8))
        return torch.cat(parts)

    def shifts(self, name: str, numel: int) -> list[int]:
        """Return by how many places each chunk of a parameter is rotated, in [0, K). [chunks]"""
        if name not in self._shifts:
            key = derive_seed(self._seed, "countshift", name)
            chunks = torch.arange(-(-numel // self.dim))
            one = torch.ones((), dtype=torch.int64)
            word = philox((*counter_words(chunks), one, 0 * one), key)[0]
            self._shifts[name] = ((word * self.dim) >> 32).tolist()
        return self._shifts[name]

    def _rotated(self, name: str, numel: int, device: torch.device) -> Table:
        """Return the signs [numel] and the coordinate that each place of the rotated whole chunks takes."""
        whole = numel // self.dim
        shifts = torch.tensor(self.shifts(name, numel)[:whole], dtype=torch.int32).to(device)
        dtype = torch.int32 if numel < 1 << 31 else torch.int64
        places = torch.arange(self.dim, dtype=torch.int32, device=device)
        order = ((places - shifts[:, None]) % self.dim).to(dtype)  # [chunks, K]
        order += torch.arange(whole, dtype=dtype, device=device)[:, None] * self.dim
        return self.signs(name, numel, device), order.flatten()
