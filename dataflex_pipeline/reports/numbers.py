"""Spread of the numbers of a column: counts, quantiles, histogram; a few passes, bounded memory.

Quantiles are exact: those of ``store.ranks``, bit by bit, as methods take them. DuckDB finds the order
statistics of up to HELD_ROWS values five times as fast, and holds them in memory; more are streamed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dataflex_pipeline.reports.query import dictionaries, quoted
from dataflex_pipeline.store.ranks import interpolated, order_statistics

if TYPE_CHECKING:
    from duckdb import DuckDBPyRelation

HELD_ROWS = 30_000_000
"""Values that are sorted in memory."""
BLOCK_ROWS = 65536
SHARES = (0.005, 0.05, 0.25, 0.5, 0.75, 0.95, 0.995)
OUTER = (SHARES[0], SHARES[-1])
BINS = 16


@dataclass(frozen=True)
class Spread:
    """How the finite values of a column are spread.

    Attributes:
        column: its name. n: finite values. missing: nulls, NaN and infinities.
        minimum, maximum, mean, std: of the finite values; NaN where there is none. std is the population's.
        quantiles: share -> value.
    """

    column: str
    n: int
    missing: int
    minimum: float
    maximum: float
    mean: float
    std: float
    quantiles: dict[float, float]

    def plain(self) -> dict[str, Any]:
        """Return the spread for JSON; what does not exist is null."""
        numbers = {name: getattr(self, name) for name in ("minimum", "maximum", "mean", "std")}
        return {
            "column": self.column,
            "n": self.n,
            "missing": self.missing,
            **{name: None if math.isnan(value) else value for name, value in numbers.items()},
            "quantiles": {f"{share:g}": value for share, value in self.quantiles.items()},
        }


@dataclass(frozen=True)
class Bin:
    """One bar of a histogram: ``low`` <= value < ``high``, the last one with its upper end.

    Attributes:
        low, high: its ends. count: values in it.
    """

    low: float
    high: float
    count: int


def spread(relation: DuckDBPyRelation, column: str, held_rows: int = HELD_ROWS) -> Spread:
    """Return how a numeric column is spread.

    Args:
        relation: the table. column: its numeric column.
        held_rows: largest number of values that are held in memory.
    """
    value = f"{quoted(column)}::double"
    finite = relation.project(f"case when isfinite({value}) then {value} end as x")
    counted = finite.aggregate("count(x), count(*) - count(x), min(x), max(x), avg(x), stddev_pop(x)")
    n, missing, *numbers = counted.fetchall()[0]
    low, high, mean, std = (math.nan if number is None else float(number) for number in numbers)
    find = _held if n <= held_rows else _streamed
    found = interpolated(n, SHARES, lambda ranks: find(finite, n, ranks)) if n else []
    quantiles = dict(zip(SHARES, found, strict=False))
    return Spread(column, n, missing, low, high, mean, std, quantiles)


def _held(finite: DuckDBPyRelation, n: int, ranks: Sequence[int]) -> list[float]:
    """Return order statistics of the column x; the middle of a rank's share finds it, whatever is rounded."""
    shares = [(rank + 0.5) / n for rank in ranks]
    found: list[float] = finite.aggregate(f"quantile_disc(x, {shares})").fetchall()[0][0]
    return found


def _streamed(finite: DuckDBPyRelation, n: int, ranks: Sequence[int]) -> list[float]:
    def values() -> Iterable[tuple[np.ndarray, np.ndarray]]:
        for block in finite.filter("x is not null").fetch_arrow_reader(BLOCK_ROWS):
            numbers = block.column("x").to_numpy()
            yield np.arange(len(numbers)), numbers

    return order_statistics(values, ranks)


def histogram(relation: DuckDBPyRelation, found: Spread, bins: int = BINS) -> list[Bin]:
    """Return the histogram of a column.

    Bars of equal width; where the outermost 1 % of the values would take more than half of the picture, the
    first and the last bar hold them, and the bars between cover the rest.

    Args:
        relation: the table. found: spread of the column. bins: number of bars.
    """
    if not found.n:
        return []
    if found.minimum == found.maximum:
        return [Bin(found.minimum, found.maximum, found.n)]
    edges = bin_edges(found, bins)
    value = f"{quoted(found.column)}::double"
    below = [f"count(*) filter ({value} < {edge!r}::double and isfinite({value}))" for edge in edges[1:-1]]
    cumulative = [0, *relation.aggregate(", ".join(below)).fetchall()[0], found.n]
    return [
        Bin(low, high, after - before)
        for low, high, before, after in zip(edges, edges[1:], cumulative, cumulative[1:], strict=False)
    ]


def bin_edges(found: Spread, bins: int) -> list[float]:
    """Return the ends of the bars of a histogram, rising. [bins + 1]"""
    low, high = found.quantiles[OUTER[0]], found.quantiles[OUTER[1]]
    if not low < high or found.maximum - found.minimum <= 2 * (high - low):
        return _even(found.minimum, found.maximum, bins)
    before, after = found.minimum < low, high < found.maximum
    middle = _even(low, high, bins - before - after)
    return [*([found.minimum] if before else []), *middle, *([found.maximum] if after else [])]


def _even(low: float, high: float, bins: int) -> list[float]:
    return [low + (high - low) * number / bins for number in range(bins)] + [high]


def effective_size(relation: DuckDBPyRelation, column: str) -> float:
    """Return the effective sample size of weights w: (sum w)^2 / sum w^2; 0 where all are 0.

    Kish, Survey Sampling (1965), section 8.2: so many equal weights would give the same variance.
    """
    value = f"{quoted(column)}::double"
    total, squares = relation.aggregate(f"sum({value}), sum({value} * {value})").fetchall()[0]
    return float(total) ** 2 / float(squares) if squares else 0.0


REASON_ROWS = 3
"""Rows that are named for a reason."""


def reasons(relation: DuckDBPyRelation) -> list[dict[str, Any]]:
    """Return why rows are not valid, most frequent first: reason, rows, and the first of them."""
    rows = f"min(row, {REASON_ROWS})" if "row" in relation.columns else "[]"
    found = f"reason, count(*) as rows, {rows} as first"
    return dictionaries(relation.filter("not valid").aggregate(found, "reason").order("rows desc, reason"))
