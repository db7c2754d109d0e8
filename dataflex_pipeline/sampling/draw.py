"""A selection drawn from scores and probabilities, and the weighted index that a round trains on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dataflex_pipeline.api import BlockTable
from dataflex_pipeline.errors import ConfigError, DataError, did_you_mean
from dataflex_pipeline.sampling.apart import KeepsApart, draw_apart
from dataflex_pipeline.sampling.probabilities import ProbabilitySummary, write_probabilities
from dataflex_pipeline.sampling.quotas import amounts_of, balance, interleave
from dataflex_pipeline.sampling.ranked import Rankings, round_robin, round_robin_rows, top_k
from dataflex_pipeline.sampling.rows import BLOCK_ROWS, Rows, count_valid, gather, gather_row_ids
from dataflex_pipeline.sampling.selection import Selection
from dataflex_pipeline.sampling.settings import Drawn, DrawSettings, Order
from dataflex_pipeline.sampling.successive import sample
from dataflex_pipeline.sampling.uniforms import Floats, Integers, permutation
from dataflex_pipeline.sampling.weights import float32_mean_one, weigh
from dataflex_pipeline.schemas import INDEX, SELECTION

__all__ = ["DrawSettings", "Drawn", "draw", "draw_uniform", "top_k_probabilities"]

FOLDS = 3
"""Folds of ``order: folded``, as in Dai et al. 2025, Data Efficacy for Language Model Training (DELT)."""
BLOCK_VALUES = 1 << 22
"""Values of rows by target rows, or by groups, in a block (32 MiB)."""


def draw(
    scores: BlockTable,
    probabilities: BlockTable | None,
    pool: BlockTable,
    settings: DrawSettings,
    *,
    rankings: Rankings | None = None,
    block_rows: int = BLOCK_ROWS,
    apart: KeepsApart | None = None,
) -> Drawn:
    """Select rows and lay them out as an index.

    Reads the tables in blocks: memory grows with the rows selected, not with the pool. The same inputs and
    seed give the same index, whatever the blocks.

    Args:
        scores: ``row``, ``score``, ``valid`` and the group columns. That they are scores of this pool is for
            the caller to know; only the number of rows is compared.
        probabilities: needed by ``sample`` only. The index of another strategy has 1 / (rows selected).
        pool: ``row`` and ``row_id``; ``n_tokens`` for a token budget, ``source`` for quotas.
        settings: what is asked for.
        rankings: with ``over_target_rows``: how each target row values the rows of the pool.
        block_rows: rows read at a time; fewer where there are many groups or target rows.
        apart: with ``max_similarity``: tells which rows are too like each other.

    Raises:
        ConfigError: unknown source or group column, quotas that cannot be filled.
        DataError: nothing to select, or a budget below its first row.
        CorruptError: the tables do not fit together.
    """
    columns = settings.group_columns if settings.strategy == "round_robin" else ("score",)
    if rankings is not None:
        if not rankings.n_turns:
            raise DataError(
                "No target row can take turns: none of them ranks the pool.",
                "round_robin over target rows needs target rows that the method could use.",
                "Look at the reason column of the target's feature table, or set round_robin_over: groups.",
            )
        columns = ()
    width = len(columns) if rankings is None else rankings.n_turns
    block_rows = max(1, min(block_rows, BLOCK_VALUES // max(1, width)))
    _check_columns(scores, columns)
    if settings.balanced:
        settings, amounts = balance(settings, scores, pool)
    else:
        amounts = amounts_of(settings, scores, pool)
    by_probability = settings.strategy == "sample"
    rows = Rows(
        scores,
        pool,
        probabilities=probabilities if by_probability else None,
        columns=columns,
        sources=tuple(settings.source_quotas),
        with_tokens=settings.token_budget is not None,
        block_rows=block_rows,
    )
    if apart is not None:
        selections, notices = draw_apart(rows, settings, amounts, apart, rankings)
    elif rankings is not None:
        selections, notices = round_robin_rows(rows, rankings, settings, amounts)
    else:
        select = {"sample": sample, "top_k": top_k, "round_robin": round_robin}[settings.strategy]
        selections, notices = select(rows, settings, amounts)
    return _lay_out(selections, notices, pool, settings, scores)


def draw_uniform(pool: BlockTable, settings: DrawSettings, *, block_rows: int = BLOCK_ROWS) -> Drawn:
    """Select valid rows of the pool, each with the same probability: the warm-up. Scores are null.

    Args:
        pool: ``row``, ``row_id``, ``valid``; ``n_tokens`` and ``source`` as for ``draw``.
        settings: what is asked for; the strategy is ``sample``.
        block_rows: rows read at a time.

    Raises:
        ConfigError, DataError: as ``draw``.
    """
    if settings.strategy != "sample":
        raise ValueError(f"a uniform draw is a sample, not {settings.strategy}")
    rows = Rows(
        pool,
        pool,
        uniform=1 / count_valid(pool),
        sources=tuple(settings.source_quotas),
        with_tokens=settings.token_budget is not None,
        block_rows=block_rows,
    )
    selections, notices = sample(rows, settings, amounts_of(settings, pool, pool))
    return _lay_out(selections, notices, pool, settings)


def top_k_probabilities(
    scores: BlockTable,
    drawn: Drawn,
    final: Path,
    ingredients: Mapping[str, Any],
    notes: Mapping[str, str] | None = None,
) -> ProbabilitySummary:
    """Write the probabilities of a selection that was not random: 1/k on its k rows, 0 elsewhere.

    Args:
        scores: the table that the rows were drawn from.
        drawn: by ``top_k`` or ``round_robin``.
        final, ingredients, notes: as for ``write_probabilities``.
    """
    chosen = np.sort(drawn.selected)

    def weigh(block: pa.RecordBatch) -> np.ndarray:
        start = block.column("row")[0].as_py()
        first, last = np.searchsorted(chosen, [start, start + block.num_rows])
        weights = np.zeros(block.num_rows)
        weights[chosen[first:last] - start] = 1.0
        return weights

    return write_probabilities(scores, weigh, final, ingredients, notes)


def _check_columns(scores: BlockTable, columns: Sequence[str]) -> None:
    for name in columns:
        if name not in scores.schema.names:
            raise ConfigError(
                f"The score table has no column '{name}'.{did_you_mean(name, scores.schema.names)}",
                f"Its columns are: {', '.join(scores.schema.names)}.",
                "Select by a column that this method writes, or score with the method that writes it.",
            )


def _lay_out(
    selections: list[Selection],
    notices: list[str],
    pool: BlockTable,
    settings: DrawSettings,
    scores: BlockTable | None = None,
) -> Drawn:
    """Return the selected rows in their order, and in training order, repeated or cut to the positions.

    Without ``scores``, those of the tables are null.
    """
    order = interleave([len(chosen.rows) for chosen in selections])
    whole = _Laid.of(selections, order, settings)
    selection = whole.table(np.arange(len(whole.rows)), pool, scores)
    selection = selection.append_column("rank", pa.array(np.arange(1, len(whole.rows) + 1)))
    named = "source" in pool.schema.names
    source = gather(pool, whole.rows, "source") if named else pa.nulls(len(whole.rows), pa.string())
    selection = selection.append_column("source", source)
    notices = [*notices, *_length_notice(len(whole.rows), settings)]
    trained = whole
    if _cuts_the_last(settings) and len(whole.rows) > settings.positions > 0:
        selections, order = _first(selections, order[: settings.positions])
        trained = _Laid.of(selections, order, settings)
    places = _places(len(trained.rows), settings)
    if settings.order != "shuffled" and len(places):
        places = in_order(places, trained.rows, trained.known_scores(scores), settings.order)
    index = trained.table(places, pool, scores).append_column("position", pa.array(np.arange(len(places))))
    return Drawn(
        selection=selection.select(SELECTION.names).cast(SELECTION).combine_chunks(),
        index=index.select(INDEX.names).cast(INDEX).combine_chunks(),
        notices=tuple(notices),
        selected=whole.rows,
        n_distinct=_n_distinct(trained.rows[places]),
        tau=selections[0].tau if len(selections) == 1 else None,
    )


def _cuts_the_last(settings: DrawSettings) -> bool:
    """Whether rows beyond the positions are the last selected ones.

    Of a random draw any part is a draw of that probability, and its weights hold: there a random one.
    """
    return settings.strategy != "sample" or not settings.shuffle


@dataclass(frozen=True)
class _Laid:
    """Selections side by side, in one order. Each [n].

    Attributes:
        rows: row numbers. probabilities: of each. weights: mean 1.
        scores: NaN where a row has none; None where they were not read.
    """

    rows: Integers
    probabilities: Floats
    weights: Floats
    scores: Floats | None

    @classmethod
    def of(cls, selections: Sequence[Selection], order: Integers, settings: DrawSettings) -> _Laid:
        known = [chosen.scores for chosen in selections if chosen.scores is not None]
        return cls(
            np.concatenate([chosen.rows for chosen in selections])[order],
            np.concatenate([chosen.probabilities for chosen in selections])[order],
            np.concatenate([weigh(chosen, settings.weights) for chosen in selections])[order],
            np.concatenate(known)[order] if len(known) == len(selections) else None,
        )

    def known_scores(self, scores: BlockTable | None) -> Floats:
        """Return the scores of the rows, read where they are not known. [n]"""
        if self.scores is not None:
            return self.scores
        if scores is None:
            raise ValueError("rows without scores have no order by score")
        found: Floats = gather(scores, self.rows, "score").to_numpy(zero_copy_only=False).astype(np.float64)
        return found

    def table(self, places: Integers, pool: BlockTable, scores: BlockTable | None) -> pa.Table:
        """Return what a selection and an index both say of the rows at some places."""
        rows = self.rows[places]
        if self.scores is not None:
            score = pa.array(self.scores[places], from_pandas=True)  # NaN: no score
        elif scores is None or not len(rows):
            score = pa.nulls(len(rows), pa.float64())
        else:
            score = gather(scores, rows, "score")
        return pa.table(
            {
                "row": rows,
                "row_id": gather_row_ids(pool, rows) if len(rows) else pa.nulls(0, pa.string()),
                "weight": float32_mean_one(self.weights[places]),
                "probability": self.probabilities[places],
                "score": score,
            }
        )


def _first(selections: list[Selection], order: Integers) -> tuple[list[Selection], Integers]:
    """Shorten the selections to what an order begins with, and return that beginning in their numbering."""
    old = np.cumsum([0, *(len(chosen.rows) for chosen in selections)])
    owner = np.searchsorted(old, order, side="right") - 1
    counts = np.bincount(owner, minlength=len(selections))
    new = np.cumsum([0, *counts])
    shortened = [chosen.first(int(n)) for chosen, n in zip(selections, counts, strict=True)]
    return shortened, order - old[owner] + new[owner]


def _places(n: int, settings: DrawSettings) -> Integers:
    """Return which selected row stands at each position: passes over all of them, the last one cut.

    Every pass has a random order of its own, or with ``shuffle`` false the order of selection.
    """
    if not settings.positions:
        return np.zeros(0, np.int64)
    passes = -(-settings.positions // n)
    orders = [
        permutation(n, settings.seed, "pass", number) if settings.shuffle else np.arange(n)
        for number in range(passes)
    ]
    places: Integers = np.concatenate(orders)[: settings.positions]
    return places


def in_order(places: Integers, rows: Integers, scores: Floats, order: Order) -> Integers:
    """Return places put in order by score, pass by pass; which rows a pass has stays as it was.

    Args:
        places: of rows in the selection, pass after pass. [positions]
        rows: row numbers, which break ties. [n]
        scores: of the rows. [n]
        order: ascending; descending; or folded: ascending, then dealt out to `FOLDS` folds in turns, and one
            fold after the other, so that every fold goes from low to high.
    """
    sign = -1 if order == "descending" else 1
    found = []
    for start in range(0, len(places), len(rows)):
        some = places[start : start + len(rows)]
        some = some[np.lexsort((rows[some], sign * scores[some]))]
        folds = FOLDS if order == "folded" else 1
        found += [some[fold::folds] for fold in range(folds)]
    return np.concatenate(found)


def _length_notice(selected: int, settings: DrawSettings) -> list[str]:
    positions = settings.positions
    if not positions:
        return []
    if selected < positions:
        order = "reshuffled" if settings.shuffle else "in the same order"
        order = order if settings.order == "shuffled" else f"{settings.order} by score"
        return [f"{selected} rows were selected for {positions} positions: repeated, each pass {order}."]
    if selected > positions:
        which = "the first of them are" if _cuts_the_last(settings) else "a random part of them is"
        return [f"{selected} rows were selected for {positions} positions: {which} trained on."]
    return []


def _n_distinct(rows: Integers) -> int:
    """Count the different rows; sorting takes a fiftieth of the time of numpy's hash table."""
    return int(np.count_nonzero(np.diff(np.sort(rows)))) + 1 if len(rows) else 0
