"""A finished table of a run, for a script or a notebook."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from dataflex_pipeline.store.parquet import read_whole

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Table:
    """A table as a file, read when it is asked for.

    Attributes:
        path: the Parquet file.
        summary: one line about it.
        by: the column that ranks its rows, higher is better.
    """

    path: Path
    summary: str
    by: str

    def to_arrow(self) -> pa.Table:
        """Return the whole table."""
        return read_whole(self.path)

    def to_pandas(self) -> pd.DataFrame:
        """Return the whole table as a data frame."""
        return self.to_arrow().to_pandas()

    def plot(self, by: str | None = None) -> Any:
        """Return a chart of it, an object of Vega-Altair.

        Args:
            by: a column of the pool that groups the rows: source, or one of the data's own.

        Returns:
            Of scores their distribution, with the rows that the round selected told from the rest, or with
            ``by`` where those of each group lie; of a selection the shares of the groups (by default the
            sources) beside the pool's.

        Raises:
            UserError: the pool has no such column, or one of too many different values.
        """
        from dataflex_pipeline.reports.displays import table_chart

        return table_chart(self, by)

    def _repr_html_(self) -> str:
        """Return its best lines with their texts, for a notebook."""
        from dataflex_pipeline.reports.displays import safely, table_html

        return safely(lambda: table_html(self))

    def top(self, n: int) -> pa.Table:
        """Return the ``n`` lines of the highest score, best first; lines without a score are left out."""
        table = self.to_arrow()
        ranked = table.filter(pc.is_valid(table.column(self.by)))
        return ranked.sort_by([(self.by, "descending"), ("row", "ascending")]).slice(0, n)
