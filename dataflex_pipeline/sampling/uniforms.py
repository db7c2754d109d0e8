"""Random numbers by counter: the number of row i depends on the seed and on i, on nothing else.

Layout: Philox-4x64-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3",
SC 2011) with the seed as the low word of its key. One counter value gives four 64-bit words, so row i is
word ``i % 4`` of counter ``i // 4 + 1``, which is output i of ``numpy.random.Philox(key=seed)`` read from
its start (numpy raises the counter before the first block). A range of rows is therefore read without the
rows before it, and any split into blocks gives the same numbers. The raw words of a bit generator are
stable between numpy versions; what a ``Generator`` makes of them is not, so it is not used.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dataflex_pipeline.seeds import derive_seed

LANES = 4

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]


def row_uniforms(seed: int, start: int, stop: int) -> Floats:
    """Return the numbers of rows ``start`` to ``stop - 1`` of the stream of a seed.

    Args:
        seed: in [0, 2**64), as ``derive_seed`` gives it.
        start: first row, at least 0.
        stop: one past the last row, at least ``start``.

    Returns:
        ``((word >> 12) + 1/2) / 2**52`` per row: 2**52 equally likely values, symmetric around 1/2, never
        0 and never 1 (53 bits and a half would round up to 1). [stop - start] float64 in (0, 1)
    """
    return uniforms_of(row_words(seed, start, stop))


def row_words(seed: int, start: int, stop: int) -> Words:
    """Return the words that ``row_uniforms`` makes its numbers of, in the same order. [stop - start]"""
    if not 0 <= start <= stop:
        raise ValueError(f"rows {start} to {stop} are not a range")
    counter, lane = divmod(start, LANES)
    words: Words = np.random.Philox(key=seed, counter=counter).random_raw(lane + stop - start)[lane:]
    return words


def uniforms_of(words: Words) -> Floats:
    """Return the number of each word, which rises with it; see ``row_uniforms``. [n]"""
    numbers: Floats = (words >> np.uint64(12)).astype(np.float64)
    numbers += 0.5
    numbers *= 2.0**-52
    return numbers


def word_from(number: float) -> np.uint64:
    """Return a word below which every number is smaller than ``number``, which is in (0, 1]."""
    # Two steps of 2**-52 lower, for the rounding.
    return np.uint64(max(0, int(number * 2.0**52) - 2) << 12)


def permutation(n: int, seed: int, *names: object) -> Integers:
    """Return a random order of ``n`` things: their numbers in the named stream, sorted.

    Args:
        n: how many.
        seed: seed of the draw.
        names: name of the stream, as for ``derive_seed``.

    Returns:
        Positions in their new order. [n] int64
    """
    numbers = row_uniforms(derive_seed(seed, *names), 0, n)
    return np.argsort(numbers, kind="stable").astype(np.int64, copy=False)
