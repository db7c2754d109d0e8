"""Column: scores that exist already, in a column of the pool or in a file.

    score(z) = s_z, or -s_z with ``descending: false``

with s_z the number of row z in the column ``column`` of the data set; or, where ``file`` is set, in that
column of a Parquet, CSV or JSONL file (by default "score"), or in an ``.npy`` array. Lines of a file are
joined to rows by ``row_id``, by ``row``, or as they stand (data/scores.py). A row whose number is missing, no
number or not finite has no score, and says why. Nothing is computed; no model is looked at.

``strategy: sample`` draws by exp(score / (largest |score| x temperature)), as for every method whose own
strategy is top_k.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
from pydantic import Field, computed_field

from dataflex_pipeline import api
from dataflex_pipeline.data.scores import By, ScoreFile, existing, numbers_of, reasons
from dataflex_pipeline.errors import ConfigError
from dataflex_pipeline.sampling.softmax import Softmax
from dataflex_pipeline.schemas import ORIGINAL
from dataflex_pipeline.store.fingerprint import file_digest


class Column(api.Method):
    """Scores made elsewhere."""

    summary = "scores that exist already, in a column of the pool or in a file"
    source = "a column or a file"
    default_strategy = "top_k"

    class Params(api.Params):
        """Parameters of column: of a file its content decides the scores, not its place."""

        column: str | None = Field(
            None,
            description="column of the data set that holds the scores; with file, the file's column (null: "
            "score; an array has none)",
        )
        file: Path | None = Field(
            None, exclude=True, description="take the scores from this .parquet, .csv, .tsv, .jsonl or .npy"
        )
        by: By | None = Field(
            None,
            description="what joins the file's lines to rows: row_id (content hash), row (position in the "
            "pool) or line (line i is row i); null: the first of them that the file has",
        )
        descending: bool = Field(
            True, description="whether a higher number is better; false takes the lowest first"
        )
        temperature: float = Field(
            0.1,
            gt=0,
            description="for strategy: sample, which draws by exp(score / (largest |score| x temperature))",
        )

        @computed_field(description="digest of the file")  # type: ignore[prop-decorator]
        @cached_property
        def file_content(self) -> str | None:
            """Digest of the file, None without one."""
            return None if self.file is None else file_digest(existing(self.file))

    params: Params

    def __init__(self, params: Params) -> None:
        super().__init__(params)
        if params.file is None and params.column is not None:
            self.pool_columns = (ORIGINAL + params.column,)

    @cached_property
    def _file(self) -> ScoreFile | None:
        """The file, read once."""
        params = self.params
        return None if params.file is None else ScoreFile(params.file, params.column, params.by)

    def check_pool(self, n_rows: int) -> None:
        """Read the whole file: it fits the pool, and its keys and numbers can be used."""
        if self.params.file is None and self.params.column is None:
            raise ConfigError(
                "The method column was chosen, and neither column.column nor column.file is set.",
                "It takes scores that exist already, and nothing says where they are.",
                "Set column.column to a column of the data set, or column.file to a file of scores.",
            )
        if self.params.file is None and self.params.by is not None:
            raise ConfigError(
                f"column.by={self.params.by} was set without column.file.",
                "It joins the lines of a file to rows; a column of the data set is of its rows already.",
                "Set column.file, or leave by out.",
            )
        if self._file is not None:
            self._file.check_rows(n_rows)

    def begin(self, tables: Mapping[str, api.BlockTable], selection: api.Selection) -> None:
        """Say where the scores come from."""
        if self._file is not None:
            selection.say(f"scores of {self._file.path}, lines joined by {self._file.by}")

    def score(self, block: api.Block, state: None) -> Mapping[str, np.ndarray]:
        """Return the numbers, negated where lower is better, and why a row has none."""
        if self._file is not None:
            place = self._file.place
            values, kind = self._file.joined.of(block.pool.column("row"), block.pool.column("row_id"))
        else:
            place = f"the column '{self.params.column}'"
            values, kind = numbers_of(block.pool.column(self.pool_columns[0]))
        return {
            "score": values if self.params.descending else 0.0 - values,
            "reason": reasons(kind, place),
        }

    def fit(self, scores: api.BlockTable, selection: api.Selection) -> Softmax:
        """Find the largest score and the scale of the softmax."""
        return Softmax.fit(scores, self.params.temperature)

    def weigh(self, block: pa.RecordBatch, fitted: Softmax) -> np.ndarray:
        """Return exp((score - largest) / scale)."""
        return fitted.weigh(block)
