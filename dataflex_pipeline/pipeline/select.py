"""Selection: from a score table to probabilities and the rows that are chosen, best first."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dataflex_pipeline.config.draw_rules import AMOUNTS
from dataflex_pipeline.config.names import check_name
from dataflex_pipeline.declared.method import target_ranking, weights
from dataflex_pipeline.errors import CorruptError, RunError, StaleError, UserError
from dataflex_pipeline.features.plan import FeaturePlan
from dataflex_pipeline.pipeline.damage import check_tables
from dataflex_pipeline.pipeline.drawing import as_ingredients, check_draw_fits, round_settings
from dataflex_pipeline.pipeline.feature_tables import feature_tables
from dataflex_pipeline.pipeline.open_run import OpenRun
from dataflex_pipeline.pipeline.output import Outcome, Output, note
from dataflex_pipeline.pipeline.score import (
    Scores,
    Scoring,
    block_rows,
    pool_blocks,
    ranking_plan,
)
from dataflex_pipeline.pipeline.similarity import (
    keep_apart,
    passed_over_table,
    said_of,
    similarity_plan,
)
from dataflex_pipeline.sampling.draw import Drawn, DrawSettings, draw, top_k_probabilities
from dataflex_pipeline.sampling.exported import export_probabilities
from dataflex_pipeline.sampling.probabilities import import_probabilities, write_probabilities
from dataflex_pipeline.sampling.rows import ScoreTable
from dataflex_pipeline.schemas import PASSED_OVER, SELECTION
from dataflex_pipeline.store.atomic import commit, set_aside
from dataflex_pipeline.store.fingerprint import digest
from dataflex_pipeline.store.parts import PartedTable
from dataflex_pipeline.store.run import PASSED_OVER_FILE, PROBABILITIES
from dataflex_pipeline.store.stale import found_ingredients, is_current, is_kept, named_changes, stale
from dataflex_pipeline.store.tables import TableFile, table_writer

DRAFT = ".draft"
"""Ending of a probability table whose selection is not drawn yet."""
HOW = {
    "sample": "drawn by probability",
    "top_k": "highest scores first",
    "round_robin": "in turns",
}
"""What a strategy does, for the summary."""


class Selection(Output):
    """The rows chosen from a round's scores, with the probabilities that they are drawn by.

    Args:
        scores: the score table.
        name: of a selection beside the round's own, on which nothing is ever trained; None for the round's.
        replace: make it anew where the settings are others now: the round's own only if nothing was trained
            on it yet. Without it, one with a name is held against its scores alone.

    Attributes:
        drawn: what was drawn, if this object drew it.
    """

    def __init__(self, scores: Scores, name: str | None = None, *, replace: bool = False) -> None:
        run, self.number, self.method = scores.run, scores.number, scores.method
        self.where = run.store.round(self.number)
        self.scores, self.named, self.replace = scores, name, replace
        self.drawn: Drawn | None = None
        if name is None:
            path, self.probabilities = self.where.selection, self.where.probabilities(self.method)
        else:
            path = self.where.selection_named(check_name(name, "A selection"))
            self.probabilities = path.with_name(PROBABILITIES)
        called = "" if name is None else f" {name}"
        super().__init__(
            run,
            f"round {self.number} selection{called}",
            f"select {self.method}, round {self.number}",
            f"The selection{called} of round {self.number}",
            path,
            (scores.path, self.probabilities),
        )
        self.follows = (scores.label,)

    @property
    def passed_over(self) -> Path:
        """Path of the table of rows that were passed over for being too like others."""
        return self.path.with_name(PASSED_OVER_FILE)

    @property
    def plan(self) -> Scoring:
        """The plan of the score table that it is drawn from."""
        return self.scores.plan

    @cached_property
    def embeddings(self) -> FeaturePlan | None:
        """The plan of the embeddings that rows are kept apart by; None without ``max_similarity``."""
        chooser = None if self.plan.chooser is None else self.run.method(self.plan.chooser)[0]
        return similarity_plan(self.run, self.plan, chooser)

    @property
    def settings(self) -> DrawSettings:
        """How its rows are drawn."""
        plan = self.embeddings
        fingerprint = "" if plan is None else plan.fingerprint
        found = round_settings(self.run, self.plan, ScoreTable(self.scores.path), fingerprint)
        counted = any(getattr(found, name) is not None for name in AMOUNTS)
        return replace(found, positions=0) if self.named and counted else found  # nothing is trained on it

    def probability_inputs(self) -> dict[str, Any]:
        """Return what the probability table is made from."""
        return {
            "table": "probabilities",
            "scores": ScoreTable(self.scores.path).fingerprint,
            "params": self.plan.wanted["params"],
            "draw": as_ingredients(self.settings),
        }

    def inputs(self, probabilities: str | None = None) -> dict[str, Any]:
        """Return the method, the probabilities by their fingerprint, and how rows are drawn.

        Args:
            probabilities: the fingerprint; by default that of the table on disk.
        """
        return {
            "table": "selection",
            "method": self.method,
            "probabilities": probabilities or TableFile(self.probabilities).fingerprint,
            "draw": as_ingredients(self.settings),
        }

    def check(self) -> None:
        """Check the tables of the round against the digests that were remembered when they were written."""
        if self.named is None:
            check_tables(self.run, self.number)
        for path in (self.probabilities, self.path) if self.named else ():
            self.run.memo.check_output(path)

    def is_current(self, *, overwrite: bool = False) -> bool:
        """Decide whether probabilities and selection can be kept.

        Raises:
            StaleError: it is another method's, or one of them was made from other settings.
        """
        self.check_method()
        if not self.scores.path.is_file() or not self.probabilities.is_file():
            return False
        if self.named and not self.replace:
            return self._follows_its_scores()
        return self.has_probabilities(overwrite=overwrite) and super().is_current(overwrite=overwrite)

    def _follows_its_scores(self) -> bool:
        """Whether a selection with a name, whose settings are its own, was made from the scores there are.

        Raises:
            StaleError: it was made from others.
        """
        made_from = (found_ingredients(self.probabilities) or {}).get("scores")
        now = ScoreTable(self.scores.path).fingerprint
        if made_from != now:
            raise stale(self.path, self.name, named_changes({"scores": made_from}, {"scores": now}))
        return self.path.is_file()

    def has_probabilities(self, *, overwrite: bool = False) -> bool:
        """Decide whether the probability table can be kept."""
        label = f"The {self.method} probabilities of round {self.number}"
        return is_current(self.probabilities, self.probability_inputs(), label, overwrite=overwrite)

    def check_method(self) -> None:
        """Refuse to go on with another method than the one that the round was selected by.

        Raises:
            StaleError: another method made the selection, or the index.
        """
        paths = [self.path] if self.named else [self.where.index, self.path]
        for path in paths:
            made = (found_ingredients(path) or {}).get("method", self.method)
            if made != self.method:
                raise stale(path, self.name, [f"method: {made} -> {self.method}"])

    def make(self) -> Outcome:
        """Write the probabilities and the selection unless they are there.

        Old ones stay until both can be made.

        Raises:
            RunError: the score table is not finished. StaleError: they were made from other settings.
        """
        began, run = time.monotonic(), self.run
        self._finished_scores()
        changed = None if run.overwrite else self._changed()
        wanted = self.probability_inputs()
        own = self.inputs(digest(wanted))
        anew = run.overwrite or changed is not None
        label = f"The {self.method} probabilities of round {self.number}"
        kept = is_kept(self.probabilities, wanted, label, overwrite=anew)
        done = not (is_kept(self.path, own, self.name, overwrite=anew) and kept)
        if done:
            check_draw_fits(run, self.number, self.settings.strategy)
            self._select(None if kept else wanted, own, changed)
            for path in (self.probabilities, self.path, self.passed_over):
                if path.is_file():
                    run.memo.written(path)
            note(run, "select", self.number, began, on_device=False, method=self.method)
        else:
            _export(run, self.plan, TableFile(self.probabilities))
        return Outcome(self.stage, self.path, done, time.monotonic() - began, self.describe())

    def _finished_scores(self) -> None:
        if not self.scores.is_current():
            raise RunError(
                f"Round {self.number} has no finished {self.method} scores ({self.scores.path}).",
                "A selection is made from a score table.",
                f"Run `dataflex score --round {self.number} --method {self.method}` first.",
            )

    def _is_trained_on(self) -> bool:
        return self.where.checkpoint.exists() or self.where.work.exists()

    def _changed(self) -> str | None:
        """Return which settings are others than those of a selection that can be replaced; None for none."""
        if self.named is None and (not self.replace or self._is_trained_on()):
            return None
        try:
            self.is_current()
        except (StaleError, CorruptError) as error:
            return "; ".join(line.strip() for line in error.what.splitlines()[1:]) or error.what
        return None

    def _put_away(self, path: Path, changed: str | None) -> None:
        """Set an old table aside, or remove one on which nothing was trained."""
        self.run.memo.forget_output(path)
        if changed is None:
            set_aside(path)
        else:
            path.unlink(missing_ok=True)

    def _select(self, wanted: dict[str, Any] | None, own: dict[str, Any], changed: str | None) -> None:
        """Write the probabilities (where ``wanted``) and the selection, once both can be made.

        Args:
            wanted: what the probabilities are made from; None where they are kept. own: the selection.
            changed: the settings by which an old selection differs that is replaced; None for none.
        """
        run, plan, scores = self.run, self.plan, ScoreTable(self.scores.path)
        final, settings = self.probabilities, self.settings
        draft = final if wanted is None else final.with_name(final.name + DRAFT)
        final.parent.mkdir(parents=True, exist_ok=True)
        drawn = None
        try:
            if wanted is not None and not is_kept(draft, wanted, "The draft", overwrite=True):
                drawn = _write_probabilities(run, plan, scores, settings, draft, wanted, self.embeddings)
            drawn = drawn or _draw(run, plan, scores, settings, TableFile(draft), self.embeddings)
            if self.named is None:
                _export(run, plan, TableFile(draft))
        except UserError:
            if draft != final:
                draft.unlink(missing_ok=True)
            raise
        if changed is not None:
            run.progress.say(f"  select: made anew, nothing was trained on the old one: {changed}")
            if self.named is None:
                self._put_away(self.where.index, changed)
        self._put_away(self.path, changed)
        if draft != final:
            self._put_away(final, changed)
            commit(draft, final)
        for notice in drawn.notices:
            run.progress.say(f"  select: {notice}")
        self._put_away(self.passed_over, changed)
        if drawn.passed_over is not None:
            with table_writer(self.passed_over, PASSED_OVER, own) as write:
                write(drawn.passed_over)
        notes = {"method": self.method, "round": str(self.number), "how": HOW[settings.strategy]}
        notes["notices"] = "\n".join(drawn.notices)
        rows = drawn.selection
        found = f"{rows.num_rows:,} of {plan.pool.n_rows:,} rows selected"
        n_distinct = len(rows.column("row").unique())
        found += "" if n_distinct == rows.num_rows else f", {n_distinct:,} different ones"
        with table_writer(
            self.path, SELECTION, own, notes | {"found": found, "how": HOW[settings.strategy]}
        ) as write:
            write(rows)
        self.drawn = drawn

    def draw(self) -> Drawn:
        """Return what was drawn; it is drawn again where another process drew it."""
        if self.drawn is None:
            scores, settings = ScoreTable(self.scores.path), self.settings
            drawn_by = TableFile(self.probabilities)
            self.drawn = _draw(self.run, self.plan, scores, settings, drawn_by, self.embeddings)
        return self.drawn

    def write(self) -> None:
        """Make it; see `make`, which also knows which of the two tables is kept."""
        self.make()

    def describe(self) -> str:
        """Return the number of rows, the method, and how they were selected."""
        notes = TableFile(self.path).metadata
        return f"{notes.get('found', '')} by {self.method}, {notes.get('how', '')}"


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
        self._scoring = scoring = ranking_plan(run, scoring)
        self._tables: Mapping[str, PartedTable] = feature_tables(run, scoring)
        selection = replace(scoring.selection, say=self.notices.append)
        self._ranking = target_ranking(scoring.method, self._tables, selection)
        self.n_turns = len(self._ranking.rows)
        self.block_rows = block_rows(scoring, self._tables)

    def blocks(self, max_rows: int) -> Iterator[np.ndarray]:
        """Yield values of consecutive rows of the pool. [rows, n_turns]"""
        for block in pool_blocks(self._scoring, self._tables, max_rows):
            yield self._ranking.values(block)


def _export(run: OpenRun, scoring: Scoring, probabilities: TableFile) -> None:
    """Write the probabilities where the method's parameters say, too."""
    path = scoring.method.probabilities_to
    if path is not None and export_probabilities(probabilities, path, overwrite=run.overwrite):
        run.progress.say(f"  {scoring.name}: probabilities also in {path}")


