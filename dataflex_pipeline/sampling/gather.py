"""Values of a few rows of a large table."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from dataflex_pipeline.api import BlockTable
from dataflex_pipeline.sampling.uniforms import Integers
from dataflex_pipeline.store.parts import PartedTable
from dataflex_pipeline.store.row_ids import read_row_ids


def gather(table: BlockTable, rows: Integers, column: str) -> pa.ChunkedArray:
    """Return a column's values of some rows, in one pass over that column.

    Args:
        table: line n is row n.
        rows: row numbers, in any order, repeats allowed. [n]
        column: its name.

    Returns:
        The values in the order of ``rows``. [n]
    """
    wanted, back = np.unique(rows, return_inverse=True)
    pieces, start = [], 0
    for block in table.blocks([column]):
        stop = start + block.num_rows
        places = wanted[np.searchsorted(wanted, start) : np.searchsorted(wanted, stop)] - start
        pieces.append(block.column(0).take(pa.array(places)))
        start = stop
    return pa.chunked_array(pieces).take(pa.array(back))


def gather_row_ids(pool: BlockTable, rows: Integers) -> pa.ChunkedArray:
    """Return the row ids of some rows: of a prepared pool from the file that it has for that.

    Args:
        pool: with the column ``row_id``. rows: as for ``gather``.

    Raises:
        CorruptError: that file is not the pool's.
    """
    return read_row_ids(pool, rows) if isinstance(pool, PartedTable) else gather(pool, rows, "row_id")
