"""The density feature: kernel sums of each pool row over the support, the rows that some target row is near.

The support is every pool row that is among the neighbours of a target row (features/neighbours.py). rho and
the guide's Gaussian density of its rows are kernel sums over the support (neighbours/density.py); rows off
the support have none. The vectors of the support, 4 D bytes each, are in memory. Through cells, the exact
sums of a sample say how much the cells leave out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import Field

from dataflex_pipeline import api
from dataflex_pipeline.features.embedding_params import KernelParams, NeighbourParams, SearchParams
from dataflex_pipeline.neighbours.cells import (
    Layout,
    affordable_on,
    choose_layout,
    sample_places,
    search_device,
    search_ingredients,
    train_cells,
)
from dataflex_pipeline.neighbours.density import Grouped, Sums, kernel_sums
from dataflex_pipeline.neighbours.vectors import gather_vectors
from dataflex_pipeline.schemas import REASON, ROW, ROW_ID, VALID, column

SAMPLE = 64
"""Rows of the support whose exact sums are taken too, where the search goes through cells."""
TARGETS_READ = 256
"""Target rows whose neighbours are in memory at a time."""


SumColumns = dict[str, np.ndarray]
"""Columns of the table over some rows of the support, NaN for null; what is missing is null."""


class Density(api.Feature):
    """Kernel sums of the pool rows that are near the target."""

    schema = pa.schema(
        [
            ROW,
            ROW_ID,
            column(
                "rho",
                pa.float64(),
                "sum of max(0, 1 - d^2/sigma^2) over near rows, itself included; null off support",
            ),
            column(
                "density",
                pa.float64(),
                "mean of exp(-d^2/(2 sigma^2)) over the kde_K nearest; null if not asked for",
            ),
            column("exact_rho", pa.float64(), "rho by exact search; null where not measured"),
            column("search", pa.string(), "how near rows were found: exact, or the cells looked into"),
            VALID,
            REASON,
        ]
    )
    input_columns = ("row", "row_id")

    class Params(SearchParams, KernelParams):
        """Parameters of density."""

        gaussian: bool = Field(False, description="whether the Gaussian density is wanted too")
        neighbours: NeighbourParams = Field(
            default_factory=NeighbourParams,
            exclude=True,
            description="parameters of the target's neighbours",
        )

    uses_model = False
    params: Params

    def needs(self, need: api.Need) -> Mapping[str, api.Need]:
        """Ask for the target's neighbours, and for the pool's embeddings."""
        pool = self.params.neighbours.pool
        return {
            "neighbours": api.Need("neighbours", "target", need.checkpoint, self.params.neighbours),
            "pool": api.Need(pool.feature, "pool", need.checkpoint, pool),
        }

    def ingredients(self) -> dict[str, Any]:
        """Return up to which size an accelerator searches exactly, since that decides what is found."""
        return {**search_ingredients(self.params.search, self.device)}

    @cached_property
    def device(self) -> str:
        """Where exact sums are made."""
        return search_device(self.config.device)

    @contextmanager
    def open(
        self, given: api.FeatureInput, progress: api.Progress
    ) -> Iterator[Callable[[pa.Table], pa.Table]]:
        """Load the support; yield the function from pool rows to their kernel sums."""
        pool = given.tables["pool"]
        rows = support(given.tables["neighbours"], pool.n_rows)
        how = "exact"
        sums_of: Callable[[np.ndarray], SumColumns] = self._flat
        if self.params.sigma > 0:
            vectors = gather_vectors(pool, rows)
            layout = self._layout(vectors)
            how = "exact" if layout is None else str(layout)
            where = f" on {self.device}" if layout is None and self.device != "cpu" else ""
            progress.say(
                f"  density: {len(rows)} of {pool.n_rows} pool rows are near the target ({how}{where})"
            )
            sums_of = (
                self._exactly(vectors) if layout is None else self._through_cells(vectors, layout, progress)
            )

        def compute(part: pa.Table) -> pa.Table:
            first = part.column("row")[0].as_py()
            places = np.arange(*np.searchsorted(rows, [first, first + part.num_rows]))
            columns = {"row": part.column("row"), "row_id": part.column("row_id")}
            sums = sums_of(places)
            for name in ("rho", "density", "exact_rho"):
                columns[name] = _over_part(sums.get(name, np.nan), rows[places] - first, part.num_rows)
            columns["search"] = pa.array([how] * part.num_rows)
            embedded = pool.rows(first, first + part.num_rows, ["valid", "reason"])
            columns |= {name: embedded.column(name) for name in ("valid", "reason")}
            return pa.table([columns[name] for name in self.schema.names], schema=self.schema)

        yield compute

    def _layout(self, vectors: np.ndarray) -> Layout | None:
        n, dimensions = vectors.shape
        wanted, given = min(self.params.kde_K, n), self.params
        affordable = affordable_on(self.device)
        return choose_layout(given.search, n, n, dimensions, wanted, given.nlist, given.nprobe, affordable)

    def _flat(self, places: np.ndarray) -> SumColumns:
        return {"rho": np.ones(len(places))}

    def _exactly(self, vectors: np.ndarray) -> Callable[[np.ndarray], SumColumns]:
        """Return the function from places in the support to their sums, each part worked out by itself."""
        if self.device != "cpu":
            from dataflex_pipeline.neighbours.accelerated import DeviceKernel

            given = self.params
            kernel = DeviceKernel(vectors, given.sigma, given.kde_K, given.gaussian, self.device)
            return lambda places: _columns(kernel.sums(places))
        grouped = Grouped.whole(vectors)

        def sums_of(places: np.ndarray) -> SumColumns:
            return _columns(self._sums(grouped, places))

        return sums_of

    def _through_cells(
        self, vectors: np.ndarray, layout: Layout, progress: api.Progress
    ) -> Callable[[np.ndarray], SumColumns]:
        """Work out the whole support cell by cell; return the function that cuts the parts out of it."""
        n = len(vectors)
        wanted = min(SAMPLE, n)
        sampled = np.arange(wanted) * n // wanted
        exact = np.full(n, np.nan)
        exact[sampled] = self._sums(Grouped.whole(vectors), sampled).rho
        cells = train_cells(vectors[sample_places(n, layout)], layout)
        grouped = Grouped.by_cell(vectors, cells)
        progress.start("density of the support", n, "rows")
        sums = self._sums(grouped, None, progress.advance)
        progress.finish()
        found = {"exact_rho": exact}
        for name, values in _columns(sums).items():
            found[name] = np.empty(n)
            found[name][grouped.order] = values
        return lambda places: {name: values[places] for name, values in found.items()}

    def _sums(
        self, grouped: Grouped, places: np.ndarray | None, done: Callable[[int], None] = lambda count: None
    ) -> Sums:
        given = self.params
        return kernel_sums(
            grouped, given.sigma, given.kde_K, gaussian=given.gaussian, places=places, done=done
        )


def _columns(sums: Sums) -> SumColumns:
    return {"rho": sums.rho} | ({} if sums.density is None else {"density": sums.density})


def support(neighbours: api.BlockTable, n_pool: int) -> np.ndarray:
    """Return the pool rows that are a neighbour of some target row, rising. [S] int64

    Args:
        neighbours: the target's neighbours. n_pool: rows of the pool.
    """
    member = np.zeros(n_pool, dtype=bool)
    for block in neighbours.blocks(["neighbours"], TARGETS_READ):
        member[block.column("neighbours").flatten().to_numpy()] = True
    return np.flatnonzero(member)


def _over_part(values: np.ndarray | float, places: np.ndarray, n_rows: int) -> pa.Array:
    """Return values at some places of a part, null at the others and where NaN. [n_rows]"""
    full = np.full(n_rows, np.nan)
    full[places] = values
    return pa.array(full, mask=np.isnan(full))
