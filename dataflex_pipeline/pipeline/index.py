"""The weighted index that a round trains on: of the warm-up, and of a selection."""

from __future__ import annotations

import time
from typing import Any

import pyarrow as pa

from dataflex_pipeline.errors import RunError
from dataflex_pipeline.pipeline.damage import check_tables
from dataflex_pipeline.pipeline.drawing import as_ingredients, draw_settings
from dataflex_pipeline.pipeline.open_run import OpenRun
from dataflex_pipeline.pipeline.output import Outcome, Output
from dataflex_pipeline.pipeline.prepare import open_split
from dataflex_pipeline.pipeline.select import Selection
from dataflex_pipeline.sampling.draw import Drawn, DrawSettings, draw_uniform
from dataflex_pipeline.schemas import INDEX
from dataflex_pipeline.store.atomic import set_aside
from dataflex_pipeline.store.stale import is_kept
from dataflex_pipeline.store.tables import TableFile, table_writer


class WarmupIndex(Output):
    """The index of round 0: valid rows of the pool, drawn uniformly."""

    def __init__(self, run: OpenRun) -> None:
        super().__init__(
            run, "round 0 index", "select, warm-up", "The index of the warm-up", run.store.round(0).index
        )

    def inputs(self) -> dict[str, Any]:
        """Return the pool's fingerprint and how rows are drawn."""
        drawn = as_ingredients(warmup_draw(self.run))
        return {"table": "index", "pool": open_split(self.run, "pool").fingerprint, "draw": drawn}

    def check(self) -> None:
        """Check the table against the digest that was remembered when it was written."""
        self.run.memo.check_output(self.path)

    def write(self) -> None:
        """Draw the rows."""
        self.run.memo.forget_output(self.path)
        drawn = draw_uniform(open_split(self.run, "pool"), warmup_draw(self.run))
        for notice in drawn.notices:
            self.run.progress.say(f"  select: {notice}")
        _write_index(self, drawn, self.inputs(), {"round": "0"})
        self.run.memo.written(self.path)

    def describe(self) -> str:
        """Return the number of positions and of different rows."""
        return f"{TableFile(self.path).metadata.get('found', '')}, drawn uniformly"


def warmup_draw(run: OpenRun) -> DrawSettings:
    """Return how the rows of round 0 are drawn."""
    return draw_settings(run, 0, "sample", replacement=False)


class Index(Output):
    """The weighted index of a round, laid out from its selection.

    Args:
        selection: the round's own.
    """

    def __init__(self, selection: Selection) -> None:
        self.selection, self.number, self.method = selection, selection.number, selection.method
        super().__init__(
            selection.run,
            f"round {self.number} index",
            f"index, round {self.number}",
            f"The index of round {self.number}",
            selection.where.index,
            selection.made_from,
        )
        self.follows = (selection.label,)

    def inputs(self) -> dict[str, Any]:
        """Return the method, the probabilities by their fingerprint, and how rows are drawn."""
        return {**self.selection.inputs(), "table": "index"}

    def check(self) -> None:
        """Check the tables of the round against the digests that were remembered when they were written."""
        check_tables(self.run, self.number)

    def is_current(self, *, overwrite: bool = False) -> bool:
        """Decide whether the index can be kept.

        Raises:
            StaleError: the index is another method's, or it was made from other settings.
        """
        self.selection.check_method()
        if not self.selection.probabilities.is_file() or not self.selection.scores.path.is_file():
            return False
        return self.selection.has_probabilities() and super().is_current(overwrite=overwrite)

    def make(self) -> Outcome:
        """Write the index unless it is there.

        Raises:
            StaleError: it was made from other settings.
        """
        began, run = time.monotonic(), self.run
        wanted = self.inputs()
        done = not is_kept(self.path, wanted, self.name, overwrite=run.overwrite)
        if done:
            drawn = self.selection.draw()
            run.memo.forget_output(self.path)
            set_aside(self.path)
            notes = {"method": self.method, "round": str(self.number), "order": self.run.given.order}
            _write_index(self, drawn, wanted, notes)
            run.memo.written(self.path)
        found = TableFile(self.path).metadata.get("found", "")
        return Outcome(self.stage, self.path, done, time.monotonic() - began, found)

    def write(self) -> None:
        """Make it; see `make`."""
        self.make()

    def describe(self) -> str:
        """Return the number of positions and of different rows, and the method."""
        return f"{TableFile(self.path).metadata.get('found', '')}, by {self.method}"


def _write_index(output: Output, drawn: Drawn, wanted: dict[str, Any], notes: dict[str, str]) -> None:
    found = f"{drawn.index.num_rows:,} positions, {drawn.n_distinct:,} different rows"
    notes = notes | {"found": found, "notices": "\n".join(drawn.notices)}
    with table_writer(output.path, INDEX, wanted, notes) as write:
        write(drawn.index)


def read_index(run: OpenRun, number: int) -> pa.Table:
    """Return a round's index.

    Raises:
        RunError: the round has no index yet.
    """
    path = run.store.round(number).index
    if not path.is_file():
        raise RunError(
            f"Round {number} has no index ({path}).",
            "A round trains on exactly the rows of its index.",
            f"Run `dataflex select --round {number}` first." if number else "Run `dataflex warmup`.",
        )
    table = TableFile(path)
    return pa.Table.from_batches(list(table.blocks()), schema=table.schema)
