"""Scoring a round: the plan of a method's score table, the table, and its freshness.

With ``candidates`` a cheaper method scores the round first, and the method is asked about its best rows alone
(features/candidates.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import chain, repeat
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

from dataflex_pipeline import api
from dataflex_pipeline.config.candidates import CandidateRule
from dataflex_pipeline.config.components import ComponentEntry
from dataflex_pipeline.declared.method import own_columns
from dataflex_pipeline.errors import DataError, RunError
from dataflex_pipeline.features.candidates import Candidates, CandidateTable, Cascade
from dataflex_pipeline.features.plan import FeaturePlan, method_needs, plan_feature, ranking_needs
from dataflex_pipeline.pipeline.base_model import is_given
from dataflex_pipeline.pipeline.checkpoints import checkpoints_before
from dataflex_pipeline.pipeline.feature_tables import feature_input, feature_tables, rows_per_part
from dataflex_pipeline.pipeline.open_run import OpenRun
from dataflex_pipeline.pipeline.output import Output, note
from dataflex_pipeline.pipeline.prepare import open_split
from dataflex_pipeline.pipeline.score_checks import check_pool_columns, check_scored_round
from dataflex_pipeline.pipeline.scored_block import Unscored, beside_candidates, score_block, write_rescored
from dataflex_pipeline.schemas import SCORES
from dataflex_pipeline.seeds import derive_seed
from dataflex_pipeline.store.fingerprint import changes, digest, file_digest
from dataflex_pipeline.store.parquet import ROW_GROUP
from dataflex_pipeline.store.parts import PartedTable
from dataflex_pipeline.store.ranks import column_values, count, quantiles
from dataflex_pipeline.store.stale import found_ingredients, is_current
from dataflex_pipeline.store.tables import TableFile, table_writer, zip_blocks
from dataflex_pipeline.training.marker import read_marker

BLOCK_BYTES = 1 << 25
"""Bytes of one feature per block, at most about."""
FEWEST_ROWS = 256
FIRST = ".first"
"""Ending of a score table that is looked at as a whole before its scores are final."""


@dataclass(frozen=True)
class Scoring:
    """Everything that a method needs to score one round, worked out and not yet computed.

    Attributes:
        name: the method's configuration name. method: itself. entry: its configuration.
        selection: what it knows. lines: what it said. pool: the prepared pool.
        needs: plans of the feature tables, by the method's own names.
        before: the method's own scores of the round before, where it adds to them.
        other_before: why scores of the round before that are there are not added to; empty otherwise.
        wanted: ingredients of the score table.
        chooser: the method whose best rows are the candidates; None where every row is scored.
        cascade: those rows.
    """

    name: str
    method: api.Method
    entry: ComponentEntry
    selection: api.Selection
    lines: list[str]
    pool: PartedTable
    needs: Mapping[str, FeaturePlan]
    before: TableFile | None
    other_before: str
    wanted: dict[str, Any]
    chooser: str | None = None
    cascade: Cascade | None = None

    @property
    def candidates(self) -> Candidates | None:
        """The rows that are scored; None where all are."""
        return None if self.cascade is None else self.cascade.candidates

    @property
    def rows(self) -> PartedTable:
        """The pool as the method sees it: rows that are no candidates are not valid."""
        return self.pool if self.candidates is None else CandidateTable(self.pool, self.candidates)


def plan_scoring(run: OpenRun, number: int, name: str) -> Scoring:
    """Work out what scoring a round takes; checks the method, its parameters and the checkpoints."""
    method, entry = run.method(name)
    check_scored_round(run, number)
    lines: list[str] = []

    def say(text: str) -> None:
        if not isinstance(text, str):  # told with the line of the method that says it
            raise TypeError(f"selection.say takes a text, and was given {text!r:.60}")
        lines.append(text)
        run.progress.say(f"  {name}: {text}")

    own = run.given.seed if entry.seed is None else entry.seed
    seed, shared = derive_seed(own, "method", name, number), derive_seed(own, "features", number)
    params = method.params.model_dump(mode="json")
    chosen = candidates(run, number, name)
    rule, cascade = (None, None) if chosen is None else chosen
    before, other = _scores_before(run, number, name, params, cascade) if method.accumulates else (None, "")
    rate = _learning_rate(run, number - 1)
    several = checkpoints_before(run, number, name) if method.every_checkpoint else ()
    selection = api.Selection(
        number,
        run.given.last_round,
        seed,
        say,
        rate,
        before is not None,
        several,
        shared_seed=shared,
        device=run.given.device,
    )
    pool = open_split(run, "pool")
    check_pool_columns(name, method, pool.schema.names)
    method.check_pool(pool.n_rows)
    part = rows_per_part(run, entry)
    needs = _planned(run, method_needs(method, selection), part, cascade)
    wanted = {
        "table": "scores",
        "method": name,
        "implementation": _implementation(entry),
        "version": method.version,
        "params": params,
        "round": number,
        "update_times": selection.update_times,
        "seed": seed,
        "pool": pool.fingerprint,
        "features": {key: plan.fingerprint for key, plan in needs.items()},
    }
    if rule is not None and cascade is not None:
        wanted["candidates"] = {**rule.plain(), "chosen": cascade.candidates.digest}
    if method.accumulates:
        wanted |= {"before": before.fingerprint if before is not None else None, "learning_rate": rate}
    if several:
        wanted["checkpoints"] = [{"step": one.step, "learning_rate": one.learning_rate} for one in several]
    return Scoring(
        name,
        method,
        entry,
        selection,
        lines,
        pool,
        needs,
        before,
        other,
        wanted,
        None if rule is None else rule.method,
        cascade,
    )


def candidates(run: OpenRun, number: int, name: str) -> tuple[CandidateRule, Cascade] | None:
    """Return how the candidates of a method are chosen, and which rows they are; None where it has none.

    Raises:
        RunError: the method that chooses them has not scored the round.
        StaleError: it did, with other settings.
    """
    rule = run.given.candidates_of(name)
    if rule is None:
        return None
    chooser = Scores(run, number, rule.method)
    if not chooser.is_current():
        raise RunError(
            f"Round {number} has no finished {rule.method} scores ({chooser.path}).",
            f"{name} is asked about the best rows of {rule.method} alone (candidates).",
            f"Run `dataflex score --round {number} --method {name}`: it scores with {rule.method} first.",
        )
    table = TableFile(chooser.path)
    wanted = rule.count(count(column_values(table, "score")))
    whole = {plan.fingerprint for need in chooser.plan.needs.values() for plan in need.with_upstream()}
    return rule, Cascade(Candidates.best(chooser.path, wanted), frozenset(whole))


def scores_of(run: OpenRun, number: int, name: str) -> list[Scores]:
    """Return a method's score table of a round, after that of the method that chooses its candidates."""
    rule = run.given.candidates_of(name)
    first = [] if rule is None else [Scores(run, number, rule.method)]
    return [*first, Scores(run, number, name)]


