"""Some rows of many: a slice in the notation of ``datasets``, or a seeded random sample in file order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dataflex_pipeline.data.settings import Row
from dataflex_pipeline.errors import DataError
from dataflex_pipeline.seeds import derive_seed

_BLOCK = 1 << 20

Positions = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Draw:
    """How many rows are drawn at random, and by which stream.

    Attributes:
        count: rows asked for, ``num_samples``; more than there are means repeats. at_most: only the first so
            many of the draw; None for all. seed: of the stream.
    """

    count: int
    at_most: int | None
    seed: int

    def positions(self, n_rows: int) -> Positions:
        """Return the rows drawn of ``n_rows``, in rising order.

        Every row has a random number that depends on the seed and its position only, and those with the
        smallest are drawn: without replacement, and a smaller draw is part of a larger one. Beyond
        ``n_rows`` every row is there once and the others are drawn with replacement.
        """
        if n_rows == 0:
            return np.empty(0, np.int64)
        wanted = self._wanted
        if wanted < n_rows:
            return _smallest(n_rows, wanted, self.seed)
        words = np.random.Philox(key=derive_seed(self.seed, "again")).random_raw(wanted - n_rows)
        again = (words % np.uint64(n_rows)).astype(np.int64)
        return np.sort(np.concatenate([np.arange(n_rows, dtype=np.int64), again]))

    @property
    def _wanted(self) -> int:
        """Rows that are there in the end."""
        return self.count if self.at_most is None else min(self.count, self.at_most)

    def sentence(self, n_rows: int) -> str:
        """Return what was drawn, in words."""
        wanted, asked, first = self._wanted, f"num_samples: {self.count}", "max_samples"
        if wanted < self.count:
            asked, first = f"{asked}, and max_samples: {self.at_most} of that draw", "max_samples alone"
        if wanted <= n_rows:
            asked += ":" if wanted < self.count else ""
            rows = f"{wanted} of {n_rows}" if wanted < self.count else f"of {n_rows}"
            return f"{asked} {rows} rows are drawn at random by the run's seed ({first} takes the first ones)"
        return (
            f"{asked} is more than its {n_rows} rows: each is there once, and "
            f"{wanted - n_rows} are drawn again at random by the run's seed"
        )


def _smallest(n_rows: int, wanted: int, seed: int) -> Positions:
    stream = np.random.Philox(key=seed)
    keys, rows = np.empty(0, np.uint64), np.empty(0, np.int64)
    for start in range(0, n_rows, _BLOCK):
        stop = min(start + _BLOCK, n_rows)
        keys = np.concatenate([keys, stream.random_raw(stop - start)])
        rows = np.concatenate([rows, np.arange(start, stop, dtype=np.int64)])
        kept = np.argsort(keys, kind="stable")[:wanted]
        keys, rows = keys[kept], rows[kept]
    return np.sort(rows)


def picked(rows: Iterator[Row], positions: Positions) -> Iterator[Row]:
    """Yield the rows at some positions, which rise; a position given twice yields its row twice."""
    ahead = iter(positions.tolist())
    wanted = next(ahead, None)
    for number, row in enumerate(rows):
        while wanted == number:
            yield row
            wanted = next(ahead, None)
        if wanted is None:
            return


@dataclass(frozen=True)
class Slice:
    """Rows ``start`` to ``stop - 1`` of a split."""

    split: str
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


def slices(split: str, lengths: Mapping[str, int], given: str) -> list[Slice]:
    """Return the parts that a split such as ``train[:10%]+test[-5:]`` names, in its order.

    Args:
        split: in the notation of ``datasets``, by whose parser it is read.
        lengths: split -> its rows. given: what the user wrote, for messages.

    Raises:
        DataError: not in that notation.
    """
    from datasets import ReadInstruction

    try:
        instruction = ReadInstruction.from_spec(split)
        found = instruction.to_absolute(dict(lengths))
    except (ValueError, AssertionError) as error:
        raise DataError(
            f"dataset '{given}': split is {split} ({error}).",
            "A split is a name, a slice of one such as train[:10%] or train[-100:], or several with +.",
            "Correct split in its entry of dataset_info.json. Nothing was written.",
        ) from error
    return [Slice(each.splitname, each.from_, max(each.from_, each.to)) for each in found]
