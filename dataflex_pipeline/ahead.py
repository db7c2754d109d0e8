"""Making the next items of a stream while the last one is worked on."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")


def ahead(items: Iterator[Item], count: int = 2) -> Iterator[Item]:
    """Yield the same items in the same order, made by a thread of their own before they are asked for.

    It pays where making an item lets other threads run: reading Parquet, numpy on large arrays. An error in
    ``items`` is raised here, at its place.

    Args:
        items: read by that thread only.
        count: items that are made and wait. With one, the two sides wait for each other at every item.
    """
    with ThreadPoolExecutor(1) as thread:
        coming = deque(thread.submit(_next, items) for _ in range(count))
        while found := coming.popleft().result():
            coming.append(thread.submit(_next, items))
            yield found[0]


def _next(items: Iterator[Item]) -> list[Item]:
    """Return the next item, or nothing at the end."""
    return list(islice(items, 1))
