"""The computation of a feature table's missing parts, alone or with the other processes of a launch.

Where a launch has several processes, rank 0 gives the missing parts out, those with the most tokens first,
and each process takes the next one when it is free. A part and its batches depend on neither, so the table
is the same however many there are. A thread of its own writes each part while the next one is computed; a
process of its own also reads the next rows ahead (in a launch it would hold a part that another could take).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa

from dataflex_pipeline import launch
from dataflex_pipeline.ahead import ahead
from dataflex_pipeline.api import FeatureInput, Need, Progress, Silent
from dataflex_pipeline.config.load import SentConfig
from dataflex_pipeline.declared import is_own
from dataflex_pipeline.declared.feature import opened as opened_own
from dataflex_pipeline.errors import RunError, UserError
from dataflex_pipeline.features.plan import FeaturePlan, SentPlan, opened, seen
from dataflex_pipeline.launch.team import Job, Place, Team
from dataflex_pipeline.models.base import free_memory
from dataflex_pipeline.models.one_base import let_go
from dataflex_pipeline.models.room import is_out_of_memory
from dataflex_pipeline.own_code import own_error
from dataflex_pipeline.store.fingerprint import digest
from dataflex_pipeline.store.parts import PartsWriter


def compute_missing(
    writer: PartsWriter, missing: list[int], plan: FeaturePlan, features: Path, progress: Progress
) -> None:
    """Compute parts of a table and write them.

    Args:
        writer: of the table.
        missing: numbers of the parts.
        plan: of the table, with its rows per part as a number, and what it is computed from given.
        features: the folder of features.
        progress: where to report.
    """
    team = launch.current()
    if team is not None and plan.feature.takes_the_machine:
        progress.say(f"{plan.need.name} of the {plan.need.split}: rank 0 computes them alone, on all GPUs")
        with team.give(Room(), plan.feature.config.ddp_timeout):
            pass
    if team is None or plan.feature.takes_the_machine:
        _compute(writer, missing, _rows_of(plan, missing), plan, plan.given, progress, reads_ahead=True)
        progress.finish()
    else:
        _compute_together(team, writer, missing, plan, features, progress)


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
    feature = plan.feature
    if not feature.uses_model:  # it may need the memory for a model of its own, or a search
        let_go()
    opens = opened_own(feature, given, inside) if is_own(type(feature)) else feature.open(given, inside)
    with _memory_told(plan.need), _writing(writer) as write, opens as compute:
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
        if not is_out_of_memory(error) or own_error(error) is not None:
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
            key: seen(opened(inner.folder(self.features)), inner) for key, inner in plan.upstream.items()
        }
        folder = plan.folder(self.features)
        writer = PartsWriter(folder, plan.feature.schema, plan.ingredients, joining=True)
        given = replace(plan.given, tables=tables, folder=folder, made=writer.fingerprint)
        _compute(writer, team.tickets(self.order), 0, plan, given, Silent(), team.add)


class Room(Job):
    """Room for a feature that rank 0 computes alone, on all GPUs."""

    def do(self, team: Team) -> None:
        """Free the GPU of this process."""
        let_go()
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
