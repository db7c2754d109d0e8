"""The methods that were scored in one run, side by side: what each prefers, and where they disagree.

Per round and pair of methods: Spearman's rank correlation of the scores over the rows that both scored, and
how many of the K best rows (highest score first, ties by row) they have in common. K is the number of rows
that the round selected. All of it is counted over the score tables as streams.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any

from dataflex_pipeline.errors import RunError
from dataflex_pipeline.reports.catalogue import RunTable, tables_of
from dataflex_pipeline.reports.likeness import TOP, ranked_alike
from dataflex_pipeline.reports.query import Queries, dictionaries, open_queries, quoted
from dataflex_pipeline.store.run import RunFolder
from dataflex_pipeline.store.tables import TableFile

if TYPE_CHECKING:
    from duckdb import DuckDBPyRelation

FINITE = "isfinite(score)"
BEST_FIRST = "score desc, row"
TEXT = 160
"""Characters shown of a row's first user message."""


def compare_methods(run: RunFolder, top: int | None = None, n_rows: int = 3) -> dict[str, Any]:
    """Return how the methods scored in a run compare, round by round, as plain values.

    Args:
        run: the run.
        top: how many of each method's best rows are compared; None: as many rows as the round selected,
            and where none were, a tenth of the rows that were scored.
        n_rows: rows shown that only one of two methods likes.

    Raises:
        RunError: there is no such run, or no round of it is scored.
        CorruptError: a table is damaged.
    """
    if not run.exists():
        raise RunError(
            f"There is no run at {run.folder}.",
            "A run's folder holds a run.yaml.",
            "Name a run below runs_dir, or give the path of its folder.",
        )
    tables = tables_of(run)
    scores = [table for table in tables if table.kind == "scores"]
    if not scores:
        raise RunError(
            f"No round of the run {run.folder} is scored.",
            "Methods are compared by their score tables.",
            f"Run `dataflex score --run {run.folder.name} --round 1 --method NAME` for each method first.",
        )
    rounds = sorted({table.round or 0 for table in scores})
    with open_queries(tables) as queries:
        found = [_Round(queries, run, number, tables).plain(top, n_rows) for number in rounds]
    return {"run": run.folder.name, "rounds": found}