def _draw(
    run: OpenRun,
    scoring: Scoring,
    scores: ScoreTable,
    settings: DrawSettings,
    probabilities: TableFile | None,
    embeddings: FeaturePlan | None,
) -> Drawn:
    apart = None if embeddings is None else keep_apart(run, embeddings)
    pool = scoring.pool
    if settings.over_target_rows:
        turns = PoolRankings(run, scoring)
        drawn = draw(scores, None, pool, settings, rankings=turns, block_rows=turns.block_rows, apart=apart)
        drawn = replace(drawn, notices=(*turns.notices, *drawn.notices))
    else:
        drawn = draw(scores, probabilities, pool, settings, apart=apart)
    if apart is None or settings.max_similarity is None:
        return drawn
    passed = passed_over_table(apart, pool, scores)
    notices = (*drawn.notices, said_of(passed, settings.max_similarity))
    return replace(drawn, passed_over=passed, notices=notices)


def _write_probabilities(
    run: OpenRun,
    scoring: Scoring,
    scores: ScoreTable,
    settings: DrawSettings,
    output: Path,
    wanted: dict[str, Any],
    embeddings: FeaturePlan | None,
) -> Drawn | None:
    """Write the probability table; strategies that are not random draw first, and the draw is returned."""
    notes = {"method": scoring.name, "round": str(scoring.selection.round)}
    if settings.strategy != "sample":
        drawn = _draw(run, scoring, scores, settings, None, embeddings)
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
    write_probabilities(scores, lambda block: weights(scoring.method, block, fitted), output, wanted, notes)
    return None
