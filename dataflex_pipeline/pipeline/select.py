"""Selection: from a score table to probabilities and the weighted index that a round trains on."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dataflex_pipeline import api
from dataflex_pipeline.api import Strategy
from dataflex_pipeline.errors import ConfigError, RunError, UserError
from dataflex_pipeline.pipeline.damage import check_tables
from dataflex_pipeline.pipeline.open_run import OpenRun
from dataflex_pipeline.pipeline.output import Outcome, Output, note
from dataflex_pipeline.pipeline.prepare import open_split
from dataflex_pipeline.pipeline.score import Scores, Scoring, block_rows, feature_tables, pool_blocks
from dataflex_pipeline.sampling.draw import Drawn, DrawSettings, draw, draw_uniform, top_k_probabilities
from dataflex_pipeline.sampling.exported import export_probabilities
from dataflex_pipeline.sampling.probabilities import import_probabilities, write_probabilities
from dataflex_pipeline.schemas import INDEX
from dataflex_pipeline.seeds import derive_seed
from dataflex_pipeline.store.atomic import commit, set_aside
from dataflex_pipeline.store.fingerprint import digest
from dataflex_pipeline.store.parts import PartedTable
from dataflex_pipeline.store.stale import found_ingredients, is_current, is_kept, stale
from dataflex_pipeline.store.tables import TableFile, table_writer

DRAFT = ".draft"
"""Ending of a probability table whose index is not drawn yet."""


def positions(run: OpenRun, number: int) -> int:
    """Return the training positions of a round: steps x global batch."""
    config = run.given
    return (config.warmup_step if number == 0 else config.update_step) * run.global_batch


def draw_settings(
    run: OpenRun,
    number: int,
    strategy: Strategy,
    replacement: bool,
    groups: tuple[str, ...] = (),
    over_target_rows: bool = False,
) -> DrawSettings:
    """Return how a round's rows are drawn, with the round's own random stream."""
    config = run.given
    return DrawSettings(
        strategy=strategy,
        positions=positions(run, number),
        num_samples=config.num_samples if number else None,
        fraction=config.fraction if number else None,
        token_budget=config.token_budget if number else None,
        replacement=replacement,
        weights=config.weights if number else "uniform",
        source_quotas=config.source_quotas if number else {},
        shuffle=not config.disable_shuffling,
        seed=derive_seed(config.seed, "select", number),
        group_columns=groups,
        over_target_rows=over_target_rows,
    )


def _settings_as_ingredients(settings: DrawSettings) -> dict[str, Any]:
    return {
        **{name: getattr(settings, name) for name in ("strategy", "positions", "num_samples", "fraction")},
        **{name: getattr(settings, name) for name in ("token_budget", "replacement", "weights", "shuffle")},
        "source_quotas": dict(settings.source_quotas),
        "group_columns": list(settings.group_columns),
        "seed": settings.seed,
        **({"over": "target_rows"} if settings.over_target_rows else {}),
    }


class WarmupIndex(Output):
    """The index of round 0: valid rows of the pool, drawn uniformly."""

    def __init__(self, run: OpenRun) -> None:
        super().__init__(
            run, "round 0 index", "select, warm-up", "The index of the warm-up", run.store.round(0).index
        )

    def inputs(self) -> dict[str, Any]:
        """Return the pool's fingerprint and how rows are drawn."""
        drawn = _settings_as_ingredients(warmup_draw(self.run))
        return {"table": "index", "pool": open_split(self.run, "pool").fingerprint, "draw": drawn}

    def check(self) -> None:
        """Check the table against the digest that was remembered when it was written."""
        self.run.memo.check_output(self.path)

    def write(self) -> None:
        """Draw the rows."""
        self.run.memo.forget_output(self.path)
        drawn = draw_uniform(open_split(self.run, "pool"), warmup_draw(self.run))
        _write_index(self.run, self.path, drawn, self.inputs(), {"round": "0"})
        self.run.memo.written(self.path)

    def describe(self) -> str:
        """Return the number of positions and of different rows."""
        return f"{TableFile(self.path).metadata.get('found', '')}, drawn uniformly"


def warmup_draw(run: OpenRun) -> DrawSettings:
    """Return how the rows of round 0 are drawn."""
    return draw_settings(run, 0, "sample", replacement=False)


def wanted_probabilities(run: OpenRun, scoring: Scoring, scores: TableFile) -> dict[str, Any]:
    """Return what a method's probability table of a round is made from."""
    return {
        "table": "probabilities",
        "scores": scores.fingerprint,
        "params": scoring.wanted["params"],
        "draw": _settings_as_ingredients(round_settings(run, scoring, scores)),
    }


def wanted_index(run: OpenRun, scoring: Scoring, scores: TableFile, probabilities: str) -> dict[str, Any]:
    """Return what the index of a round is made from, the probabilities by their fingerprint."""
    return {
        "table": "index",
        "method": scoring.name,
        "probabilities": probabilities,
        "draw": _settings_as_ingredients(round_settings(run, scoring, scores)),
    }


