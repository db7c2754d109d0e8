"""Leaks: rows of the target that are in the pool too."""

from __future__ import annotations

from collections.abc import Callable

import pyarrow as pa
import pyarrow.compute as pc

from dataflex_pipeline.api import BlockTable

LEAKS_SHOWN = 3


def say_leaks(target: BlockTable, pool: BlockTable, say: Callable[[str], None]) -> None:
    """Name target rows that are also in the pool: selecting them would be training on the target."""
    by_id = {
        row_id.as_py(): row.as_py()
        for block in target.blocks(["row", "row_id"])
        for row, row_id in zip(block.column("row"), block.column("row_id"), strict=True)
    }
    ids = pa.array(list(by_id), pa.string())
    leaks: list[tuple[int, int]] = []
    for block in pool.blocks(["row", "row_id"]):
        found = block.filter(pc.is_in(block.column("row_id"), ids))
        leaks += [
            (by_id[i.as_py()], r.as_py())
            for r, i in zip(found.column("row"), found.column("row_id"), strict=True)
        ]
    if leaks:
        shown = ", ".join(f"target row {t} = pool row {p}" for t, p in leaks[:LEAKS_SHOWN])
        more = ", ..." if len(leaks) > LEAKS_SHOWN else ""
        say(f"{len(leaks)} rows of the pool are in the target too: {shown}{more}")
