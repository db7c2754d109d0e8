"""The pool and the target: prepared once, checked on every command without reading the sources again."""

from __future__ import annotations

import dataclasses
import os
import time
from typing import Any

from dataflex_pipeline.api import Split
from dataflex_pipeline.data.limits import TokenLimits
from dataflex_pipeline.data.prepare import ingredients, prepare, worker_count
from dataflex_pipeline.data.scan import Scan, scan_sources
from dataflex_pipeline.data.settings import DataSettings
from dataflex_pipeline.data.sources.named import Source as DataSource
from dataflex_pipeline.data.sources.named import resolve_sources
from dataflex_pipeline.errors import RunError
from dataflex_pipeline.generate.settings import model_settings
from dataflex_pipeline.models.source import tokenizer_digest
from dataflex_pipeline.pipeline.memo import sources_key
from dataflex_pipeline.pipeline.open_run import OpenRun
from dataflex_pipeline.pipeline.output import Output
from dataflex_pipeline.store.parts import PartedTable
from dataflex_pipeline.store.stale import is_complete

MAX_WORKERS = 8


def data_settings(run: OpenRun, split: Split) -> DataSettings:
    """Return what decides the rows of the pool or the target."""
    config = run.given
    return DataSettings(
        datasets=run.datasets(split),
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


def has_target(run: OpenRun) -> bool:
    """Whether a target set is configured."""
    return bool(run.given.eval_dataset)


def splits_of(run: OpenRun) -> list[Split]:
    """Return the splits that the run has: the pool, and the target where one is configured."""
    return ["pool", "target"] if run.given.eval_dataset else ["pool"]


@dataclasses.dataclass(frozen=True)
class Source:
    """A split that was looked at and not yet prepared: its settings, scan and ingredients."""

    settings: DataSettings
    scan: Scan
    wanted: dict[str, Any]


def read_sources(run: OpenRun, split: Split) -> tuple[DataSettings, Scan]:
    """Resolve and read the sources of a split; every mistake in them shows here, nothing is written.

    Sources that are those of the last command are not read again: the run remembers what they were.
    """
    settings = data_settings(run, split)
    head = run.given.target_head if split == "target" else None
    sources = resolve_sources(settings) if head is None else _head(run, head)
    key = sources_key(settings, sources)
    scan = run.memo.scan(split, key, sources)
    if scan is None:
        try:
            scan = scan_sources(settings, run.progress, sources)
        finally:
            run.progress.finish()
        run.memo.keep(split, key, scan)
    if run.given.preprocessing_num_workers is None:  # ours to choose, so without a word
        settings = dataclasses.replace(settings, workers=worker_count(settings.workers, scan.n_rows))
    return settings, scan


def _head(run: OpenRun, n_rows: int) -> tuple[DataSource, ...]:
    """Return the pool's sources, cut to its first rows."""
    _, pool = read_sources(run, "pool")
    kept: list[DataSource] = []
    for scanned in pool.sources:
        if n_rows > 0:
            kept.append(dataclasses.replace(scanned.source, limit=min(scanned.n_rows, n_rows)))
            n_rows -= scanned.n_rows
    return tuple(kept)


def look(run: OpenRun, split: Split) -> Source:
    """Read the sources of a split (see `read_sources`) and say what it would be prepared from."""
    settings, scan = read_sources(run, split)
    tokenizer = tokenizer_digest(run.config, run.memo.digest)
    return Source(settings, scan, ingredients(settings, scan, tokenizer, split))


class Rows(Output):
    """The prepared rows of a split.

    Args:
        run: that they belong to.
        split: pool, target or test.
        source: the sources, if they were looked at already.
    """

    def __init__(self, run: OpenRun, split: Split, source: Source | None = None) -> None:
        super().__init__(run, split, split, f"The {split}", run.store.split(split))
        self.split, self._source = split, source

    @property
    def source(self) -> Source:
        """The sources, looked at when they are needed first."""
        if self._source is None:
            self._source = look(self.run, self.split)
        return self._source

    def inputs(self) -> dict[str, Any]:
        """Return settings, files and tokenizer that the rows follow from."""
        return self.source.wanted

    def write(self) -> None:
        """Read, render and tokenize the rows."""
        run, began = self.run, time.monotonic()
        table = prepare(
            self.source.settings,
            self.source.scan,
            run.config.model_name_or_path,
            tokenizer_digest(run.config, run.memo.digest),
            self.path,
            self.split,
            run.progress,
            trust_remote_code=run.config.trust_remote_code,
            limits=token_limits(run),
        )
        run.memo.save()
        run.store.note(stage=f"prepare {self.split}", seconds=time.monotonic() - began, rows=table.n_rows)

    def describe(self) -> str:
        """Return how many rows there are and how many are valid."""
        table = PartedTable.open(self.path)
        return f"{table.n_rows:,} rows, {table.summary.get('valid', table.n_rows):,} valid"


def token_limits(run: OpenRun) -> TokenLimits:
    """Return how many positions and tokens the run's model takes."""
    return TokenLimits.of(model_settings(run.config))


def open_split(run: OpenRun, split: Split) -> PartedTable:
    """Open the prepared pool or target.

    Raises:
        RunError: it was not prepared yet.
    """
    folder = run.store.split(split)
    if not is_complete(folder):
        raise RunError(
            f"The {split} of this run is not prepared ({folder}).",
            "Every later step works on the prepared rows.",
            "Run `dataflex warmup` first.",
        )
    return PartedTable.open(folder)
