"""The turns of rows, decoded by the run's own tokenizer where it is at hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dataflex_pipeline.pipeline.decoding import Decode, decoder
from dataflex_pipeline.pipeline.run import Run
from dataflex_pipeline.reports.page.turns import Turn, turns_of
from dataflex_pipeline.store.parts import PartedTable
from dataflex_pipeline.store.run import RunFolder


class Conversations:
    """The turns of the rows of one run.

    Attributes:
        notices: what could not be told of them.
    """

    def __init__(self, run: RunFolder) -> None:
        self._run = run
        self._last_only = bool(PartedTable.open(run.pool).ingredients.get("mask_history"))
        self._decode: Decode | None = None
        self._looked = False
        self.notices: list[str] = []

    def of(self, row: Mapping[str, Any]) -> Sequence[Turn]:
        """Return the turns of a prepared row, which is called for one that has tokens first or later."""
        if not self._looked and row["input_ids"]:
            self._looked = True
            why: list[str] = []
            self._decode = decoder(Run.open(self._run.folder), row["input_ids"], why, quick=True)
            self.notices += [f"Answers are marked by their role: {line}." for line in why]
        return turns_of(row, self._decode, self._last_only)
