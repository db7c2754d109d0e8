"""The computation of a feature table: its missing parts, one by one, and the manifest last.

Where a launch has several processes, rank 0 gives the missing parts out, those with the most tokens first,
and each process takes the next one when it is free. A part and its batches depend on neither, so the table
is the same however many there are. A thread of its own writes each part while the next one is computed; a
process of its own also reads the next rows ahead (in a launch it would hold a part that another could take).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dataflex_pipeline import launch
from dataflex_pipeline.ahead import ahead
from dataflex_pipeline.api import FeatureInput, Need, Progress, Silent
from dataflex_pipeline.config.load import SentConfig
from dataflex_pipeline.errors import DataError, RunError, UserError
from dataflex_pipeline.features.candidates import CandidateTable
from dataflex_pipeline.features.part_size import choose_rows
from dataflex_pipeline.features.plan import (
    FeaturePlan,
    SentPlan,
    make_feature,
    method_needs,
    opened,
    plan_feature,
)
from dataflex_pipeline.launch.team import Job, Place, Team
from dataflex_pipeline.models.base import free_memory
from dataflex_pipeline.models.room import is_out_of_memory
from dataflex_pipeline.store.agreed import BATCH_TOKENS, agreed, agreed_file
from dataflex_pipeline.store.fingerprint import digest
from dataflex_pipeline.store.locks import held
from dataflex_pipeline.store.parts import PartedTable, PartsWriter
from dataflex_pipeline.store.stale import check_parts, is_damaged, set_aside_damaged

__all__ = [
    "Built",
    "FeaturePlan",
    "build_feature",
    "make_feature",
    "method_needs",
    "plan_feature",
]

LOCKS = ".locks"
"""Folder of a shared cache with one lock per table; each is held while that table is computed."""


@dataclass(frozen=True)
class Built:
    """A finished feature table and how it came about.

    Attributes:
        table: the table. computed: parts computed just now. n_parts: parts in all. seconds: spent on it.
    """

    table: PartedTable
    computed: int
    n_parts: int
    seconds: float


def build_feature(
    features: Path,
    plan: FeaturePlan,
    progress: Progress,
    *,
    overwrite: bool = False,
    verify: Callable[[Path], object] = lambda checkpoint: None,
    shared: bool = False,
) -> Built:
    """Open a feature table, computing only the parts that are not on disk, and what it is computed from.

    One that is read through candidates is computed for every row.

    In a folder that runs share, one process at a time computes a table; another one that needs it waits,
    and then takes what is there. A finished table is read without any lock.

    Args:
        features: the folder of features: the run's own, or a shared one.
        plan: the table.
        progress: where to report.
        overwrite: set a damaged table aside and compute it anew.
        verify: is called with the checkpoint before anything is computed from it.
        shared: whether other runs may write to the folder.

    Raises:
        DataError: no row of the split could be computed.
        CorruptError: the table on disk is damaged or foreign, and ``overwrite`` is not set.
    """
    built = _build(features, plan, progress, overwrite=overwrite, verify=verify, shared=shared)
    return replace(built, table=_seen(built.table, plan))


def _seen(table: PartedTable, plan: FeaturePlan) -> PartedTable:
    """Return a table of every row as the plan reads it."""
    return table if plan.through is None else CandidateTable(table, plan.through)


def _build(
    features: Path,
    plan: FeaturePlan,
    progress: Progress,
    *,
    overwrite: bool,
    verify: Callable[[Path], object],
    shared: bool,
) -> Built:
    began = time.monotonic()
    folder = plan.folder(features)
    if overwrite and is_damaged(folder, plan.ingredients):
        with _alone(features, plan, progress, shared):  # another process may be writing it anew
            set_aside_damaged(folder, plan.ingredients)
    table = _finished(folder, plan)
    if table is not None:
        if shared:
            progress.say(f"{plan.need.name} of the {plan.need.split}: found in {features}")
        return Built(table, 0, table.n_parts, time.monotonic() - began)
    plan.feature.check(plan.need, plan.given.table.n_rows)
    tables = {
        key: build_feature(features, inner, progress, overwrite=overwrite, verify=verify, shared=shared).table
        for key, inner in plan.upstream.items()
    }
    with _alone(features, plan, progress, shared):
        table = _finished(folder, plan) if shared else None
        if table is not None:  # the process that was waited for has computed it
            return Built(table, 0, table.n_parts, time.monotonic() - began)
        if plan.given.checkpoint is not None:
            verify(plan.given.checkpoint)
        return _complete(features, plan, tables, progress, began)


def _alone(
    features: Path, plan: FeaturePlan, progress: Progress, shared: bool
) -> AbstractContextManager[None]:
    """Return what keeps other processes from computing this table; a run's own folder has the run's lock."""
    if not shared:
        return nullcontext()

    def waiting(who: str) -> None:
        what = f"{plan.need.name} of the {plan.need.split}"
        progress.say(f"{what}: another run computes it ({who}); waiting for it")

    return held(features / LOCKS / f"{plan.folder(features).name}.lock", waiting)


def _finished(folder: Path, plan: FeaturePlan) -> PartedTable | None:
    """Return the table if it is there, None if it is not finished.

    Raises:
        CorruptError: it is damaged or foreign.
    """
    if not PartedTable.is_complete(folder):
        return None
    check_parts(folder, digest(plan.ingredients))
    _tidy(folder)
    return PartedTable.open(folder)


def _tidy(folder: Path) -> None:
    """Remove the number that batches were sized by: the finished table's manifest has it.

    A kill right after the manifest leaves it behind; in a folder that is only read it does no harm.
    """
    with suppress(OSError):
        agreed_file(folder, BATCH_TOKENS).unlink(missing_ok=True)


def _complete(
    features: Path, plan: FeaturePlan, tables: Mapping[str, PartedTable], progress: Progress, began: float
) -> Built:
    """Compute the parts of a table that are not on disk.

    Args:
        tables: what it is computed from, finished. began: when this was asked for (`time.monotonic`).
    """
    folder, given, feature = plan.folder(features), plan.given, plan.feature
    writer = PartsWriter(folder, feature.schema, plan.ingredients)
    rows_per_part = _rows_per_part(plan, writer, progress)
    plan = replace(plan, rows_per_part=rows_per_part)
    n_parts = -(-given.table.n_rows // rows_per_part)
    first_rows = [number * rows_per_part for number in range(n_parts)]
    missing = [
        number
        for number, first in enumerate(first_rows)
        if number not in writer.done or not feature.has_beside(folder, first, writer.fingerprint)
    ]
    if missing:
        whole = replace(given, tables=tables, folder=folder, made=writer.fingerprint)
        team = launch.current()
        if team is not None and feature.takes_the_machine:
            named = f"{plan.need.name} of the {plan.need.split}"
            progress.say(f"{named}: rank 0 computes them alone, on all GPUs")
            with team.give(Room(), feature.config.ddp_timeout):
                pass
        if team is None or feature.takes_the_machine:
            _compute(writer, missing, _rows_of(plan, missing), plan, whole, progress, reads_ahead=True)
            progress.finish()
        else:
            _compute_together(team, writer, missing, replace(plan, given=whole), features, progress)
    summary = _check_valid(writer, n_parts, plan.need)
    feature.finish(folder, first_rows, writer.fingerprint)
    tokens = agreed(folder, BATCH_TOKENS)
    if tokens is not None:
        summary[BATCH_TOKENS] = tokens
    table = writer.finish(n_parts, summary, feature.side_files)
    _tidy(folder)
    return Built(table, len(missing), n_parts, time.monotonic() - began)


def _rows_per_part(plan: FeaturePlan, writer: PartsWriter, progress: Progress) -> int:
    """Return the plan's rows per part, or those that an unfinished table was begun with."""
    table, wanted = plan.given.table, plan.rows_per_part
    if wanted == "auto":
        wanted = choose_rows(plan.feature, plan.rows)
    if not writer.done:
        return wanted
    number = max(writer.done)
    rows = writer.read(number, ["row"]).column("row")
    # Only of part 0 the first row does not tell; the part is full, or it is the whole table.
    begun: int = rows[0].as_py() // number if number else pc.max(rows).as_py() + 1
    if begun == wanted or (begun == table.n_rows and wanted >= table.n_rows):
        return wanted
    progress.say(
        f"{plan.need.name} of the {plan.need.split}: begun with {begun} rows per part, and goes on so "
        f"(rows_per_part is {wanted} now)"
    )
    return begun


