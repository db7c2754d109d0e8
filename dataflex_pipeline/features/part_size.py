"""The number of rows of a part where ``rows_per_part`` is auto: by the work of a row, and never by the clock.

A part is what a kill can cost and what a launch gives to a process, so it should take some 20 to 60 seconds.
Its rows share batches, so that its size decides the last digits of the table; a size that was measured would
make another table each time. It is therefore counted: the largest power of two, up to MOST rows, whose
floating-point operations are at most BUSY for the kind of device, from the size of the model and the mean
length of the rows. A table that then has fewer than PARTS parts gets smaller ones, down to an eighth of that
work, so that the processes of a launch have something to share. The number of processes decides nothing.
"""

from __future__ import annotations

from typing import Literal

from dataflex_pipeline.api import Feature
from dataflex_pipeline.declared.feature import row_flops
from dataflex_pipeline.store.parts import PartedTable

MOST = 1024
BUSY_CPU, BUSY_ACCELERATOR = 8e12, 1e16
"""FLOPs of some 40 s at 2e11 a second, what two cores do in fp32, and of 25 s at 4e14, an H200's in bf16."""
PARTS, LEAST_SHARE = 32, 1 / 8


def choose_rows(feature: Feature, table: PartedTable) -> int:
    """Return the rows per part of a feature's table over some prepared rows."""
    if not table.n_rows or "n_tokens" not in table.schema.names:
        return MOST
    work = row_flops(feature, table.sum("n_tokens") / table.n_rows)
    if not work:
        return MOST
    from dataflex_pipeline.models.base import resolve_device

    on_cpu = resolve_device(feature.config.device) == "cpu"
    return rows_for(work, table.n_rows, BUSY_CPU if on_cpu else BUSY_ACCELERATOR)


def rows_per_part(feature: Feature, table: PartedTable) -> int:
    """Return the rows per part that the feature's configuration says, auto decided for a table."""
    rows: int | Literal["auto"] = feature.config.rows_per_part
    return choose_rows(feature, table) if rows == "auto" else rows


def rows_for(work: float, n_rows: int, busy: float) -> int:
    """Return the rows per part: see the module.

    Args:
        work: FLOPs of a row. n_rows: of the table. busy: FLOPs of a part at most.
    """
    rows = MOST
    while rows > 1 and rows * work > busy:
        rows //= 2
    while rows > 1 and n_rows < PARTS * rows and rows * work > LEAST_SHARE * busy:
        rows //= 2
    return rows
