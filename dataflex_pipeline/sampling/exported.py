"""Probabilities as an ``.npy`` array, one float64 per row of the pool: what the peer's trainer reads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dataflex_pipeline.api import BlockTable
from dataflex_pipeline.errors import DataError
from dataflex_pipeline.store.atomic import atomic_file, set_aside


def export_probabilities(table: BlockTable, path: Path, *, overwrite: bool = False) -> bool:
    """Write the probabilities of a table to a file, unless exactly these are in it.

    Args:
        table: has the column ``probability``. path: where to.
        overwrite: set a file with another content aside under another name.

    Returns:
        Whether anything was written.

    Raises:
        DataError: the path is not that of an ``.npy`` file, or the file is there with another content and
            ``overwrite`` is not set.
    """
    _check_name(path)
    if path.exists():
        if _holds(path, table):
            return False
        if not overwrite:
            raise _in_the_way(path)
        set_aside(path)
    layout = {"descr": "<f8", "fortran_order": False, "shape": (table.n_rows,)}
    # Written as a stream: on a full disk a mapped file would end the process instead of raising.
    with atomic_file(path) as temporary, temporary.open("wb") as stream:
        np.lib.format.write_array_header_1_0(stream, layout)  # type: ignore[no-untyped-call]
        for _, values in _blocks(table):
            stream.write(values.astype("<f8").tobytes())
    return True


def check_export(path: Path, n_rows: int) -> None:
    """Check, before there are probabilities, that a file in the way could at all be an array of them.

    Raises:
        DataError: it is something else, or of another number of rows.
    """
    _check_name(path)
    if path.exists() and _shape(path) != (n_rows,):
        raise _in_the_way(path)


def _check_name(path: Path) -> None:
    if path.suffix != ".npy" or path.is_dir():
        raise DataError(
            f"save_probs_path={path} was set.",
            "Probabilities are saved as one .npy array.",
            "Give the path of a file that ends in .npy.",
        )


def _in_the_way(path: Path) -> DataError:
    return DataError(
        f"save_probs_path={path} is there already, with another content.",
        "It may be what another run made, so it is not written over.",
        "Give another path, move the file away, or use --overwrite, which renames it.",
    )


def _shape(path: Path) -> tuple[int, ...] | None:
    array = _mapped(path)
    return None if array is None else array.shape


def _mapped(path: Path) -> np.ndarray | None:
    """Return the array of float64 in a file; None where it holds something else."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return array if isinstance(array, np.ndarray) and array.dtype == np.float64 else None


def _holds(path: Path, table: BlockTable) -> bool:
    """Whether a file is an array of exactly these probabilities."""
    array = _mapped(path)
    if array is None or array.shape != (table.n_rows,):
        return False
    return all(np.array_equal(array[start : start + len(v)], v) for start, v in _blocks(table))


def _blocks(table: BlockTable) -> Iterator[tuple[int, np.ndarray]]:
    start = 0
    for block in table.blocks(["probability"]):
        values: np.ndarray = block.column("probability").to_numpy()
        yield start, values
        start += len(values)