class _InParts(Silent):
    """The progress that a feature is given: it may count rows of a part before the part is done.

    Args:
        progress: where it is reported. count: takes rows that are done here, returns those done in all
            processes since the call before.
    """

    def __init__(self, progress: Progress, count: Callable[[int], int]) -> None:
        self._progress, self._count = progress, count
        self._room = 0

    def begin(self, rows: int) -> None:
        """Begin a part of so many rows."""
        self._room = rows

    def advance(self, n: int) -> None:
        """Count rows of the part, never more than it has."""
        n = min(n, self._room)
        self._room -= n
        self._progress.advance(self._count(n))

    def end(self) -> None:
        """Count what is left of the part."""
        self.advance(self._room)

    def say(self, line: str) -> None:
        """Say it."""
        self._progress.say(line)


def _compute(
    writer: PartsWriter,
    numbers: Iterable[int],
    missing: int,
    plan: FeaturePlan,
    given: FeatureInput,
    progress: Progress,
    count: Callable[[int], int] = lambda rows: rows,
    *,
    reads_ahead: bool = False,
) -> None:
    """Compute parts and write them; nothing is loaded where there is none.

    Args:
        numbers: of the parts, read as they are computed. missing: rows of all processes' parts.
        count: takes rows that are done here, returns those done in all processes since the call before.
        reads_ahead: whether the next parts' rows are read while one is computed.
    """
    pending = iter(numbers)
    first = next(pending, None)
    if first is None:
        return
    read = _part_reader(plan)
    parts = ((number, read(number)) for number in chain([first], pending))
    n_rows, inside = given.table.n_rows, _InParts(progress, count)
    with _memory_told(plan.need), _writing(writer) as write, plan.feature.open(given, inside) as compute:
        progress.start(f"{plan.need.name} of the {plan.need.split}", n_rows, "rows", n_rows - missing)
        for number, rows in ahead(parts) if reads_ahead else parts:
            inside.begin(rows.num_rows)
            write(number, compute(rows))
            inside.end()


