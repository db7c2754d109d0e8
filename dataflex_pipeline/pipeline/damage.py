"""Finished outputs held against what was written: nothing that was deleted, cut or changed counts as done.

Checkpoints carry a digest of each of their files in their marker. The digests of tables are remembered in the
run's sources.json when they are written, or first seen. A file is only read where its size or its time is
another than when it was read last, so a check costs a look at each file's state.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from dataflex_pipeline.errors import CorruptError, StaleError
from dataflex_pipeline.pipeline.open_run import OpenRun
from dataflex_pipeline.store.atomic import set_aside
from dataflex_pipeline.store.fingerprint import digest
from dataflex_pipeline.store.run import BEST, PASSED_OVER_FILE, PROBABILITIES, RoundFolder, RunFolder
from dataflex_pipeline.store.stale import found_ingredients, is_complete
from dataflex_pipeline.training.kept import KEPT
from dataflex_pipeline.training.marker import read_marker, verify_checkpoint


def tables_of(where: RoundFolder) -> Iterator[Path]:
    """Yield the finished tables of a round."""
    for kind in ("scores", "probabilities"):
        yield from sorted((where.folder / kind).glob("*.parquet"))
    for path in where.named_selections():
        yield from sorted(path.parent.glob("*.parquet"))
    beside = where.selection.with_name(PASSED_OVER_FILE)
    yield from (path for path in (where.selection, beside, where.index) if path.is_file())


def check_outputs(run: OpenRun, last: int) -> None:
    """Check every finished table and checkpoint of rounds 0 to ``last``, and the best checkpoint.

    Raises:
        CorruptError: one is not what was written, or a file of it is missing.
    """
    for number in range(last + 1):
        check_tables(run, number)
        check_checkpoint(run, number)
    trained = range(run.given.first_round, last + 1)
    if trained and all(is_complete(run.store.round(number).checkpoint) for number in trained):
        check_best(run, last)


def check_tables(run: OpenRun, number: int) -> None:
    """Check the tables of one round."""
    for path in tables_of(run.store.round(number)):
        run.memo.check_output(path)


def check_origin(store: RunFolder, number: int, path: Path) -> None:
    """Refuse a selection that was not made from the scores and the pool there are.

    Raises:
        StaleError: it is another run's, or something that it was made from was made anew since.
    """
    made_from = found_ingredients(path) or {}
    method = made_from.get("method")
    if made_from.get("table") != "selection" or method is None:
        return
    own = path == store.round(number).selection
    probabilities = store.round(number).probabilities(method) if own else path.with_name(PROBABILITIES)
    chain = [(probabilities, "probabilities"), (store.round(number).scores(method), "scores")]
    for table, name in [*chain, (store.pool, "pool")]:
        found = found_ingredients(table)
        if found is None or digest(found) != made_from.get(name):
            said = "is not there any more" if found is None else "is another one now"
            raise StaleError(
                f"{path}: {table}, which it was made from, {said}.",
                "The rows that it names may be others, or chosen by other scores.",
                f"Select again: dataflex select --round {number} --method {method} (after `dataflex score`).",
            )
        made_from = found


def set_aside_damaged_tables(run: OpenRun, number: int) -> None:
    """Set the tables of a round aside that are not what was written, for ``--overwrite``."""
    for path in tables_of(run.store.round(number)):
        try:
            run.memo.check_output(path)
        except CorruptError:
            set_aside(path)
            run.memo.forget_output(path)


def check_checkpoint(run: OpenRun, number: int) -> None:
    """Check the checkpoint of one round, and those kept inside it, where they are finished."""
    checkpoint = run.store.round(number).checkpoint
    for folder in (checkpoint, *sorted((checkpoint.parent / KEPT).glob("step-*[0-9]"))):
        if is_complete(folder):
            verify_checkpoint(folder, run.memo.output_digest)


def check_best(run: OpenRun, last: int) -> None:
    """Check that best/ holds the best weights of the evaluations up to round ``last``.

    Raises:
        CorruptError: it is damaged, or not there although an evaluation was the best.
    """
    folder = run.folder / BEST
    if not run.given.load_best_model_at_end:
        return
    if is_complete(folder):
        verify_checkpoint(folder, run.memo.output_digest)
    marker = read_marker(run.store.round(last).checkpoint)
    best = None if marker is None else marker.course.get("best")
    kept = read_marker(folder)
    if best is None or (kept is not None and kept.step >= best["step"]):
        return
    found = "is not there" if kept is None else f"is of step {kept.step}"
    raise CorruptError(
        f"{folder} {found}, and the best evaluation was at step {best['step']}, in round {best['round']}.",
        "load_best_model_at_end: true promises those weights, and no other file holds them.",
        f"Put the folder back; or move {run.store.round(best['round']).checkpoint} away and run "
        f"`dataflex round {last} {run.again}`, which trains that round again.",
    )


def last_finished(run: OpenRun) -> int | None:
    """Return the last round up to which every checkpoint is finished; None before the first."""
    found = None
    for number in range(run.given.first_round, run.given.last_round + 1):
        if not is_complete(run.store.round(number).checkpoint):
            break
        found = number
    return found


def remember_checkpoint(run: OpenRun, number: int) -> None:
    """Remember the digests of a checkpoint that was just written, so that it need not be read again."""
    checkpoint = run.store.round(number).checkpoint
    marker = read_marker(checkpoint)
    for name, known in ({} if marker is None else marker.files).items():
        run.memo.know(checkpoint / name, str(known["digest"]))
