"""Probabilities made elsewhere, in place of a method's own: nothing is computed, a score is the file's."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import Field

from dataflex_pipeline import api
from dataflex_pipeline.errors import DataError
from dataflex_pipeline.sampling.probabilities import check_array, open_array
from dataflex_pipeline.store.fingerprint import file_digest


class Imported(api.Method):
    """A method that gives every row the probability of a file (``probs_path``).

    Args:
        source: an ``.npy`` file of one probability per row of the pool.
        saved_to: where the probabilities are saved again, if anywhere.

    Raises:
        DataError: there is no such file.
    """

    summary = "probabilities made elsewhere"
    source = "a file"

    class Params(api.Params):
        """What decides the scores: the file's content, not its place."""

        probabilities: str = Field(description="digest of the file")

    def __init__(self, source: Path, saved_to: Path | None = None) -> None:
        if not source.is_file():
            raise DataError(
                f"probs_path={source} was set, and there is no such file.",
                "It is to hold the probabilities that rows are drawn with, made in an earlier run.",
                "Correct the path; or set probs_path to null, and the method scores the pool itself "
                "(save_probs_path then writes such a file).",
            )
        super().__init__(self.Params(probabilities=file_digest(source)))
        self.file, self.saved_to = source, saved_to

    @property
    def probabilities_from(self) -> Path:
        """The file."""
        return self.file

    @property
    def probabilities_to(self) -> Path | None:
        """Where they are saved again."""
        return self.saved_to

    def check(self, n_rows: int) -> None:
        """Check the whole file against the number of rows of the pool.

        Raises:
            DataError: it is no such array, or its numbers are no probabilities.
        """
        check_array(self.file, open_array(self.file, n_rows))

    @cached_property
    def _array(self) -> np.ndarray:
        return open_array(self.file)

    def score(self, block: api.Block, state: Any) -> Mapping[str, np.ndarray]:
        """Return the rows' probabilities as their scores."""
        start = block.pool.column("row")[0].as_py()
        return {"score": np.asarray(self._array[start : start + block.pool.num_rows], dtype=np.float64)}

    def weigh(self, block: pa.RecordBatch, fitted: Any) -> np.ndarray:
        """Return the scores."""
        weights: np.ndarray = block.column("score").to_numpy(zero_copy_only=False)
        return weights