def _planned(
    run: OpenRun,
    needs: Mapping[str, api.Need],
    rows_per_part: int | Literal["auto"],
    cascade: Cascade | None,
) -> dict[str, FeaturePlan]:
    return {
        key: plan_feature(need, run.config, partial(feature_input, run), rows_per_part, cascade)
        for key, need in needs.items()
    }


def ranking_plan(run: OpenRun, scoring: Scoring) -> Scoring:
    """Return a scoring with the features that the method ranks the pool by target row with."""
    needs = ranking_needs(scoring.method, scoring.selection)
    if needs == method_needs(scoring.method, scoring.selection):
        return scoring
    part = rows_per_part(run, scoring.entry)
    return replace(scoring, needs=_planned(run, needs, part, scoring.cascade))


def _scores_before(
    run: OpenRun, number: int, name: str, params: Mapping[str, Any], cascade: Cascade | None
) -> tuple[TableFile | None, str]:
    """Return the scores to add to; or None and, where those there are of other parameters or rows, which."""
    path = run.store.round(number - 1).scores(name)
    if not path.is_file():
        return None, ""
    made_from = found_ingredients(path) or {}
    found = changes(made_from.get("params", {}), params)
    now = None if cascade is None else cascade.candidates.digest
    if made_from.get("candidates", {}).get("chosen") != now:
        return None, (
            f"round {number - 1} scored other candidates: its scores are not added, the sum over rounds "
            "starts here"
        )
    if not found:
        return TableFile(path), ""
    listed = ", ".join(found)
    return (
        None,
        f"the scores of round {number - 1} were made with other parameters and do not count: {listed}",
    )


