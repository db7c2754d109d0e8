"""Shares of the pool: the target's mass, streamed from its neighbours through the transport.

A table of neighbours has, per target row, ``neighbours`` (pool rows, nearest first), ``distances``, ``valid``
and how they were found; a table of density has ``rho`` and more per pool row, null off the support.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from dataflex_pipeline.api import BlockTable
from dataflex_pipeline.neighbours.transport import Ranked, Stop, find_stop, masses

TARGETS_READ = 256
"""Target rows whose neighbours are in memory at a time: 20 MB at 5000 neighbours, and as much per step."""


@dataclass(frozen=True)
class Near:
    """The neighbours of some target rows.

    Attributes:
        targets: the target rows, all with at least one neighbour. [m] int64
        rows: their neighbours in the pool, nearest first; -1 beyond the last. [m, L] int64
        distances: to them; infinity beyond the last. [m, L] float64
        counts: neighbours of each. [m] int64
    """

    targets: np.ndarray
    rows: np.ndarray
    distances: np.ndarray
    counts: np.ndarray

    @classmethod
    def blocks(cls, table: BlockTable) -> Iterator[Near]:
        """Stream the valid rows of a table of neighbours."""
        for block in table.blocks(["row", "neighbours", "distances", "valid"], TARGETS_READ):
            block = block.filter(block.column("valid"))
            if not block.num_rows:
                continue
            counts = block.column("neighbours").value_lengths().to_numpy()
            there = np.arange(counts.max()) < counts[:, None]
            rows = np.full(there.shape, -1, dtype=np.int64)
            rows[there] = block.column("neighbours").flatten().to_numpy()
            distances = np.full(there.shape, np.inf)
            distances[there] = block.column("distances").flatten().to_numpy()
            yield cls(block.column("row").to_numpy(), rows, distances, counts)

    def ranked(self, rho: np.ndarray) -> Ranked:
        """Return what the transport works on. rho: density of every pool row. [N]"""
        inverse = np.zeros(self.rows.shape)
        there = self.rows >= 0
        inverse[there] = 1 / rho[self.rows[there]]
        return Ranked(self.distances, inverse, self.counts)


@dataclass(frozen=True)
class Crowd:
    """The density table in memory; NaN where null.

    Attributes:
        rho, density, exact_rho: its columns. [N] float64
        n_valid: pool rows with an embedding. search: how near rows were found.
    """

    rho: np.ndarray
    density: np.ndarray
    exact_rho: np.ndarray
    n_valid: int
    search: str

    @classmethod
    def read(cls, table: BlockTable) -> Crowd:
        """Read the table."""
        names = ("rho", "density", "exact_rho")
        arrays = {name: np.full(table.n_rows, np.nan) for name in names}
        start, n_valid, search = 0, 0, ""
        for block in table.blocks([*names, "valid", "search"]):
            for name in names:
                arrays[name][start : start + block.num_rows] = block.column(name).to_numpy(
                    zero_copy_only=False
                )
            start += block.num_rows
            n_valid += block.column("valid").true_count
            search = block.column("search")[0].as_py()
        return cls(arrays["rho"], arrays["density"], arrays["exact_rho"], n_valid, search)

    @property
    def support(self) -> np.ndarray:
        """The rows that are near the target, rising. [S] int64"""
        return np.flatnonzero(~np.isnan(self.rho))


@dataclass(frozen=True)
class Spread:
    """What the transport gave every pool row.

    Attributes:
        mass: sums to 1. [N] float64
        targets: how many target rows give it mass. [N] int32
        nearest: the target row that it is nearest to, ties by target row; -1 off the support. [N] int64
        distance: to it; infinity off the support. [N] float64
        stop: where the transport ended.
    """

    mass: np.ndarray
    targets: np.ndarray
    nearest: np.ndarray
    distance: np.ndarray
    stop: Stop


def spread_target(neighbours: BlockTable, rho: np.ndarray, alpha: float, C: float) -> Spread:
    """Give each target row's 1/M to its neighbours.

    Args:
        neighbours: of the target rows, at least one of them valid.
        rho: density of every pool row; of rows off the support it is never read. [N] float64
        alpha, C: as in ``transport``.
    """
    n = len(rho)
    M = sum(len(near.targets) for near in Near.blocks(neighbours))
    stop = find_stop(lambda: (near.ranked(rho) for near in Near.blocks(neighbours)), alpha, C)
    mass, targets = np.zeros(n), np.zeros(n, dtype=np.int32)
    nearest, distance = np.full(n, -1, dtype=np.int64), np.full(n, np.inf)
    for near in Near.blocks(neighbours):
        given = masses(near.ranked(rho), stop.level, M)[near.rows >= 0]
        rows = near.rows[near.rows >= 0]
        np.add.at(mass, rows, given)
        np.add.at(targets, rows[given > 0], 1)
        keep_nearest(nearest, distance, near)
    return Spread(mass, targets, nearest, distance, stop)


def keep_nearest(nearest: np.ndarray, distance: np.ndarray, near: Near) -> None:
    """Update, in place, every pool row's nearest target row so far; ties go to the smaller target row."""
    there = near.rows >= 0
    rows, distances = near.rows[there], near.distances[there]
    targets = np.repeat(near.targets, near.counts)
    before = distance[rows]
    np.minimum.at(distance, rows, distances)
    better = (distances == distance[rows]) & (distances < before)
    nearest[rows[better]] = np.iinfo(np.int64).max
    np.minimum.at(nearest, rows[better], targets[better])


def say_search(neighbours: BlockTable, crowd: Crowd, say: Callable[[str], None]) -> None:
    """Say which target rows were left out, and what the searches missed, where it was measured.

    Args:
        neighbours: of the target rows. crowd: their density. say: prints a line.
    """
    found, how, n_invalid = [], "", 0
    for block in neighbours.blocks(["recall", "search", "valid"]):
        found.append(block.column("recall").to_numpy(zero_copy_only=False).astype(np.float64))
        how = block.column("search")[0].as_py()
        n_invalid += block.num_rows - block.column("valid").true_count
    if n_invalid:
        say(f"{n_invalid} target rows have no neighbours and are left out (the table of neighbours says why)")
    recalls = np.concatenate(found)
    recalls = recalls[~np.isnan(recalls)]
    if len(recalls):
        say(
            f"neighbours ({how}): recall {recalls.mean():.4f} on {len(recalls)} target rows, "
            f"lowest {recalls.min():.4f}"
        )
    places = ~np.isnan(crowd.exact_rho)
    if places.any():
        shares = crowd.rho[places] / crowd.exact_rho[places]
        say(
            f"density ({crowd.search}): {shares.mean():.4f} of the exact one on {len(shares)} rows, "
            f"lowest {shares.min():.4f}"
        )
