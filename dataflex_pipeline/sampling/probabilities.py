"""The table of probabilities, made from weights: p_i = w_i / sum of w, over all valid rows, in two passes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dataflex_pipeline.api import BlockTable
from dataflex_pipeline.errors import DataError, DataflexError, UserError
from dataflex_pipeline.sampling.uniforms import Floats
from dataflex_pipeline.schemas import PROBABILITIES
from dataflex_pipeline.store.tables import table_writer, zip_blocks

Weigh = Callable[[pa.RecordBatch], np.ndarray]

TOLERANCE = 1e-6
"""How far the sum of imported probabilities may be from 1; float32 values reach about 1e-7."""
ROUNDING = 1e-13
"""A sum this near to 1 is 1 but for rounding: dividing by it would only move last digits, and probabilities
that were saved would not come back as they are."""
SUM_TOLERANCE = 1e-9
"""How far probabilities may be from summing to 1 by rounding; other weights are much further off."""
SMALLEST_TOTAL = 1e-290
"""Weights that sum to less have lost digits, or would in the division."""
CHECKED_ROWS = 1 << 20
"""Rows of a file that are looked at at a time."""


@dataclass(frozen=True)
class ProbabilitySummary:
    """What a table of probabilities looks like.

    Attributes:
        n_rows: lines. n_valid: valid rows. n_positive: rows with a probability above 0.
        effective_sample_size: 1 / sum of p squared; ``n_positive`` when all are equal, 1 when one has all.
        max_probability: the largest.
        notices: sentences for the user.
    """

    n_rows: int
    n_valid: int
    n_positive: int
    effective_sample_size: float
    max_probability: float
    notices: tuple[str, ...] = ()


def write_probabilities(
    scores: BlockTable,
    weigh: Weigh,
    final: Path,
    ingredients: Mapping[str, Any],
    notes: Mapping[str, str] | None = None,
) -> ProbabilitySummary:
    """Write p = w / sum of w for every row of the pool.

    A sum beyond the range of a float, or too small to divide by, is taken of w / (largest w) instead.

    Args:
        scores: ``row``, ``row_id``, ``valid`` and whatever ``weigh`` looks at.
        weigh: gets a block of the score table (all columns but ``row_id``, consecutive rows) and returns the
            weight of each row, finite and at least 0. It is called twice for every block and must return the
            same. What it returns for rows that are not valid is ignored: their probability is 0.
        final: where the table will be.
        ingredients: what it is made from.
        notes: further footer entries; the summary's numbers are added to them.

    Raises:
        DataError: no row has a weight above 0.
        DataflexError: ``weigh`` returned another number of weights, or one that is negative or not finite.
    """
    names = [name for name in scores.schema.names if name != "row_id"]
    total, largest, n_valid = _total(scores, names, weigh, 1.0)
    unit = 1.0
    if largest > 0 and not SMALLEST_TOTAL <= total < math.inf:
        unit = largest
        total, _, _ = _total(scores, names, weigh, unit)
    if not 0 < total < math.inf:
        raise _no_total(total, n_valid)
    if abs(total - 1) <= ROUNDING:
        total = 1.0
    summary = _Tally(n_valid)
    entries = dict(notes or {})
    with table_writer(final, PROBABILITIES, ingredients, entries) as write:
        # row_id takes most of the reading, so it has a thread of its own.
        for block, ids in zip_blocks((scores, names), (scores, ["row_id"]), threads=True):
            p = _weights(block, weigh)[0] / unit / total
            write(_lines(block, ids, p))
            summary.add(p)
        summary.check_sum()
        entries |= summary.notes()
    return summary.result()


def _total(scores: BlockTable, names: list[str], weigh: Weigh, unit: float) -> tuple[float, float, int]:
    """Return the sum of w / unit, the largest w, and how many rows are valid."""
    sums, largest, n_valid = [], 0.0, 0
    for (block,) in zip_blocks((scores, names), threads=True):
        weights, valid = _weights(block, weigh)
        with np.errstate(over="ignore"):
            sums.append(float((weights / unit).sum()))
        largest = max(largest, float(weights.max(initial=0.0)))
        n_valid += int(np.count_nonzero(valid))
    return (math.inf if math.inf in sums else _exact_sum(sums)), largest, n_valid


def _exact_sum(sums: list[float]) -> float:
    try:
        return math.fsum(sums)
    except OverflowError:  # every block's sum is a float, and that of all is not
        return math.inf


def import_probabilities(
    source: Path,
    scores: BlockTable,
    final: Path,
    ingredients: Mapping[str, Any],
    notes: Mapping[str, str] | None = None,
) -> ProbabilitySummary:
    """Write a table of probabilities from an ``.npy`` file (``probs_path``).

    The file is mapped, not loaded, and never unpickled. A positive probability of a row that is not valid
    here (cut off to nothing, no response, loss not finite) cannot be kept: it becomes 0, the others are
    scaled up to sum to 1 again, and a notice says how many rows and how much probability that were.

    Args:
        source: a one-dimensional array of real numbers, one per row of the pool, in its order.
        scores: ``row``, ``row_id``, ``valid`` of every row of the pool.
        final, ingredients, notes: as for ``write_probabilities``.

    Raises:
        DataError: the file is missing, is not such an array, or has another length; a number is negative
            or not finite; they do not sum to 1 within ``TOLERANCE``; only invalid rows have any.
    """
    array = open_array(source, scores.n_rows)
    check_array(source, array)
    lost_rows, lost = 0, []
    for start, block in _numbered(scores):
        p = np.asarray(array[start : start + block.num_rows], dtype=np.float64)
        invalid = ~block.column("valid").to_numpy(zero_copy_only=False)
        lost_rows += int(np.count_nonzero(p[invalid]))
        lost.append(float(p[invalid].sum()))
    notices: tuple[str, ...] = ()
    if lost_rows:
        notices = (
            f"{lost_rows} rows that cannot be used had {math.fsum(lost):.6g} of the probability in "
            f"{source.name}: set to 0, and the rest scaled up to sum to 1.",
        )
    entries = dict(notes or {}) | {"notices": "\n".join(notices)}
    summary = write_probabilities(scores, _Reader(source, array), final, ingredients, entries)
    return replace(summary, notices=notices)


def check_array(source: Path, array: np.ndarray) -> None:
    """Check that an opened array holds probabilities.

    Args:
        source: the file, for messages. array: from `open_array`. [rows]

    Raises:
        DataError: a number is negative or not finite; they do not sum to 1 within ``TOLERANCE``.
    """
    starts = range(0, len(array), CHECKED_ROWS)
    total = math.fsum(float(_checked(source, array, start, CHECKED_ROWS).sum()) for start in starts)
    if abs(total - 1) > TOLERANCE:
        raise DataError(
            f"probs_path={source}: its numbers sum to {total:.9g}.",
            f"Probabilities sum to 1; more than {TOLERANCE:g} away means that these are something else.",
            "Divide the array by its sum before saving it.",
        )


class _Reader:
    """A ``weigh`` that reads the array at the rows of a block."""

    def __init__(self, source: Path, array: np.ndarray) -> None:
        self._source = source
        self._array = array

    def __call__(self, block: pa.RecordBatch) -> np.ndarray:
        return _checked(self._source, self._array, block.column("row")[0].as_py(), block.num_rows)


def open_array(source: Path, n_rows: int | None = None) -> np.ndarray:
    """Map an ``.npy`` file of one number per row; its numbers are not looked at.

    Args:
        source: the file. n_rows: rows of the pool, where they are known.

    Raises:
        DataError: the file is missing, is not such an array, or has another length.
    """
    try:
        array = np.load(source, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(
            f"probs_path={source} cannot be read: {str(error).splitlines()[0]}",
            "It has to be an .npy file as numpy.save writes it, of plain numbers.",
            "Give the path of such a file.",
        ) from error
    if not isinstance(array, np.ndarray) or array.ndim != 1 or array.dtype.kind not in "fiu":
        found = f"{array.dtype}{list(array.shape)}" if isinstance(array, np.ndarray) else "an archive"
        raise DataError(
            f"probs_path={source} holds {found}.",
            "One real number per row of the pool is needed.",
            "Save a one-dimensional array with numpy.save.",
        )
    if n_rows is not None and len(array) != n_rows:
        raise DataError(
            f"probs_path={source} has {len(array)} numbers and the pool has {n_rows} rows.",
            "Every row of the pool has one probability, also the rows that cannot be used.",
            "Make the array from this pool: same data sets, same order, same max_samples.",
        )
    return array


def _checked(source: Path, array: np.ndarray, start: int, n: int) -> Floats:
    p = np.asarray(array[start : start + n], dtype=np.float64)
    bad = np.flatnonzero(~(np.isfinite(p) & (p >= 0)))
    if len(bad):
        raise DataError(
            f"probs_path={source}: the number of row {start + bad[0]} is {p[bad[0]]}.",
            "A probability is finite and at least 0.",
            "Correct the array.",
        )
    return p


def _numbered(scores: BlockTable) -> Iterator[tuple[int, pa.RecordBatch]]:
    start = 0
    for (block,) in zip_blocks((scores, ["valid"])):
        yield start, block
        start += block.num_rows


def _weights(block: pa.RecordBatch, weigh: Weigh) -> tuple[Floats, np.ndarray]:
    """Return the weights of a block, 0 where not valid, and which rows are valid."""
    weights = np.asarray(weigh(block), dtype=np.float64)
    if weights.shape != (block.num_rows,):
        raise DataflexError(
            f"The method gave weights of shape {list(weights.shape)} for a block of {block.num_rows} rows.",
            "A method gives one weight per row of the block.",
            "This is a mistake in the method; see how the built-in ones turn scores into weights.",
        )
    valid = block.column("valid").to_numpy(zero_copy_only=False)
    bad = np.flatnonzero(valid & ~(np.isfinite(weights) & (weights >= 0)))
    if len(bad):
        raise DataflexError(
            f"The method gave row {block.column('row')[bad[0]].as_py()} the weight {weights[bad[0]]}.",
            "Weights become probabilities, so they are finite and at least 0 for every valid row.",
            "Check the method's parameters; if they are right, this is a mistake in the method.",
        )
    return np.where(valid, weights, 0.0), valid


def _no_total(total: float, n_valid: int) -> DataError:
    return DataError(
        f"The weights of {n_valid} valid rows sum to {total:g}.",
        "Probabilities are weights divided by their sum, which has to be positive and finite.",
        "Look at the score table's score, valid and reason columns; the method's parameters, the data or "
        "the model have to change.",
    )


def _lines(block: pa.RecordBatch, ids: pa.RecordBatch, p: Floats) -> pa.RecordBatch:
    columns = [block.column("row"), ids.column("row_id"), pa.array(p)]
    return pa.RecordBatch.from_arrays(columns, names=PROBABILITIES.names)


class _Tally:
    """Counts the summary while the table is written."""

    def __init__(self, n_valid: int) -> None:
        self._n_valid = n_valid
        self._n_rows = 0
        self._n_positive = 0
        self._squares: list[float] = []
        self._sums: list[float] = []
        self._largest = 0.0

    def add(self, p: Floats) -> None:
        self._n_rows += len(p)
        self._n_positive += int(np.count_nonzero(p))
        self._sums.append(float(p.sum()))
        self._squares.append(float(np.square(p).sum()))
        self._largest = max(self._largest, float(p.max()))

    def check_sum(self) -> None:
        """Refuse probabilities that do not sum to 1: the weights were others the second time."""
        total = math.fsum(self._sums)
        if abs(total - 1) > SUM_TOLERANCE:
            raise UserError(
                f"The method's weights were divided by their sum, and come to {total:.9g} instead of 1.",
                "weigh() is called twice for every block, and returned other weights the second time.",
                "Draw random numbers in fit(), or from a stream that begins anew at each call.",
            )

    def result(self) -> ProbabilitySummary:
        return ProbabilitySummary(
            n_rows=self._n_rows,
            n_valid=self._n_valid,
            n_positive=self._n_positive,
            effective_sample_size=1 / math.fsum(self._squares),
            max_probability=self._largest,
        )

    def notes(self) -> dict[str, str]:
        summary = self.result()
        return {
            "n_valid": str(summary.n_valid),
            "n_positive": str(summary.n_positive),
            "effective_sample_size": repr(summary.effective_sample_size),
            "max_probability": repr(summary.max_probability),
        }