@contextmanager
def _writing(writer: PartsWriter) -> Iterator[Callable[[int, pa.Table], None]]:
    """Yield the function that writes a part in a thread of its own, one at a time and in the order given.

    An error of the thread is raised at the next part, or at the end. Where something else fails, the part
    that was computed before is still written.
    """
    with ThreadPoolExecutor(1, "parts") as thread:
        waiting: list[Future[None]] = []

        def write(number: int, table: pa.Table) -> None:
            if waiting:
                waiting.pop().result()
            waiting.append(thread.submit(writer.write, number, table))

        yield write
        if waiting:
            waiting.pop().result()


@contextmanager
def _memory_told(need: Need) -> Iterator[None]:
    """Say which settings the memory depends on, where it is too small for a single row."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"The memory is too small for {need.name} of the {need.split}: {str(error).splitlines()[0]}",
            "Batches were made smaller down to a single row; it holds its activations, and for gradients the "
            "inputs of every trained layer, too.",
            "Lower cutoff_len (in a new run), set gradient_checkpointing: true for gradients, or lower "
            "max_new_tokens for generations. Finished parts are kept.",
        ) from error


class Parts(Job):
    """The missing parts of a feature table.

    Attributes:
        config: of the run.
        plan: of the table.
        fingerprint: that the table has for rank 0.
        features: the folder of features.
        order: numbers of the parts, the heaviest first.
    """

    config: SentConfig
    plan: SentPlan
    fingerprint: str
    features: Place
    order: list[int]

    def do(self, team: Team) -> None:
        """Compute the parts that this process gets.

        Raises:
            RunError: it would make another table than rank 0.
        """
        launch.claim_device(self.config.device)
        plan = self.plan.worked_out(self.config)
        if digest(plan.ingredients) != self.fingerprint:
            raise RunError(
                f"The feature {plan.need.name} would be another one here than for rank 0.",
                "The processes run different versions of this program, or see different files.",
                "Use one environment and one shared folder on all machines.",
            )
        tables = {
            key: _seen(opened(inner.folder(self.features)), inner) for key, inner in plan.upstream.items()
        }
        folder = plan.folder(self.features)
        writer = PartsWriter(folder, plan.feature.schema, plan.ingredients, joining=True)
        given = replace(plan.given, tables=tables, folder=folder, made=writer.fingerprint)
        _compute(writer, team.tickets(self.order), 0, plan, given, Silent(), team.add)


class Room(Job):
    """Room for a feature that rank 0 computes alone, on all GPUs."""

    def do(self, team: Team) -> None:
        """Free the GPU of this process."""
        free_memory()


def _compute_together(
    team: Team, writer: PartsWriter, missing: list[int], plan: FeaturePlan, features: Path, progress: Progress
) -> None:
    """On rank 0: give the missing parts out, compute a share of them, wait for the others'."""
    order, config = _heaviest_first(plan, missing), plan.feature.config
    sent = SentPlan.of(plan, _size(plan))
    job = Parts(config=config, plan=sent, fingerprint=writer.fingerprint, features=features, order=order)
    with team.give(job, config.ddp_timeout, lambda: progress.advance(team.add(0))):
        launch.claim_device(config.device)
        n_rows = _rows_of(plan, missing)
        _compute(writer, team.tickets(order), n_rows, plan, plan.given, progress, team.add)
    progress.advance(team.add(0))
    progress.finish()
    for number in set(missing) - writer.done:
        writer.take_in(number, launch.VISIBLE)