class Index(Output):
    """The weighted index of a round, with the probabilities that it is drawn by.

    Args:
        scores: the score table that the rows are drawn from.
    """

    def __init__(self, scores: Scores) -> None:
        run, self.number, self.method = scores.run, scores.number, scores.method
        where = run.store.round(self.number)
        self.scores, self.probabilities = scores, where.probabilities(self.method)
        super().__init__(
            run,
            f"round {self.number} index",
            f"select {self.method}, round {self.number}",
            f"The index of round {self.number}",
            where.index,
            (scores.path, self.probabilities),
        )

    @property
    def plan(self) -> Scoring:
        """The plan of the score table that it is drawn from."""
        return self.scores.plan

    def _probability_inputs(self) -> dict[str, Any]:
        return wanted_probabilities(self.run, self.plan, TableFile(self.scores.path))

    def inputs(self) -> dict[str, Any]:
        """Return the method, the probabilities by their fingerprint, and how rows are drawn."""
        fingerprint = TableFile(self.probabilities).fingerprint
        return wanted_index(self.run, self.plan, TableFile(self.scores.path), fingerprint)

    def check(self) -> None:
        """Check the tables of the round against the digests that were remembered when they were written."""
        check_tables(self.run, self.number)

    def is_current(self, *, overwrite: bool = False) -> bool:
        """Decide whether the probabilities and the index can be kept.

        Raises:
            StaleError: the index is another method's, or one of them was made from other settings.
        """
        self.check_method()
        if not self.scores.path.is_file() or not self.probabilities.is_file():
            return False
        label = f"The {self.method} probabilities of round {self.number}"
        inputs = self._probability_inputs()
        if not is_current(self.probabilities, inputs, label, overwrite=overwrite):
            return False
        return is_current(self.path, self.inputs(), self.name, overwrite=overwrite)

    def check_method(self) -> None:
        """Refuse to go on with another method than the one that made the index.

        Raises:
            StaleError: another method made it.
        """
        made = (found_ingredients(self.path) or {}).get("method", self.method)
        if made != self.method:
            raise stale(self.path, self.name, [f"method: {made} -> {self.method}"])

    def make(self) -> Outcome:
        """Write the probabilities and the index unless they are there; old ones stay until both can be made.

        Raises:
            RunError: the score table is not finished. StaleError: they were made from other settings.
        """
        began, run, plan = time.monotonic(), self.run, self.plan
        scores = self._finished_scores()
        settings = round_settings(run, plan, scores)
        wanted = wanted_probabilities(run, plan, scores)
        for_index = wanted_index(run, plan, scores, digest(wanted))
        label = f"The {self.method} probabilities of round {self.number}"
        kept = is_kept(self.probabilities, wanted, label, overwrite=run.overwrite)
        done = not (is_kept(self.path, for_index, self.name, overwrite=run.overwrite) and kept)
        if done:
            for path in (self.probabilities, self.path):
                run.memo.forget_output(path)
            _select(run, plan, scores, settings, None if kept else wanted, for_index)
            for path in (self.probabilities, self.path):
                run.memo.written(path)
            note(run, "select", self.number, began, on_device=False, method=self.method)
        else:
            _export(run, plan, TableFile(self.probabilities))
        found = TableFile(self.path).metadata.get("found", "")
        return Outcome(self.stage, self.path, done, time.monotonic() - began, found)

    def _finished_scores(self) -> TableFile:
        if not self.scores.is_current():
            raise RunError(
                f"Round {self.number} has no finished {self.method} scores ({self.scores.path}).",
                "A selection is made from a score table.",
                f"Run `dataflex score --round {self.number} --method {self.method}` first.",
            )
        return TableFile(self.scores.path)

    def write(self) -> None:
        """Make it; see `make`, which also knows which of the two tables is kept."""
        self.make()

    def describe(self) -> str:
        """Return the number of positions and of different rows, and the method."""
        return f"{TableFile(self.path).metadata.get('found', '')}, by {self.method}"


class PoolRankings:
    """The values of the pool's rows for every target row, made block by block (see `sampling.turns`).

    Args:
        run: of the run; feature tables that are not there any more are made again.
        scoring: of the round.

    Attributes:
        n_turns: target rows that take turns. notices: what the method said.
        block_rows: rows per block, so that wide features never fill the memory.
    """

    def __init__(self, run: OpenRun, scoring: Scoring) -> None:
        self.notices: list[str] = []
        self._scoring = scoring
        self._tables: Mapping[str, PartedTable] = feature_tables(run, scoring)
        selection = replace(scoring.selection, say=self.notices.append)
        self._ranking: api.TargetRanking = scoring.method.by_target_row(self._tables, selection)
        self.n_turns = len(self._ranking.rows)
        self.block_rows = block_rows(scoring, self._tables)

    def blocks(self, max_rows: int) -> Iterator[np.ndarray]:
        """Yield values of consecutive rows of the pool. [rows, n_turns]"""
        for block in pool_blocks(self._scoring, self._tables, max_rows):
            yield self._ranking.values(block)