def _learning_rate(run: OpenRun, number: int) -> float:
    """Return the mean rate of a round's steps; of the model as it is given, the configured peak."""
    if is_given(run, number):
        return run.given.learning_rate
    marker = read_marker(run.store.round(number).checkpoint)
    return float((marker.result or {}).get("mean_learning_rate", 0.0)) if marker is not None else 0.0


def _implementation(entry: ComponentEntry) -> str:
    if entry.file is not None:
        return f"file {file_digest(Path(entry.file))}"
    return f"module {entry.module}" if entry.module is not None else f"shipped {entry.kind}"


class Scores(Output):
    """A method's score table of a round.

    Args:
        run: that it belongs to.
        number: the round.
        method: the method's configuration name.

    Attributes:
        before_features: called before the missing features are computed.
    """

    before_features: Callable[[], None] | None = None

    def __init__(self, run: OpenRun, number: int, method: str) -> None:
        super().__init__(
            run,
            f"round {number} scores/{method}",
            f"score {method}, round {number}",
            f"The {method} scores of round {number}",
            run.store.round(number).scores(method),
        )
        self.number, self.method = number, method
        rule = run.given.candidates_of(method)
        chooser = () if rule is None else (f"round {number} scores/{rule.method}",)
        self.follows = ("pool", f"round {number - 1} checkpoint", *chooser)

    @cached_property
    def plan(self) -> Scoring:
        """Everything that scoring takes; checks the method, its parameters and the checkpoints."""
        return plan_scoring(self.run, self.number, self.method)

    def inputs(self) -> dict[str, Any]:
        """Return the method with its parameters, and the fingerprints of pool and features."""
        return self.plan.wanted

    def check(self) -> None:
        """Check the table against the digest that was remembered when it was written."""
        self.run.memo.check_output(self.path)

    def is_current(self, *, overwrite: bool = False) -> bool:
        """Decide whether the table can be kept; what changed in its features is named too."""
        look_up = partial(_feature_ingredients, self.run, self.plan)
        return is_current(self.path, self.inputs(), self.name, overwrite=overwrite, look_up=look_up)

    def write(self) -> None:
        """Compute the missing features and score every row of the pool."""
        began = time.monotonic()
        self.run.memo.forget_output(self.path)
        if self.before_features is not None:
            self.before_features()
        _write_scores(self.run, self.plan)
        self.run.memo.written(self.path)
        note(self.run, "score", self.number, began, on_device=bool(self.plan.needs), method=self.method)

    def describe(self) -> str:
        """Return the number of scored rows and the spread of the score."""
        table = TableFile(self.path)
        low, middle, high = quantiles(column_values(table, "score"), [0.0, 0.5, 1.0])
        scored, among = count(column_values(table, "score")), table.metadata.get("candidates")
        return (
            f"{scored:,} of {table.n_rows:,} rows scored{f', {among}' if among else ''}: min {low:.4g}, "
            f"median {middle:.4g}, max {high:.4g}"
        )


def _feature_ingredients(run: OpenRun, scoring: Scoring, fingerprint: str) -> Mapping[str, Any] | None:
    """Return what a feature table of this scoring, or one on disk, is made from."""
    plans = list(scoring.needs.values())
    while plans:
        plan = plans.pop()
        if plan.fingerprint == fingerprint:
            return plan.ingredients
        plans += plan.upstream.values()
    folders = dict.fromkeys([run.features, *run.store.feature_folders()])
    for folder in chain.from_iterable(each.glob(f"*-{fingerprint[:16]}*") for each in folders):
        found = found_ingredients(folder)
        if found is not None and digest(found) == fingerprint:
            return found
    return None


