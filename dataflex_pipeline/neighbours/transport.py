"""Probabilities that each target gives to its neighbours (TSDS): the published walk in closed form.

Target j has its L_j neighbours at distances d_{j,0} <= d_{j,1} <= ..., each with a density rho. With

    c_{j,k} = sum over k' <= k of 1 / rho_{j,k'}
    g_{j,k} = d_{j,k+1} c_{j,k} - sum over k' <= k of d_{j,k'} / rho_{j,k'}        for k <= L_j - 2

the published algorithm visits all (j, k) by rising c, keeps each target's latest g, and stops at the first
visit where alpha / C x sum_j g_j >= (1 - alpha) M; s is the c of that visit, or the last c if it never
stops. Target j then gives rank k the mass

    (min(s, c_{j,k}) - min(s, c_{j,k-1})) / (M s),      c_{j,-1} = 0, c_{j,L_j-1} = infinity

so that it gives 1/M in all. Two facts make the walk a cumulative sum:

    g_{j,k} - g_{j,k-1} = (d_{j,k+1} - d_{j,k}) c_{j,k} >= 0,

so that the sum of the latest g's after all visits with c <= x is G(x) = sum of those increments, which
never falls; and the masses depend on s alone, not on the order among equal c. Hence s is the smallest
visited c with alpha / C x G(c) >= (1 - alpha) M: a weighted order statistic, found digit by digit over the
bits of c (positive floats sort as integers do) in four passes, without sorting and without holding the
pairs.

Source: Liu, Karbasi and Rekatsinas, TSDS: Data Selection for Task-Specific Model Finetuning (NeurIPS 2024),
sections 3-4 and its KNN-KDE algorithm. Difference: a target that was never visited has c_{j,0} > s; the
published code gives its first rank 1/(M s rho) > 1/M, here it gives 1/M.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

DIGITS = 4
BITS = 16
LARGEST = float(np.finfo(float).max)


@dataclass(frozen=True)
class Ranked:
    """The neighbours of some targets.

    Attributes:
        distances: rising along each target; infinity beyond its last neighbour. [m, L] float64
        inverse_density: 1 / rho of each neighbour; 0 beyond the last. [m, L] float64
        counts: neighbours of each target, at least 1. [m] int64
    """

    distances: np.ndarray
    inverse_density: np.ndarray
    counts: np.ndarray

    @property
    def levels(self) -> np.ndarray:
        """The cumulative inverse densities c. [m, L] float64"""
        return np.cumsum(self.inverse_density, axis=1)


Blocks = Callable[[], Iterable[Ranked]]


@dataclass(frozen=True)
class Stop:
    """Where the walk ends.

    Attributes:
        level: s. reached: whether the stopping rule was met, rather than the end of the neighbours.
    """

    level: float
    reached: bool


def find_stop(blocks: Blocks, alpha: float, C: float) -> Stop:
    """Return the level s at which the walk stops.

    Args:
        blocks: streams all targets; called five times.
        alpha: in [0, 1]; 0 never stops, 1 stops at the first visit.
        C: the scale of the transport cost against the diversity term, positive.
    """
    M = sum(len(block.counts) for block in blocks())

    def met(total: np.ndarray) -> np.ndarray:
        ratio = min(alpha / C, LARGEST)  # a tiny C must not make it infinite: infinity x 0 is no number
        with np.errstate(over="ignore"):
            found: np.ndarray = ratio * total >= (1 - alpha) * M
        return found

    prefix, before, reached = 0, 0.0, True  # leading digits of s; increments of all smaller levels
    for digit in range(DIGITS):
        counts, sums = _histogram(blocks, prefix, digit)
        buckets = np.flatnonzero(counts)
        if not len(buckets):  # no target has a second neighbour: any positive level gives the same masses
            return Stop(1.0, False)
        totals = before + np.cumsum(sums[buckets])
        hits = np.flatnonzero(met(totals))
        if digit == 0:
            reached = len(hits) > 0
        # a bucket's sum and that of its digits differ in the last bit: a bare hit may be its very last digit
        place = int(hits[0]) if len(hits) else len(buckets) - 1
        if place:
            before = float(totals[place - 1])
        prefix = prefix << BITS | int(buckets[place])
    return Stop(float(np.array([prefix], dtype=np.uint64).view(np.float64)[0]), reached)


def _histogram(blocks: Blocks, prefix: int, digit: int) -> tuple[np.ndarray, np.ndarray]:
    """Count the visits below a prefix of their level's bits by the next digit, and sum their increments."""
    counts, sums = np.zeros(1 << BITS, dtype=np.int64), np.zeros(1 << BITS)
    shift = np.uint64(64 - BITS * (digit + 1))
    for levels, increments in _visits(blocks):
        keys = levels.view(np.uint64) >> shift
        inside = keys >> np.uint64(BITS) == np.uint64(prefix)
        low = (keys[inside] & np.uint64((1 << BITS) - 1)).astype(np.int64)
        counts += np.bincount(low, minlength=1 << BITS)
        sums += np.bincount(low, increments[inside], minlength=1 << BITS)
    return counts, sums


def _visits(blocks: Blocks) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the levels of a block's visits and what each adds to the sum of the g's. [visits] each"""
    for block in blocks():
        visited = np.arange(1, block.distances.shape[1]) < block.counts[:, None]  # k + 1 is a neighbour
        levels = block.levels[:, :-1][visited]
        gaps = (block.distances[:, 1:][visited]) - (block.distances[:, :-1][visited])
        yield levels, gaps * levels


def masses(block: Ranked, level: float, M: int) -> np.ndarray:
    """Return the probability that each target gives to each of its neighbours; each row sums to 1/M.

    Args:
        block: some targets. level: s. M: how many targets there are in all.

    Returns:
        Masses, 0 beyond a target's last neighbour. [m, L] float64
    """
    capped = np.minimum(level, block.levels)
    capped[np.arange(len(block.counts)), block.counts - 1] = level  # the last rank takes what is left
    shares = np.diff(capped, axis=1, prepend=0.0) / (M * level)
    shares[np.arange(block.distances.shape[1]) >= block.counts[:, None]] = 0.0
    return shares