class _Round:
    """One round's score tables.

    Args:
        queries: over the run's tables. run: the run. number: the round. tables: all of the run's.
    """

    def __init__(self, queries: Queries, run: RunFolder, number: int, tables: Sequence[RunTable]) -> None:
        self.queries, self.run, self.number = queries, run, number
        of_round = [table for table in tables if table.round == number]
        self.scores = [table for table in of_round if table.kind == "scores"]
        self.index = next((table for table in of_round if table.kind == "index"), None)
        self.pool = next((table for table in tables if table.kind == "pool"), None)

    def plain(self, top: int | None, n_rows: int) -> dict[str, Any]:
        """Return what is to be said of the round."""
        spans = {table.name: self._span(table) for table in self.scores}
        selected = self._selected()
        most = max(n for n, _ in spans.values())
        size = top or selected or max(1, round(TOP * most))
        ordered = [table for table in self.scores if spans[table.name][1]]
        return {
            "round": self.number,
            "selected": selected,
            "selected_by": None if self.index is None else self.index.notes().get("method"),
            "top": size,
            "top_is": "asked for" if top else "selected" if selected else "a tenth of the scored rows",
            "methods": [
                {
                    "method": table.name,
                    "scored": spans[table.name][0],
                    "has_order": table in ordered,
                    "sources": self._sources(table, size) if table in ordered else [],
                }
                for table in self.scores
            ],
            "pairs": [self._pair(one, other, size, n_rows) for one, other in combinations(ordered, 2)],
        }

    def _span(self, table: RunTable) -> tuple[int, bool]:
        """Return how many rows have a score, and whether they differ in it."""
        scored = self.queries.table(table.view).filter(FINITE)
        n, low, high = scored.aggregate("count(*), min(score), max(score)").fetchall()[0]
        return int(n), bool(n and low != high)

    def _selected(self) -> int | None:
        """Return how many different rows the round selected; None where it has not."""
        selection = self.run.round(self.number).folder / "selection.parquet"
        if selection.is_file():
            return TableFile(selection).n_rows
        if self.index is None:
            return None
        rows = self.queries.table(self.index.view).aggregate("count(distinct row)")
        return int(rows.fetchall()[0][0])

    def _best(self, table: RunTable, size: int) -> DuckDBPyRelation:
        """Return a method's best rows: row, score."""
        scored = self.queries.table(table.view).filter(FINITE)
        return scored.order(BEST_FIRST).limit(size).project("row, score")

    def _sources(self, table: RunTable, size: int) -> list[dict[str, Any]]:
        """Return, by source, how many of the best rows are of it, and the shares there and in the pool."""
        if self.pool is None:
            return []
        pool = self.queries.table(self.pool.view)
        sizes = dict(pool.filter("valid").aggregate("source, count(*) as n", "source").fetchall())
        best = self._best(table, size).join(pool.project("row, source"), "row", how="inner")
        counts = dict(best.aggregate("source, count(*) as n", "source").fetchall())
        total, taken = sum(sizes.values()), sum(counts.values())
        return [
            {
                "source": source,
                "rows": counts.get(source, 0),
                "share": counts.get(source, 0) / taken if taken else 0.0,
                "share_of_pool": n / total if total else 0.0,
            }
            for source, n in sorted(sizes.items(), key=lambda each: (-each[1], each[0]))
        ]

    def _pair(self, one: RunTable, other: RunTable, size: int, n_rows: int) -> dict[str, Any]:
        n_both, correlation = ranked_alike(one.path, other.path)
        a, b = (self._best(table, size) for table in (one, other))
        named = b.project("row as other_row")
        common = a.join(named, "row = other_row", how="inner").aggregate("count(*)").fetchall()[0][0]
        smaller = min(each.aggregate("count(*)").fetchall()[0][0] for each in (a, b))
        return {
            "methods": [one.name, other.name],
            "scored_by_both": n_both,
            "rank_correlation": correlation,
            "in_common": int(common),
            "share": common / smaller if smaller else 0.0,
            "only": {
                liking.name: self._only(liking, against, size, n_rows)
                for liking, against in ((one, other), (other, one))
            },
        }

    def _only(self, liking: RunTable, against: RunTable, size: int, n_rows: int) -> list[dict[str, Any]]:
        """Return best rows of one method that the other ranks lowest, and not among its own best."""
        if n_rows < 1:
            return []
        theirs = self.queries.table(against.view).filter(FINITE).project("row, score as other_score")
        best = self._best(against, size).project("row as best_row")
        joined = self._best(liking, size).join(theirs, "row", how="inner")
        lines = dictionaries(
            joined.join(best, "row = best_row", how="left")
            .filter("best_row is null")
            .project("row, score, other_score")
            .order("other_score, row desc")
            .limit(n_rows)
        )
        ranks = self._ranks(liking, [(line["row"], line["score"]) for line in lines])
        others = self._ranks(against, [(line["row"], line["other_score"]) for line in lines])
        texts = self._texts([line["row"] for line in lines])
        return [
            {**line, "rank": rank, "other_rank": other, **texts.get(line["row"], {})}
            for line, rank, other in zip(lines, ranks, others, strict=True)
        ]

    def _ranks(self, table: RunTable, places: Sequence[tuple[int, float]]) -> list[int]:
        """Return the places of rows in a method's order; 1 is the best."""
        if not places:
            return []
        before = [
            f"count(*) filter (score > {score!r}::double or (score = {score!r}::double and row < {row}))"
            for row, score in places
        ]
        found = self.queries.table(table.view).filter(FINITE).aggregate(", ".join(before))
        return [int(n) + 1 for n in found.fetchall()[0]]

    def _texts(self, rows: Sequence[int]) -> Mapping[int, dict[str, Any]]:
        """Return source and a short text of rows; nothing where the pool is not there."""
        if self.pool is None or not rows:
            return {}
        listed = ", ".join(map(str, sorted(rows)))
        pool = self.queries.table(self.pool.view).filter(f"row in ({listed})")
        names = ", ".join(map(quoted, ("row", "row_id", "source", "messages")))
        return {line.pop("row"): _short(line) for line in dictionaries(pool.project(names))}


def _short(line: dict[str, Any]) -> dict[str, Any]:
    """Return a row with the beginning of its first user message in place of its messages."""
    text = next(_users(line.pop("messages") or []), "")
    shown = text if len(text) <= TEXT else f"{text[:TEXT]}..."
    return {**line, "text": shown}


def _users(messages: Sequence[Mapping[str, str]]) -> Iterator[str]:
    for message in messages:
        if message["role"] == "user":
            yield " ".join(message["content"].split())
