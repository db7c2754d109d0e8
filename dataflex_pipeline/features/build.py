"""A feature table on disk: found, or its missing parts computed and then its manifest written."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from dataflex_pipeline.api import Need, Progress
from dataflex_pipeline.declared.feature import has_beside
from dataflex_pipeline.errors import DataError
from dataflex_pipeline.features.compute import compute_missing
from dataflex_pipeline.features.part_size import choose_rows
from dataflex_pipeline.features.plan import FeaturePlan, seen
from dataflex_pipeline.store.agreed import BATCH_TOKENS, agreed, agreed_file
from dataflex_pipeline.store.fingerprint import digest
from dataflex_pipeline.store.locks import held
from dataflex_pipeline.store.parts import PartedTable, PartsWriter
from dataflex_pipeline.store.stale import check_parts, is_damaged, set_aside_damaged

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
    return replace(built, table=seen(built.table, plan))


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
        if number not in writer.done or not has_beside(feature, folder, first, writer.fingerprint)
    ]
    if missing:
        given = replace(given, tables=tables, folder=folder, made=writer.fingerprint)
        compute_missing(writer, missing, replace(plan, given=given), features, progress)
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