def _size(plan: FeaturePlan) -> int:
    """Return the rows per part of a plan that is being computed."""
    if plan.rows_per_part == "auto":
        raise RuntimeError("the rows per part are found before the first one")
    return plan.rows_per_part


def _rows_of(plan: FeaturePlan, numbers: Iterable[int]) -> int:
    """Return the rows in some parts."""
    per_part, n_rows = _size(plan), plan.given.table.n_rows
    return sum(min(per_part, n_rows - number * per_part) for number in numbers)


def _heaviest_first(plan: FeaturePlan, missing: list[int]) -> list[int]:
    """Return parts by falling number of tokens (ties by number), so that the last one ends soon."""
    per_part, table = _size(plan), plan.given.table
    tokens = np.zeros(-(-table.n_rows // per_part))  # [parts]
    for block in table.blocks(["row", "n_tokens", "valid"]):
        used = block.filter(block.column("valid"))
        part = used.column("row").to_numpy() // per_part
        tokens += np.bincount(part, used.column("n_tokens").to_numpy(), minlength=len(tokens))
    return sorted(missing, key=lambda number: (-tokens[number], number))


def _part_reader(plan: FeaturePlan) -> Callable[[int], pa.Table]:
    table, rows_per_part = plan.rows, _size(plan)
    columns = [name for name in plan.feature.input_columns if name in table.schema.names]

    def read(number: int) -> pa.Table:
        return table.rows(number * rows_per_part, (number + 1) * rows_per_part, columns)

    return read


def _check_valid(writer: PartsWriter, n_parts: int, need: Need) -> dict[str, Any]:
    reasons: dict[str, int] = {}
    n_valid = 0
    for number in range(n_parts):
        part = writer.read(number, ["valid", "reason"])
        n_valid += pc.sum(part.column("valid")).as_py() or 0
        for entry in part.column("reason").drop_null().value_counts().to_pylist():
            reasons[entry["values"]] = reasons.get(entry["values"], 0) + entry["counts"]
    if n_valid == 0:
        worst = "; ".join(f"{count} rows: {reason}" for reason, count in sorted(reasons.items())[:3])
        raise DataError(
            f"The feature {need.name} has no valid row in the {need.split} ({worst}).",
            "Without a single finite value there is nothing to select by.",
            "Check that the weights are sound (a diverged training gives NaN) and that the data is right.",
        )
    return {"valid": n_valid, "invalid": reasons}
