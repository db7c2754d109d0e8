"""The nearest pool rows of every target row, by embeddings: what TSDS spreads its probability over.

One line per target row: its max_K nearest valid pool rows and their distances, nearest first, ties by row
(neighbours/search.py). Each part of the target reads the pool's embeddings once, block by block. Through
cells (neighbours/cells.py) an exact search for a sample of each part's rows says what share of the true
neighbours was found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from dataflex_pipeline import api
from dataflex_pipeline.errors import DataError
from dataflex_pipeline.features.embedding_params import NeighbourParams
from dataflex_pipeline.neighbours.cells import (
    Cells,
    affordable_on,
    choose_layout,
    search_device,
    search_ingredients,
)
from dataflex_pipeline.neighbours.search import Found, nearest, recall, table_cells
from dataflex_pipeline.neighbours.vectors import block_vectors, count_valid, dimension
from dataflex_pipeline.schemas import REASON, ROW, ROW_ID, VALID, column

RECALL_SAMPLE = 32
"""Rows of each part that are searched exactly too, where the search goes through cells."""


class Neighbours(api.Feature):
    """The nearest pool rows of every target row."""

    schema = pa.schema(
        [
            ROW,
            ROW_ID,
            column("neighbours", pa.list_(pa.int64()), "nearest valid pool rows, nearest first, ties by row"),
            column(
                "distances", pa.list_(pa.float64()), "their Euclidean distances on the unit sphere, 0 to 2"
            ),
            column("search", pa.string(), "how they were found: exact, or the cells looked into"),
            column("recall", pa.float64(), "share of the true neighbours found; null where not measured"),
            VALID,
            REASON,
        ]
    )
    input_columns = ("row", "row_id", "valid", "reason")

    Params = NeighbourParams
    uses_model = False
    params: NeighbourParams

    def needs(self, need: api.Need) -> Mapping[str, api.Need]:
        """Ask for the embeddings of pool and target."""
        pool, target = self.params.pool, self.params.target
        return {
            "pool": api.Need(pool.feature, "pool", need.checkpoint, pool),
            "target": api.Need(target.feature, "target", need.checkpoint, target),
        }

    def ingredients(self) -> dict[str, Any]:
        """Return up to which size an accelerator searches exactly, since that decides what is found."""
        return {**search_ingredients(self.params.search, self.device)}

    @cached_property
    def device(self) -> str:
        """Where an exact search runs."""
        return search_device(self.config.device)

    @contextmanager
    def open(
        self, given: api.FeatureInput, progress: api.Progress
    ) -> Iterator[Callable[[pa.Table], pa.Table]]:
        """Train the cells where there are any; yield the function from target rows to their neighbours."""
        pool, target = given.tables["pool"], given.tables["target"]
        check_dimensions(pool, target)
        n_pool = count_valid(pool)
        k = min(self.params.max_K, n_pool)
        layout = choose_layout(
            self.params.search,
            count_valid(target),
            n_pool,
            dimension(pool),
            k,
            self.params.nlist,
            self.params.nprobe,
            affordable_on(self.device),
        )
        cells = None if layout is None else table_cells(pool, n_pool, layout)
        how = "exact" if layout is None else str(layout)
        where = f" on {self.device}" if layout is None and self.device != "cpu" else ""
        progress.say(f"  neighbours: {k} of {n_pool} pool rows per target row ({how}{where})")

        def compute(rows: pa.Table) -> pa.Table:
            first = rows.column("row")[0].as_py()
            embedded = target.rows(first, first + rows.num_rows, ["embedding", "valid", "reason"])
            return self._table(rows, embedded.combine_chunks(), pool, k, cells, how)

        yield compute

    def _table(
        self, rows: pa.Table, embedded: pa.Table, pool: api.BlockTable, k: int, cells: Cells | None, how: str
    ) -> pa.Table:
        valid = embedded.column("valid").to_numpy(zero_copy_only=False)
        vectors = np.zeros((0, dimension(pool)), dtype=np.float32)
        if valid.any():
            vectors = np.ascontiguousarray(block_vectors(embedded.to_batches()[0])[valid])
        found = nearest(vectors, pool, k, cells, self.device)
        kept = valid.copy()
        kept[valid] = found.counts > 0
        reason = embedded.column("reason").to_pylist()
        for position in np.flatnonzero(valid & ~kept):
            reason[position] = f"no pool row in the cells looked into ({how})"
        shares = np.full(len(valid), np.nan)
        if cells is not None:
            shares[valid] = sampled_recall(vectors, pool, found, self.device)
        columns = {
            "row": rows.column("row"),
            "row_id": rows.column("row_id"),
            "neighbours": _ragged(found.rows, found, valid, kept),
            "distances": _ragged(found.distances, found, valid, kept),
            "search": pa.array([how] * len(valid)),
            "recall": pa.array(shares, mask=np.isnan(shares)),
            "valid": pa.array(kept),
            "reason": pa.array(reason, pa.string()),
        }
        return pa.table([columns[name] for name in self.schema.names], schema=self.schema)


def check_dimensions(pool: api.BlockTable, target: api.BlockTable) -> None:
    """Check that pool and target can be compared.

    Raises:
        DataError: their vectors differ in length.
    """
    sizes = dimension(pool), dimension(target)
    if sizes[0] != sizes[1]:
        raise DataError(
            f"The pool's embeddings have {sizes[0]} dimensions, the target's {sizes[1]}.",
            "A distance is between vectors of the same length, made by the same model.",
            "Embed both with the same model: check embeddings and query_embeddings.",
        )


def sampled_recall(
    vectors: np.ndarray, pool: api.BlockTable, found: Found, device: str = "cpu"
) -> np.ndarray:
    """Return the recall of an even sample of targets, NaN for the others. [m] float64

    Args:
        vectors: of the targets. [m, D] float32
        pool: embeddings that were searched. found: what was found for the targets.
        device: where the exact search for the sample runs.
    """
    shares = np.full(len(vectors), np.nan)
    wanted = min(RECALL_SAMPLE, len(vectors))
    if wanted:
        places = np.arange(wanted) * len(vectors) // wanted
        truth = nearest(vectors[places], pool, found.rows.shape[1], None, device)
        shares[places] = recall(Found(found.rows[places], found.distances[places]), truth)
    return shares


def _ragged(values: np.ndarray, found: Found, valid: np.ndarray, kept: np.ndarray) -> pa.Array:
    """Return lists of what was found, without the places where nothing was; null where the row has none."""
    lengths = np.zeros(len(valid), dtype=np.int64)
    lengths[valid] = found.counts
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    flat = pa.array(values[found.rows >= 0])
    return pa.ListArray.from_arrays(pa.array(offsets), flat, mask=pa.array(~kept))
