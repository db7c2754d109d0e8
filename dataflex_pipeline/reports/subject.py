"""The run or table that is looked at."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dataflex_pipeline.errors import RunError, UserError
from dataflex_pipeline.reports.catalogue import RunTable, run_above, table_at, tables_of
from dataflex_pipeline.store.run import RunFolder


@dataclass(frozen=True)
class Subject:
    """What is looked at: a run, one table of it, or a table on its own."""

    run: RunFolder | None
    path: Path | None

    @classmethod
    def at(cls, path: Path) -> Subject | None:
        """Return the run or table at a path; None where the path is a plain name that is no file here.

        Raises:
            UserError: it is a path, and nothing is there.
        """
        if (path / "run.yaml").is_file():
            return cls(RunFolder(path), None)
        if path.exists():
            return cls(run_above(path), path)
        if len(path.parts) > 1 or path.suffix:
            raise UserError(
                f"{path} does not exist.",
                "What to inspect is a run (its name or folder) or a table (a Parquet file or a folder of "
                "parts).",
                "See `ls runs` for the runs that there are.",
            )
        return None

    @property
    def again(self) -> str:
        """How a command names it."""
        shown = self.path if self.path is not None else self.run.folder if self.run is not None else ""
        return str(shown)

    def tables(self) -> tuple[list[RunTable], RunTable | None]:
        """Return the tables of the run, and the one that is looked at (None for the whole run).

        Raises:
            RunError: the run has no table yet.
        """
        tables = tables_of(self.run) if self.run is not None else []
        this = table_at(self.path, tables) if self.path is not None else None
        if this is None and not tables and self.run is not None:
            raise RunError(
                f"The run {self.run.folder} has no finished table yet.",
                "It was begun and cut off before its data was prepared.",
                "Run the command that began it again; it goes on from there.",
            )
        return tables, this