def _select(
    run: OpenRun,
    scoring: Scoring,
    scores: TableFile,
    settings: DrawSettings,
    wanted: dict[str, Any] | None,
    for_index: dict[str, Any],
) -> None:
    """Write the probabilities (where ``wanted``) and the index; the old ones stay until both can be made."""
    where = run.store.round(scoring.selection.round)
    final = where.probabilities(scoring.name)
    draft = final if wanted is None else final.with_name(final.name + DRAFT)
    drawn = None
    try:
        if wanted is not None and not is_kept(draft, wanted, "The draft", overwrite=True):
            drawn = _write_probabilities(run, scoring, scores, settings, draft, wanted)
        drawn = drawn or _draw(run, scoring, scores, settings, TableFile(draft))
        _export(run, scoring, TableFile(draft))
    except UserError:
        if draft != final:
            draft.unlink(missing_ok=True)
        raise
    if draft != final:
        set_aside(final)
        commit(draft, final)
    set_aside(where.index)
    notes = {"method": scoring.name, "round": str(scoring.selection.round)}
    _write_index(run, where.index, drawn, for_index, notes)


def _export(run: OpenRun, scoring: Scoring, probabilities: TableFile) -> None:
    """Write the probabilities where the method's parameters say, too."""
    path = scoring.method.probabilities_to
    if path is not None and export_probabilities(probabilities, path, overwrite=run.overwrite):
        run.progress.say(f"  {scoring.name}: probabilities also in {path}")


def _draw(
    run: OpenRun,
    scoring: Scoring,
    scores: TableFile,
    settings: DrawSettings,
    probabilities: TableFile | None,
) -> Drawn:
    if not settings.over_target_rows:
        return draw(scores, probabilities, scoring.pool, settings)
    rankings = PoolRankings(run, scoring)
    drawn = draw(scores, None, scoring.pool, settings, rankings=rankings, block_rows=rankings.block_rows)
    return replace(drawn, notices=(*rankings.notices, *drawn.notices))


def round_settings(run: OpenRun, scoring: Scoring, scores: TableFile) -> DrawSettings:
    """Return how the rows of a scored round are drawn."""
    strategy = run.given.strategy or scoring.method.default_strategy
    replacement = run.given.replacement
    if replacement is None:
        replacement = scoring.method.replaces and strategy == "sample"
    groups: tuple[str, ...] = ()
    over_rows = False
    if strategy == "round_robin":
        groups = scoring.method.group_columns(scores.schema)
        over_rows = _takes_turns_by_row(run, scoring, len(groups))
    return draw_settings(
        run, scoring.selection.round, strategy, replacement, () if over_rows else groups, over_rows
    )


def _takes_turns_by_row(run: OpenRun, scoring: Scoring, n_groups: int) -> bool:
    """Whether target rows take turns rather than groups.

    Raises:
        ConfigError: target rows were asked for, and the method has one ranking of the pool only.
    """
    over, able = run.given.round_robin_over, scoring.method.ranks_by_target_row
    if over == "target_rows" and not able:
        raise ConfigError(
            f"round_robin_over: target_rows was set with the method {scoring.name}.",
            "Target rows take turns by their own rankings of the pool, and this method has only one for all.",
            "Set round_robin_over: groups if it has groups, or use a method that compares row with row, "
            "such as less.",
        )
    return able and (over == "target_rows" or (over is None and n_groups < 2))


def _write_probabilities(
    run: OpenRun,
    scoring: Scoring,
    scores: TableFile,
    settings: DrawSettings,
    output: Path,
    wanted: dict[str, Any],
) -> Drawn | None:
    """Write the probability table; strategies that are not random draw first, and the draw is returned."""
    notes = {"method": scoring.name, "round": str(scoring.selection.round)}
    if settings.strategy != "sample":
        drawn = _draw(run, scoring, scores, settings, None)
        top_k_probabilities(scores, drawn, output, wanted, notes)
        return drawn
    scoring.lines.clear()
    file = scoring.method.probabilities_from
    if file is not None:
        for notice in import_probabilities(file, scores, output, wanted, notes).notices:
            scoring.selection.say(notice)
        return None
    fitted = scoring.method.fit(scores, scoring.selection)
    notes["notices"] = "\n".join(scoring.lines)
    write_probabilities(scores, lambda block: scoring.method.weigh(block, fitted), output, wanted, notes)
    return None


def _write_index(
    run: OpenRun, output: Path, drawn: Drawn, wanted: dict[str, Any], notes: dict[str, str]
) -> None:
    for notice in drawn.notices:
        run.progress.say(f"  select: {notice}")
    found = f"{drawn.index.num_rows:,} positions, {drawn.n_distinct:,} different rows"
    with table_writer(
        output, INDEX, wanted, notes | {"found": found, "notices": "\n".join(drawn.notices)}
    ) as write:
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
