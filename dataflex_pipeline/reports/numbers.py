"""Spread of the numbers of a column: counts, quantiles, histogram; a few passes, bounded memory.

Quantiles are exact (linear interpolation between order statistics, as ``numpy.quantile``) up to
EXACT_ROWS values, 8 bytes of memory each; above that a t-digest estimates them and ``exact`` is false.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dataflex_pipeline.reports.query import dictionaries, quoted

if TYPE_CHECKING:
    from duckdb import DuckDBPyRelation

EXACT_ROWS = 30_000_000
SHARES = (0.005, 0.05, 0.25, 0.5, 0.75, 0.95, 0.995)
OUTER = (SHARES[0], SHARES[-1])
BINS = 16


@dataclass(frozen=True)
class Spread:
    """How the finite values of a column are spread.

    Attributes:
        column: its name. n: finite values. missing: nulls, NaN and infinities.
        minimum, maximum, mean, std: of the finite values; NaN where there is none. std is the population's.
        quantiles: share -> value. exact: whether they are exact.
    """

    column: str
    n: int
    missing: int
    minimum: float
    maximum: float
    mean: float
    std: float
    quantiles: dict[float, float]
    exact: bool

    def plain(self) -> dict[str, Any]:
        """Return the spread for JSON; what does not exist is null."""
        numbers = {name: getattr(self, name) for name in ("minimum", "maximum", "mean", "std")}
        return {
            "column": self.column,
            "n": self.n,
            "missing": self.missing,
            **{name: None if math.isnan(value) else value for name, value in numbers.items()},
            "quantiles": {f"{share:g}": value for share, value in self.quantiles.items()},
            "exact": self.exact,
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


def spread(relation: DuckDBPyRelation, column: str, exact_rows: int = EXACT_ROWS) -> Spread:
    """Return how a numeric column is spread.

    Args:
        relation: the table. column: its numeric column.
        exact_rows: largest number of values whose quantiles are taken exactly.
    """
    value = f"{quoted(column)}::double"
    finite = relation.project(f"case when isfinite({value}) then {value} end as x")
    counted = finite.aggregate("count(x), count(*) - count(x), min(x), max(x), avg(x), stddev_pop(x)")
    n, missing, *numbers = counted.fetchall()[0]
    low, high, mean, std = (math.nan if number is None else float(number) for number in numbers)
    exact = n <= exact_rows
    found: list[float] = []
    if n:
        function = "quantile_cont" if exact else "approx_quantile"
        found = finite.aggregate(f"{function}(x, {list(SHARES)})").fetchall()[0][0]
    quantiles = dict(zip(SHARES, found, strict=True)) if n else {}
    return Spread(column, n, missing, low, high, mean, std, quantiles, exact)


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


def reasons(relation: DuckDBPyRelation) -> list[dict[str, Any]]:
    """Return why rows are not valid, most frequent first: reason, rows."""
    counted = relation.filter("not valid").aggregate("reason, count(*) as rows", "reason")
    return dictionaries(counted.order("rows desc, reason"))
