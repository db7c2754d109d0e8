"""A selection in short: how many of the pool's rows were chosen, by source and by length."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.compute as pc

from dataflex_pipeline.store.parquet import read_whole
from dataflex_pipeline.store.parts import PartedTable


@dataclass(frozen=True)
class Lengths:
    """The tokens (prompt and response) of some rows: the least, the quartiles, and the most."""

    least: int
    lower: float
    median: float
    upper: float
    most: int

    @classmethod
    def of(cls, tokens: np.ndarray) -> Lengths:
        """Sum up the tokens of rows. [n], at least one"""
        lower, median, upper = np.quantile(tokens, [0.25, 0.5, 0.75])
        return cls(int(tokens.min()), float(lower), float(median), float(upper), int(tokens.max()))


@dataclass(frozen=True)
class Chosen:
    """A selection beside the pool that it was made from.

    Attributes:
        sources: name, valid rows of the pool, and rows selected, most selected first.
        pool: lengths of the pool's valid rows. selected: of the rows selected.
    """

    sources: Sequence[tuple[str, int, int]]
    pool: Lengths
    selected: Lengths

    @property
    def n_rows(self) -> int:
        """Rows selected, those that were drawn several times counted as often."""
        return sum(selected for _, _, selected in self.sources)


def chosen(pool: PartedTable, selection: Path) -> Chosen:
    """Sum a selection up.

    Args:
        pool: the prepared rows. selection: the table, with ``row``.
    """
    there: Counter[str] = Counter()
    pieces = []
    for block in pool.blocks(["source", "n_tokens", "valid"]):
        valid = block.filter(block.column("valid"))
        for each in pc.value_counts(valid.column("source")).to_pylist():
            there[each["values"]] += each["counts"]
        pieces.append(valid.column("n_tokens").to_numpy())
    rows = read_whole(selection, ["row"])["row"].to_numpy()
    taken = pool.take(rows, ["source", "n_tokens"])
    counts = Counter(
        {each["values"]: each["counts"] for each in pc.value_counts(taken["source"]).to_pylist()}
    )
    names = sorted(there, key=lambda name: (-counts[name], name))
    return Chosen(
        [(name, there[name], counts[name]) for name in names],
        Lengths.of(np.concatenate(pieces)),
        Lengths.of(taken["n_tokens"].to_numpy()),
    )
