"""Exact order statistics of a table's column in constant memory.

A float64 maps to an unsigned integer with the same order (flip all bits of negatives, the sign bit of
the others). The k-th smallest is then found digit by digit: count the leading 16 bits of every value,
walk to the bucket that holds rank k, and look again inside that bucket only. Four passes over the
column, four histograms of 65,536 counters, whatever the number of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from dataflex_pipeline.api import BlockTable

Values = Callable[[], Iterable[tuple[np.ndarray, np.ndarray]]]
DIGITS = 4
BITS = 16


def column_values(table: BlockTable, name: str, *, descending: bool = False) -> Values:
    """Return a function that streams (row, value) arrays of a column's non-null values.

    Args:
        table: a table with columns ``row`` and ``name``.
        name: the float column.
        descending: negate the values, so that rank 0 is the largest.
    """

    def stream() -> Iterable[tuple[np.ndarray, np.ndarray]]:
        for block in table.blocks(["row", name]):
            values = block.column(name)
            kept = values.is_valid().to_numpy(zero_copy_only=False)
            numbers = values.drop_null().to_numpy(zero_copy_only=False).astype(np.float64)
            yield block.column("row").to_numpy()[kept], -numbers if descending else numbers

    return stream


def count(values: Values) -> int:
    """Return how many values there are."""
    return sum(len(rows) for rows, _ in values())


def _sortable(values: np.ndarray) -> np.ndarray:
    bits = (values + 0.0).view(np.uint64)  # + 0.0 makes -0.0 and 0.0 one value
    return np.where(bits >> np.uint64(63), ~bits, bits | np.uint64(1 << 63))


def _from_sortable(key: int) -> float:
    bits = key & ~(1 << 63) if key >> 63 else ~key & (2**64 - 1)
    return float(np.array([bits], dtype=np.uint64).view(np.float64)[0])


def order_statistics(values: Values, ranks: Sequence[int]) -> list[float]:
    """Return the values at the given ranks (0 = smallest) of the sorted column.

    Args:
        values: what ``column_values`` returned; finite numbers.
        ranks: each in [0, number of values).
    """
    prefixes = [0] * len(ranks)  # the leading digits found so far, per rank
    left = [int(rank) for rank in ranks]  # rank inside the bucket of that prefix
    for digit in range(DIGITS):
        shift = np.uint64(64 - BITS * (digit + 1))
        histograms = {prefix: np.zeros(1 << BITS, dtype=np.int64) for prefix in prefixes}
        for _, numbers in values():
            keys = _sortable(numbers) >> shift
            for prefix, histogram in histograms.items():
                inside = keys if digit == 0 else keys[keys >> np.uint64(BITS) == np.uint64(prefix)]
                low = (inside & np.uint64((1 << BITS) - 1)).astype(np.int64)
                histogram += np.bincount(low, minlength=1 << BITS)
        for i, prefix in enumerate(prefixes):
            cumulative = np.cumsum(histograms[prefix])
            bucket = int(np.searchsorted(cumulative, left[i], side="right"))
            left[i] -= int(cumulative[bucket - 1]) if bucket else 0
            prefixes[i] = prefix << BITS | bucket
    return [_from_sortable(key) for key in prefixes]


def quantiles(values: Values, shares: Sequence[float]) -> list[float]:
    """Return quantiles by linear interpolation between order statistics, as ``numpy.quantile`` does.

    Args:
        values: what ``column_values`` returned, at least one value.
        shares: each in [0, 1].
    """
    return interpolated(count(values), shares, lambda ranks: order_statistics(values, ranks))


def interpolated(
    n: int, shares: Sequence[float], statistics: Callable[[Sequence[int]], Sequence[float]]
) -> list[float]:
    """Return quantiles of ``n`` values from the order statistics at given ranks.

    Args:
        n: how many values there are, at least one.
        shares: each in [0, 1].
        statistics: returns the values at ranks (0 = smallest).
    """
    last = n - 1
    positions = [share * last for share in shares]
    below = [int(np.floor(position)) for position in positions]
    above = [min(rank + 1, last) for rank in below]
    found = statistics([*below, *above])
    result = []
    for position, rank, low, high in zip(
        positions, below, found[: len(below)], found[len(below) :], strict=True
    ):
        part = position - rank
        result.append(low + (high - low) * part if part < 0.5 else high - (high - low) * (1 - part))
    return result


def places(values: Values, ranks: Sequence[int]) -> list[tuple[float, int]]:
    """Return (value, row) at the given ranks of the column sorted by value, ties by row.

    With it "the rows of rank a to b" becomes a comparison of (value, row) pairs that any block can
    make for itself.
    """
    found = order_statistics(values, ranks)
    smaller = [0] * len(ranks)
    equal: list[list[np.ndarray]] = [[] for _ in ranks]
    seen = [0] * len(ranks)
    for _, numbers in values():
        for i, value in enumerate(found):
            smaller[i] += int(np.count_nonzero(numbers < value))
    for rows, numbers in values():
        for i, value in enumerate(found):
            wanted = ranks[i] - smaller[i]  # how many equal values come before
            if seen[i] <= wanted:
                matches = rows[numbers == value]
                if seen[i] + len(matches) > wanted:
                    equal[i] = [matches[wanted - seen[i] : wanted - seen[i] + 1]]
                seen[i] += len(matches)
    return [(value, int(rows[0][0])) for value, rows in zip(found, equal, strict=True)]
