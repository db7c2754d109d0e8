"""Imported: probabilities made elsewhere, in place of a method's own. A score is the file's number.

It stands in for a method whose ``probabilities_from`` names a file (``tsds.probs_path``); nothing is
computed, and the table of probabilities is the file's, without a rounding between.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import Field, computed_field

from dataflex_pipeline import api
from dataflex_pipeline.errors import DataError
from dataflex_pipeline.sampling.probabilities import check_array, open_array
from dataflex_pipeline.store.fingerprint import file_digest


class Imported(api.Method):
    """Every row's probability from a file of one number per row of the pool.

    Raises:
        DataError: there is no such file.
    """

    summary = "probabilities made elsewhere"
    source = "a file"

    class Params(api.Params):
        """Parameters of imported: what decides the scores is the file's content, not its place."""

        file: Path = Field(exclude=True, description=".npy file of one probability per row of the pool")
        saved_to: Path | None = Field(
            None, exclude=True, description=".npy file that they are also written to"
        )

        @computed_field(description="digest of the file")  # type: ignore[prop-decorator]
        @cached_property
        def probabilities(self) -> str:
            """Digest of the file."""
            return file_digest(self.file)

    params: Params

    def __init__(self, params: Params) -> None:
        super().__init__(params)
        if not params.file.is_file():
            raise DataError(
                f"probs_path={params.file} was set, and there is no such file.",
                "It is to hold the probabilities that rows are drawn with, made in an earlier run.",
                "Correct the path; or set probs_path to null, and the method scores the pool itself "
                "(save_probs_path then writes such a file).",
            )

    @property
    def probabilities_from(self) -> Path:
        """The file."""
        return self.params.file

    @property
    def probabilities_to(self) -> Path | None:
        """Where they are saved again."""
        return self.params.saved_to

    def check_pool(self, n_rows: int) -> None:
        """Check the whole file: one number per row of the pool, each of them a probability."""
        check_array(self.params.file, open_array(self.params.file, n_rows))

    @cached_property
    def _array(self) -> np.ndarray:
        return open_array(self.params.file)

    def score(self, block: api.Block, state: Any) -> Mapping[str, np.ndarray]:
        """Return the rows' probabilities as their scores."""
        start = block.pool.column("row")[0].as_py()
        return {"score": np.asarray(self._array[start : start + block.pool.num_rows], dtype=np.float64)}

    def weigh(self, block: pa.RecordBatch, fitted: Any) -> np.ndarray:
        """Return the scores."""
        weights: np.ndarray = block.column("score").to_numpy(zero_copy_only=False)
        return weights
