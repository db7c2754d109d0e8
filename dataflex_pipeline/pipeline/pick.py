"""The best rows in one go: prepare, score, select and write round 1, with nothing trained before.

Whatever would stop it is found before anything is written: the settings, the place of the file, how many rows
are asked for, and scores that other settings made.
"""

from __future__ import annotations

from pathlib import Path

from dataflex_pipeline.export.conversations import Trainer
from dataflex_pipeline.pipeline.damage import check_outputs, set_aside_damaged_tables
from dataflex_pipeline.pipeline.device import say_device
from dataflex_pipeline.pipeline.export import Asked, check_place, export_rows
from dataflex_pipeline.pipeline.open_run import OpenRun
from dataflex_pipeline.pipeline.output import Outcome
from dataflex_pipeline.pipeline.outputs import check_before_start, make_up_to
from dataflex_pipeline.pipeline.preflight import check_how_many
from dataflex_pipeline.pipeline.score import scores_of
from dataflex_pipeline.pipeline.select import Selection
from dataflex_pipeline.pipeline.settings import check_settings
from dataflex_pipeline.pipeline.versions import say_versions
from dataflex_pipeline.store.stale import is_complete

NOTHING_TRAINED = {"warmup_step": 0, "update_times": 0}
"""Settings of a run that only scores and selects."""


def pick(run: OpenRun, method: str, to: Path | None, trainer: Trainer) -> tuple[Selection, list[Outcome]]:
    """Select the rows of round 1 and write them to a file.

    Args:
        run: open, with the settings of the call.
        method: the method's name.
        to: the file, which ends in .jsonl; None: selected.jsonl in the run, replaced each time.
        trainer: the form of the rows.

    Returns:
        The selection.
        What was made or was there already, in order; the last are the files of rows.

    Raises:
        UserError: data, model, settings or place cannot be used; nothing is written then.
    """
    check_settings(run)
    check_how_many(run, method)
    tables = scores_of(run, 1, method)
    selection = Selection(tables[-1], replace=True)
    if to is not None:
        check_place(run, to, None if run.overwrite else selection)
    sources = check_before_start(run, 1, method)
    if is_complete(run.store.pool) and not run.overwrite:
        all(table.is_current() for table in tables)  # raises where other settings made them
    say_versions(run)
    say_device(run)
    check_outputs(run, 1)
    with run.writing():
        if run.overwrite:
            set_aside_damaged_tables(run, 1)
        done = make_up_to(run, 0, sources, keeps=False)
        done += [output.make() for output in (*tables, selection)]
        run.save_settings()
        place = run.folder / "selected.jsonl" if to is None else to
        done += export_rows(run, place, Asked("data", 1, trainer=trainer), replaces=to is None)
    return selection, done
