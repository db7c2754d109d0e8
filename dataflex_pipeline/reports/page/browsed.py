"""The rows that a report's page shows one by one: which they are, and all that the run says of each.

At most ROWS: rows that were selected (of the last round first, by rank), those with the best and the worst
scores of every table shown, rows that cannot be used (of every reason some), and rows drawn at random; where
there is room left, more at random, so that a small pool is there whole. Which rows are drawn depends on the
pool alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from dataflex_pipeline.reports.catalogue import RunTable
from dataflex_pipeline.reports.page.turns import Turn
from dataflex_pipeline.reports.query import Queries, quoted
from dataflex_pipeline.schemas import ORIGINAL, SCORES

ROWS = 2000
SELECTED, EXTREME, AT_RANDOM, INVALID = 900, 200, 400, 200
"""Rows of each list at most: selected, best and worst (each), at random, not usable."""
MESSAGE = 20_000
"""Characters of a message, and tokens of a row, that are looked at."""
OWN = 200
"""Characters of a column of the user's own, or of a method's, that are shown."""
BATCH = 128
"""Rows whose tokens are in memory at a time."""
Conversation = Callable[[Mapping[str, Any]], Sequence[Turn]]
LISTS = ("selected", "best", "worst", "random", "invalid")


@dataclass
class Browsed:
    """A row on the page.

    Attributes:
        facts: columns of the prepared pool. turns: its conversation, each turn cut to MESSAGE characters.
        lists: which of LISTS it is in.
        scores: of each table shown: score, rank, probability, and the method's columns; None where the table
            does not have the row.
        selected: round -> rank (None without a selection), times drawn, weight, probability.
    """

    facts: Mapping[str, Any]
    turns: Sequence[Turn] = ()
    lists: set[str] = field(default_factory=set)
    scores: list[list[Any] | None] = field(default_factory=list)
    selected: dict[int, list[Any]] = field(default_factory=dict)


def browsed(
    queries: Queries,
    pool: RunTable,
    scores: Sequence[RunTable],
    probabilities: Mapping[str, RunTable],
    chosen: Sequence[RunTable],
    ranked: Mapping[int | None, RunTable],
    conversation: Conversation,
    most: int = ROWS,
) -> list[Browsed]:
    """Return the rows to show, by number.

    Args:
        queries: over the run's tables. pool: the prepared rows.
        scores: the score tables to show. probabilities: view of scores -> probabilities of the same method.
        chosen: of each round, the table of its rows. ranked: round -> its selection, where it has one.
        conversation: from a prepared row to its turns.
        most: rows at most.
    """
    lists = _lists(queries, pool, scores, chosen, most)
    found = {
        facts["row"]: Browsed(facts, turns, lists[facts["row"]])
        for facts, turns in _facts(queries, pool, list(lists), conversation)
    }
    for table in scores:
        by_row = _scores(queries, table, probabilities.get(table.view), list(found))
        for row, each in found.items():
            each.scores.append(by_row.get(row))
    for table in chosen:
        ranks = _ranks(queries, ranked.get(table.round), list(found))
        for row, line in _chosen(queries, table, list(found)).items():
            found[row].selected[table.round or 0] = [ranks.get(row), *line]
    return [found[row] for row in sorted(found)]


def _lists(
    queries: Queries,
    pool: RunTable,
    scores: Sequence[RunTable],
    chosen: Sequence[RunTable],
    most: int,
) -> dict[int, set[str]]:
    """Return the rows that are shown, and which lists each is in."""
    found: dict[int, set[str]] = {}
    scale = most / ROWS

    def add(name: str, rows: Iterator[int] | Sequence[int], n: float) -> None:
        for row in list(rows)[: max(int(n * scale), 1)]:
            if row in found or len(found) < most:
                found.setdefault(row, set()).add(name)

    for table in reversed(chosen):
        add("selected", _best_chosen(queries, table, SELECTED), SELECTED / len(chosen))
    for table in reversed(scores):
        relation = queries.table(table.view).filter("valid and isfinite(score)").project("row, score")
        for name, order in (("best", "score desc, row"), ("worst", "score, row")):
            n = EXTREME / len(scores)
            add(name, _rows(relation.order(order).limit(int(n) + 1)), n)
    add("invalid", _invalid(queries, pool), INVALID)
    valid = queries.table(pool.view).filter("valid").project("row").order("hash(row), row")
    drawn = _rows(valid.limit(most))
    add("random", drawn[: int(AT_RANDOM * scale)], AT_RANDOM)
    add("random", drawn, most)
    return found


def _rows(relation: Any) -> list[int]:
    return [int(line[0]) for line in relation.fetchall()]


def _best_chosen(queries: Queries, table: RunTable, n: int) -> list[int]:
    """Return the first rows of a round: of a selection by rank, of an index those with the highest scores."""
    place = "min(rank)" if "rank" in table.schema.names else "-max(score)"
    placed = queries.table(table.view).aggregate(f"row, {place} as place", "row")
    return _rows(placed.order("place nulls last, row").limit(n))


def _invalid(queries: Queries, pool: RunTable) -> list[int]:
    """Return rows that are not usable: of every reason the first, then of every reason the second, ..."""
    relation = queries.table(pool.view).filter("not valid")
    placed = relation.project("row, row_number() over (partition by reason order by row) as place")
    return _rows(placed.order("place, row").limit(INVALID).project("row"))


def _among(rows: Sequence[int]) -> str:
    return f"row in ({', '.join(map(str, rows))})" if rows else "false"


def _facts(
    queries: Queries, pool: RunTable, rows: Sequence[int], conversation: Conversation
) -> Iterator[tuple[dict[str, Any], Sequence[Turn]]]:
    """Yield the prepared columns of rows, long texts cut where they are read, and their turns."""
    names = set(pool.schema.names)
    plain = [name for name in ("file", "line", "note") if name in names]
    cut = (
        f"[{{'role': m.role, 'content': left(m.content, {MESSAGE}), 'length': length(m.content)}} "
        "for m in messages] as messages"
    )
    own = [
        f"left({quoted(each.name)}::varchar, {OWN + 1}) as {quoted(each.name)}"
        for each in pool.schema
        if each.name.startswith(ORIGINAL) and not pa.types.is_nested(each.type)
    ]
    tokens = [f"{name}[:{MESSAGE}] as {name}" for name in ("input_ids", "labels")]
    columns = ["row", "row_id", "source", "valid", "left(reason, 500) as reason", "n_tokens"]
    columns += ["n_response_tokens", *plain, cut, *tokens, *own]
    relation = queries.table(pool.view).filter(_among(rows)).project(", ".join(columns))
    for batch in relation.fetch_arrow_reader(BATCH):
        for line in batch.to_pylist():
            turns = conversation(line)
            yield (
                {name: line[name] for name in line if name not in ("messages", "input_ids", "labels")},
                turns,
            )


def _scores(
    queries: Queries, table: RunTable, drawn: RunTable | None, rows: Sequence[int]
) -> dict[int, list[Any]]:
    """Return, by row, what a score table says of it: score, rank, probability, the method's own columns."""
    ranked = queries.table(table.view).filter("valid and isfinite(score)")
    ranked = ranked.project("row, row_number() over (order by score desc, row) as place")
    places = dict(ranked.filter(_among(rows)).fetchall())
    probabilities = {}
    if drawn is not None:
        relation = queries.table(drawn.view).filter(_among(rows)).project("row, probability")
        probabilities = dict(relation.fetchall())
    own = [
        f"left({quoted(name)}, {OWN})" if pa.types.is_string(table.schema.field(name).type) else quoted(name)
        for name in own_columns(table)
    ]
    relation = (
        queries.table(table.view)
        .filter(_among(rows))
        .project(", ".join(["row", "score", "left(reason, 200)", *own]))
    )
    return {
        line[0]: [line[1], places.get(line[0]), probabilities.get(line[0]), line[2], *line[3:]]
        for line in relation.fetchall()
    }


def own_columns(table: RunTable) -> list[str]:
    """Return the names of a method's own columns: plain values, beside the columns of every score table."""
    return [
        each.name
        for each in table.schema
        if each.name not in SCORES.names and not pa.types.is_nested(each.type)
    ]


def _chosen(queries: Queries, table: RunTable, rows: Sequence[int]) -> dict[int, list[Any]]:
    """Return, by row, its line in a round: times, weight, probability."""
    numbers = "row, count(*), max(weight)::double, max(probability)"
    lines = queries.table(table.view).filter(_among(rows)).aggregate(numbers, "row").fetchall()
    return {line[0]: list(line[1:]) for line in lines}


def _ranks(queries: Queries, table: RunTable | None, rows: Sequence[int]) -> dict[int, int]:
    if table is None:
        return {}
    return dict(queries.table(table.view).filter(_among(rows)).aggregate("row, min(rank)", "row").fetchall())


def plain_number(value: Any) -> Any:
    """Return a number with six digits, so that a page of many is small; what is not finite as None."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if np.isfinite(value) else None
    return value
