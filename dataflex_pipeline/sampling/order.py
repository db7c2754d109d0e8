"""That line n of a table is row n, without which what is read side by side does not belong together."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow.parquet as pq

from dataflex_pipeline.api import BlockTable
from dataflex_pipeline.errors import CorruptError
from dataflex_pipeline.store.parts import PartedTable
from dataflex_pipeline.store.tables import TableFile


def check_order(table: BlockTable) -> None:
    """Check that the lines of a table are in the order of their rows, as far as that costs nothing.

    Of a file, the smallest and largest row of each row group are looked at, which stand in its footer; the
    parts of a parted table are counted by its manifest; other tables are looked at row by row.

    Args:
        table: with the column ``row``.

    Raises:
        CorruptError: they are not.
    """
    if isinstance(table, PartedTable):
        return
    start = 0
    for n_rows, first in _runs(table):
        if first != start:
            raise CorruptError(
                f"{table.path if isinstance(table, TableFile) else 'The table'} does not hold row {start} at "
                f"line {start}.",
                "Line n of a table is row n of the pool; this one was reordered, or belongs to another pool.",
                "Make the scores and probabilities of this round again (--overwrite).",
            )
        start += n_rows


def _runs(table: BlockTable) -> Iterator[tuple[int, int | None]]:
    """Yield the number of lines of each piece and its first row; None where they do not count up from it."""
    if not isinstance(table, TableFile):
        for block in table.blocks(["row"]):
            rows = block.column(0).to_numpy(zero_copy_only=False)
            if len(rows):
                yield len(rows), int(rows[0]) if (np.diff(rows) == 1).all() else None
        return
    metadata = pq.read_metadata(table.path)
    column = metadata.schema.names.index("row")
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        if not group.num_rows:  # of a table without rows
            continue
        seen = group.column(column).statistics
        counts_up = seen is not None and seen.has_min_max and seen.max - seen.min == group.num_rows - 1
        yield group.num_rows, seen.min if counts_up else None
