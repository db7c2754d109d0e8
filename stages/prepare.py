"""The pool and the target: prepared once, checked on every command without reading the sources again."""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path
from typing import Any

from dataflex_pipeline.api import Split
from dataflex_pipeline.data.limits import TokenLimits
from dataflex_pipeline.data.prepare import ingredients, prepare, worker_count
from dataflex_pipeline.data.scan import Scan, scan_sources
from dataflex_pipeline.data.settings import DataSettings
from dataflex_pipeline.data.sources import Source as DataSource
from dataflex_pipeline.data.sources import resolve_sources
from dataflex_pipeline.errors import RunError
from dataflex_pipeline.generate.settings import model_settings
from dataflex_pipeline.models.source import tokenizer_digest
from dataflex_pipeline.store.parts import PartedTable
from dataflex_pipeline.store.stale import is_complete, is_current

from .context import Context
from .memo import sources_key
from .outcome import Outcome

MAX_WORKERS = 8


def data_settings(context: Context, split: Split) -> DataSettings:
    """Return what decides the rows of the pool or the target."""
    config = context.given
    return DataSettings(
        datasets=context.datasets(split),
        dataset_dir=config.dataset_dir,
        template=config.template,
        cutoff_len=config.cutoff_len,
        max_samples=config.max_samples,
        mask_history=config.mask_history,
        columns=config.data_columns,
        tags=config.data_tags,
        default_system=config.default_system,
        group_column=config.eval_group_column if split == "target" else None,
        seed=config.seed,
        workers=config.preprocessing_num_workers or min(os.cpu_count() or 1, MAX_WORKERS),
    )


def has_target(context: Context) -> bool:
    """Whether a target set is configured."""
    return bool(context.given.eval_dataset)


def splits_of(context: Context) -> list[Split]:
    """Return the splits that the run has: the pool, and the target where one is configured."""
    return ["pool", "target"] if context.given.eval_dataset else ["pool"]


def table_folder(context: Context, split: Split) -> Path:
    """Return where the prepared rows of a split are."""
    return context.run.split(split)


@dataclasses.dataclass(frozen=True)
class Source:
    """A split that was looked at and not yet prepared: its settings, scan and ingredients."""

    settings: DataSettings
    scan: Scan
    wanted: dict[str, Any]


def read_sources(context: Context, split: Split) -> tuple[DataSettings, Scan]:
    """Resolve and read the sources of a split; every mistake in them shows here, nothing is written.

    Sources that are those of the last command are not read again: the run remembers what they were.
    """
    settings = data_settings(context, split)
    head = context.given.target_head if split == "target" else None
    sources = resolve_sources(settings) if head is None else _head(context, head)
    key = sources_key(settings, sources)
    scan = context.memo.scan(split, key, sources)
    if scan is None:
        try:
            scan = scan_sources(settings, context.progress, sources)
        finally:
            context.progress.finish()
        context.memo.keep(split, key, scan)
    if context.given.preprocessing_num_workers is None:  # ours to choose, so without a word
        settings = dataclasses.replace(settings, workers=worker_count(settings.workers, scan.n_rows))
    return settings, scan


def _head(context: Context, n_rows: int) -> tuple[DataSource, ...]:
    """Return the pool's sources, cut to its first rows."""
    _, pool = read_sources(context, "pool")
    kept: list[DataSource] = []
    for scanned in pool.sources:
        if n_rows > 0:
            kept.append(dataclasses.replace(scanned.source, limit=min(scanned.n_rows, n_rows)))
            n_rows -= scanned.n_rows
    return tuple(kept)


def look(context: Context, split: Split) -> Source:
    """Read the sources of a split (see `read_sources`) and say what it would be prepared from."""
    settings, scan = read_sources(context, split)
    tokenizer = tokenizer_digest(context.config, context.memo.digest)
    return Source(settings, scan, ingredients(settings, scan, tokenizer, split))


def prepare_split(context: Context, split: Split, source: Source) -> Outcome:
    """Prepare a split unless it is there."""
    began = time.monotonic()
    folder = table_folder(context, split)
    current = is_current(folder, source.wanted, f"The {split}", overwrite=context.overwrite)
    if current:
        table = PartedTable.open(folder)
    else:
        table = prepare(
            source.settings,
            source.scan,
            context.config.model_name_or_path,
            tokenizer_digest(context.config, context.memo.digest),
            folder,
            split,
            context.progress,
            trust_remote_code=context.config.trust_remote_code,
            limits=token_limits(context),
        )
        context.memo.save()
        context.run.note(stage=f"prepare {split}", seconds=time.monotonic() - began, rows=table.n_rows)
    return Outcome(split, folder, not current, time.monotonic() - began, describe(table))


def token_limits(context: Context) -> TokenLimits:
    """Return how many positions and tokens the run's model takes."""
    return TokenLimits.of(model_settings(context.config))


def describe(table: PartedTable) -> str:
    """Return one line about a prepared table."""
    valid = table.summary.get("valid", table.n_rows)
    return f"{table.n_rows:,} rows, {valid:,} valid"


def open_split(context: Context, split: Split) -> PartedTable:
    """Open the prepared pool or target.

    Raises:
        RunError: it was not prepared yet.
    """
    folder = table_folder(context, split)
    if not is_complete(folder):
        raise RunError(
            f"The {split} of this run is not prepared ({folder}).",
            "Every later step works on the prepared rows.",
            "Run `dataflex warmup` first.",
        )
    return PartedTable.open(folder)
