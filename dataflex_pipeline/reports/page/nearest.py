"""The target rows that rows of a report's page are most like, from the vectors that the run has stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dataflex_pipeline.pipeline.row_likeness import Pair, compared, nearest_target_rows
from dataflex_pipeline.store.parts import PartedTable
from dataflex_pipeline.store.run import RunFolder

NEAREST = 3
PAIRS = 3
"""Pairs of tables that are compared, the last ones, the last one first."""
MOST_BYTES = 2 << 30
"""Bytes of a table of vectors; a larger one is not read for some rows spread all over it."""
TEXT = 400
"""Characters of a target row."""
WHAT = {"embeddings": "by embedding", "gradients": "by gradient"}


@dataclass(frozen=True)
class Nearest:
    """Target rows that rows of the pool are most like.

    Attributes:
        titles: of each comparison.
        by_row: row of the pool -> of each comparison the target rows and cosines, the nearest first.
        targets: target row -> its source, group and the beginning of its text.
        notices: what was not compared.
    """

    titles: tuple[str, ...]
    by_row: dict[int, list[list[tuple[int, float]]]]
    targets: dict[int, dict[str, Any]]
    notices: tuple[str, ...]


def nearest(run: RunFolder, rows: Sequence[int]) -> Nearest:
    """Return the target rows that some rows of the pool are most like.

    Args:
        run: on disk. rows: of the pool.
    """
    notices: list[str] = []
    pairs = list(compared(run, notices).items())[: -PAIRS - 1 : -1]
    by_row: dict[int, list[list[tuple[int, float]]]] = {row: [] for row in rows}
    titles = []
    for pair, used_by in pairs if rows else ():
        title = " ".join(
            ["Nearest target rows", WHAT[pair.kind], *([f"({'; '.join(used_by)})"] if used_by else [])]
        )
        if _bytes(pair) > MOST_BYTES:
            notices.append(
                f"{title}: not looked up in {_bytes(pair) >> 30} GiB of vectors; "
                "`dataflex inspect RUN --row N` does it."
            )
            continue
        titles.append(title)
        found, cosines = nearest_target_rows(pair, np.array(rows), NEAREST)
        for row, targets, values in zip(rows, found.tolist(), cosines.tolist(), strict=True):
            by_row[row].append([(t, round(v, 4)) for t, v in zip(targets, values, strict=True) if t >= 0])
    named = sorted({target for lists in by_row.values() for pairs_of in lists for target, _ in pairs_of})
    return Nearest(tuple(titles), by_row, _targets(run, named), tuple(notices))


def _bytes(pair: Pair) -> int:
    return sum(file.stat().st_size for file in PartedTable.open(pair.pool).files)


def _targets(run: RunFolder, rows: Sequence[int]) -> dict[int, dict[str, Any]]:
    if not rows:
        return {}
    taken = PartedTable.open(run.split("target")).take(np.array(rows), ["row", "source", "group", "messages"])
    return {
        line["row"]: {
            "source": line["source"],
            "group": line["group"],
            "turns": [
                [turn["role"], turn["content"][:TEXT], len(turn["content"])] for turn in line["messages"]
            ],
        }
        for line in taken.to_pylist()
    }
