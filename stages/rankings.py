"""How each target row ranks the pool, from the method's own tables, for ``round_robin`` over target rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np

from dataflex_pipeline import api
from dataflex_pipeline.store.parts import PartedTable

from .blocks import block_rows, pool_blocks
from .context import Context
from .score import Scoring, feature_tables


class PoolRankings:
    """The values of the pool's rows for every target row, made block by block (see `sampling.turns`).

    Args:
        context: of the run; feature tables that are not there any more are made again.
        scoring: of the round.

    Attributes:
        n_turns: target rows that take turns. notices: what the method said.
        block_rows: rows per block, so that wide features never fill the memory.
    """

    def __init__(self, context: Context, scoring: Scoring) -> None:
        self.notices: list[str] = []
        self._scoring = scoring
        self._tables: Mapping[str, PartedTable] = feature_tables(context, scoring)
        selection = replace(scoring.selection, say=self.notices.append)
        self._ranking: api.TargetRanking = scoring.method.by_target_row(self._tables, selection)
        self.n_turns = len(self._ranking.rows)
        self.block_rows = block_rows(scoring, self._tables)

    def blocks(self, max_rows: int) -> Iterator[np.ndarray]:
        """Yield values of consecutive rows of the pool. [rows, n_turns]"""
        for block in pool_blocks(self._scoring, self._tables, max_rows):
            yield self._ranking.values(block)
