"""K-means cells (an inverted file, IVF): regions to search in place of the whole table.

Every vector belongs to the cell of its nearest centroid; a query looks only into the ``nprobe`` cells whose
centroids are nearest to it. What it misses is measured, never assumed (see ``search`` and ``density``).

Cost, in multiply-adds, of q queries against n vectors of D dimensions:

    exact  q n D
    IVF    n nlist D   (each vector finds its cell)  +  q nlist D  (each query finds its cells)
           + SCAN q n nprobe / nlist D  (what the cells hold)  +  ITERATIONS SAMPLE nlist^2 D  (k-means)

``auto`` searches exactly while that is affordable or the cheaper of the two: with few queries, assigning
every vector to a cell costs more than comparing it with all of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from dataflex_pipeline.seeds import derive_seed

if TYPE_CHECKING:
    import faiss

Search = Literal["auto", "exact", "ivf"]

AFFORDABLE = 4e12
"""Multiply-adds that are spent on an exact search without asking: about a minute on two cores."""
ACCELERATED = 4e15
"""The same on an accelerator: minutes at 50 TFLOP/s, for 3 million vectors of 384 with each other."""
SAMPLE = 64
"""Vectors per cell that k-means sees."""
ITERATIONS = 10
SCAN = 4
"""How much dearer a comparison inside a cell is than one inside a large matrix product."""
LEAST_PROBED = 16
SEED = derive_seed(0, "neighbours", "cells") % 2**31
"""Of k-means: one stream for every run, so that equal vectors give equal cells."""


@dataclass(frozen=True)
class Layout:
    """How many cells there are and how many of them a query looks into."""

    nlist: int
    nprobe: int

    def __str__(self) -> str:
        return f"ivf, {self.nprobe} of {self.nlist} cells"


@dataclass(frozen=True)
class Cells:
    """Trained cells.

    Attributes:
        centroids: one per cell. [nlist, D] float32
        nprobe: cells that a query looks into.
    """

    centroids: np.ndarray
    nprobe: int

    def quantizer(self) -> faiss.IndexFlatL2:
        """Return faiss's exact search over the centroids."""
        import faiss

        index = faiss.IndexFlatL2(self.centroids.shape[1])
        index.add(self.centroids)
        return index


def choose_layout(
    search: Search,
    queries: int,
    vectors: int,
    dimensions: int,
    wanted: int,
    nlist: int | None,
    nprobe: int | None,
    affordable: float = AFFORDABLE,
) -> Layout | None:
    """Return the cells to search in, or None for an exact search.

    Args:
        search: what was asked for.
        queries, vectors, dimensions: size of the search.
        wanted: nearest neighbours per query.
        nlist: cells; by default the square root of ``vectors``. Never more than there are vectors.
        nprobe: cells per query; by default those that hold about four times what is wanted, at least 16.
            Never more than ``nlist``.
        affordable: multiply-adds up to which auto searches exactly.
    """
    cells = min(nlist or max(1, round(math.sqrt(vectors))), vectors)
    probed = min(nprobe or max(LEAST_PROBED, math.ceil(4 * wanted * cells / vectors)), cells)
    if search == "exact" or (
        search == "auto"
        and (
            queries * vectors * dimensions <= affordable or _exact_is_better(queries, vectors, cells, probed)
        )
    ):
        return None
    return Layout(cells, probed)


def search_device(setting: str) -> str:
    """Return the torch device that exact searches run on: an accelerator where there is one, or cpu.

    Apple's GPUs have no float64, which sums are made in, and leave it to the CPU.

    Args:
        setting: ``device`` of the configuration.
    """
    if setting == "cpu":
        return setting
    from dataflex_pipeline.models.base import resolve_device

    device = resolve_device(setting)
    return "cpu" if device == "mps" else device


def affordable_on(device: str) -> float:
    """Return the multiply-adds of an exact search that ``search: auto`` does not shrink from on a device."""
    return AFFORDABLE if device == "cpu" else ACCELERATED


def search_ingredients(search: Search, device: str) -> dict[str, float]:
    """Return what of the device decides the numbers: how large a search ``auto`` does exactly."""
    return {} if search != "auto" or device == "cpu" else {"exact_up_to": ACCELERATED}


def _exact_is_better(queries: int, vectors: int, nlist: int, nprobe: int) -> bool:
    exact = queries * vectors
    assign = (vectors + queries) * nlist
    scan = SCAN * queries * vectors * nprobe / nlist
    train = ITERATIONS * min(vectors, SAMPLE * nlist) * nlist
    return exact <= assign + scan + train


def train_cells(sample: np.ndarray, layout: Layout) -> Cells:
    """Find cells by k-means, the same for the same sample.

    Args:
        sample: vectors, at least ``nlist``. [n, D] float32
        layout: how many cells.
    """
    import faiss

    kmeans = faiss.Kmeans(
        sample.shape[1],
        layout.nlist,
        niter=ITERATIONS,
        seed=SEED,
        max_points_per_centroid=max(SAMPLE, -(-len(sample) // layout.nlist)),
        min_points_per_centroid=1,
    )
    kmeans.train(np.ascontiguousarray(sample))
    return Cells(np.array(kmeans.centroids, dtype=np.float32), layout.nprobe)


def sample_places(n: int, layout: Layout) -> np.ndarray:
    """Return which of n vectors k-means sees: evenly spread, ``SAMPLE`` per cell. [n_sample] int64"""
    wanted = min(n, SAMPLE * layout.nlist)
    return np.arange(wanted, dtype=np.int64) * n // wanted