def _write_scores(run: OpenRun, scoring: Scoring) -> None:
    tables = feature_tables(run, scoring)
    if scoring.other_before:
        scoring.selection.say(scoring.other_before)
    if scoring.method.accumulates and is_given(run, scoring.selection.round - 1):
        rate = scoring.selection.learning_rate
        scoring.selection.say(f"no warm-up: similarities are weighed by learning_rate, {rate:.3g}")
    state = scoring.method.begin(tables, scoring.selection)
    schema = pa.schema([*SCORES, *own_columns(scoring.method, state)])
    notes = {"method": scoring.name, "round": str(scoring.selection.round)}
    output = run.store.round(scoring.selection.round).scores(scoring.name)
    n_valid, unscored = 0, Unscored()
    first = output.with_name(output.name + FIRST) if scoring.method.rescores else output
    with table_writer(first, schema, scoring.wanted, notes) as write:
        for block, chosen in zip(
            pool_blocks(scoring, tables), _chooser_blocks(scoring, tables), strict=False
        ):
            table = score_block(scoring.method, block, state, schema)
            n_valid += pc.sum(table.column("valid")).as_py() or 0
            unscored.see(block, table)
            if chosen is not None:
                table = beside_candidates(table, block.pool, chosen, scoring.chooser or "")
            write(table)
        if n_valid == 0:
            raise DataError(
                f"The method {scoring.name} gave no row a score.",
                f"Every row is invalid, so nothing can be selected: {unscored.examples}.",
                "Correct what the reasons name; the run's tables in pool/ and features/ give every row's.",
            )
        unscored.say(scoring.selection.say)
        if scoring.candidates is not None:
            notes["candidates"] = f"the {scoring.candidates.count:,} candidates of {scoring.chooser}"
        notes["notices"] = "\n".join(scoring.lines)
    if first != output:
        with table_writer(output, schema, scoring.wanted, notes) as write:
            write_rescored(scoring.method, scoring.selection, first, write)
        first.unlink()


def _chooser_blocks(scoring: Scoring, tables: Mapping[str, PartedTable]) -> Iterator[pa.RecordBatch | None]:
    """Yield, beside `pool_blocks`, what the method that chose the candidates says of every row; else None."""
    if scoring.candidates is None:
        yield from repeat(None)
        return
    table = TableFile(scoring.candidates.scores)
    for (block,) in zip_blocks((table, ["valid", "reason"]), max_rows=block_rows(scoring, tables)):
        yield block


def pool_blocks(
    scoring: Scoring, tables: Mapping[str, PartedTable], max_rows: int | None = None
) -> Iterator[api.Block]:
    """Yield what a method sees of the pool, in row order.

    Args:
        scoring: the round's. tables: every table that the method needs, finished.
        max_rows: rows per block; by default `block_rows`.
    """
    over_pool = _over_pool(scoring, tables)
    columns = ["row", "row_id", "valid", "reason", *scoring.method.pool_columns]
    sources: list[tuple[api.BlockTable, list[str]]] = [(scoring.rows, columns)]
    sources += [(table, table.schema.names) for table in over_pool.values()]
    if scoring.before is not None:
        sources.append((scoring.before, scoring.before.schema.names))
    for pool, *others in zip_blocks(*sources, max_rows=max_rows or block_rows(scoring, tables)):
        features = dict(zip(over_pool, others[: len(over_pool)], strict=True))
        yield api.Block(pool, features, others[-1] if scoring.before is not None else None)


def block_rows(scoring: Scoring, tables: Mapping[str, PartedTable]) -> int:
    """Return the rows of a block, so that wide features (gradients) never fill the memory."""
    widest = max((_row_bytes(table) for table in _over_pool(scoring, tables).values()), default=1)
    return max(FEWEST_ROWS, min(ROW_GROUP, BLOCK_BYTES // widest))


def _over_pool(scoring: Scoring, tables: Mapping[str, PartedTable]) -> dict[str, PartedTable]:
    return {key: tables[key] for key, plan in scoring.needs.items() if plan.need.split == "pool"}


def _row_bytes(table: PartedTable) -> int:
    sizes: list[int] = [
        column.type.list_size * column.type.value_type.bit_width // 8
        for column in table.schema
        if pa.types.is_fixed_size_list(column.type)
    ]
    on_disk = 0 if isinstance(table, CandidateTable) else sum(file.stat().st_size for file in table.files)
    return max(sum(sizes), on_disk // max(1, table.n_rows)) + 64  # lists of any length count by their bytes
