"""The cost of a feature, measured with the code of a run on sampled rows.

Seconds are counted per unit of work: a token of a row, a drawn token, or a pair of vectors. Nothing that
costs money is asked, and no judge is loaded.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dataflex_pipeline.api import Feature, FeatureInput, Need, Silent
from dataflex_pipeline.config.fields import Config
from dataflex_pipeline.estimate.costs import has_widths, row_bytes
from dataflex_pipeline.estimate.machine import begin_peak, peak_bytes
from dataflex_pipeline.estimate.sample import disk_of, numbered, write_parts
from dataflex_pipeline.features.build import build_feature
from dataflex_pipeline.features.part_size import MOST, rows_per_part
from dataflex_pipeline.features.plan import make_feature, params_of, plan_feature
from dataflex_pipeline.models.batches import length_batches
from dataflex_pipeline.models.room import LARGEST
from dataflex_pipeline.schemas import REASON, ROW, ROW_ID, VALID, column
from dataflex_pipeline.store.agreed import BATCH_TOKENS, agreed
from dataflex_pipeline.store.parts import PartedTable

FIRST_ROWS = 8
PATIENCE = 3
"""Budgets that a batch may seem to take: it takes less, since larger batches are cheaper per row."""
DRAWN_TOKENS = 32
"""Tokens of a completion that the calibration draws at most."""
DRAWN_TOGETHER = 64
VECTORS, QUERIES = 4096, 64
PAIRS = ("neighbours", "density")


@dataclass(frozen=True)
class FeatureCost:
    """What a feature was seen to take.

    Attributes:
        start_seconds: for loading what it needs. unit_seconds: per unit of work.
        rows, units: that it was measured over. part_bytes, line_bytes: on disk, of a part and of a line.
        tokens_per_line: of a completion; 0 elsewhere. cut: share of the completions that were cut short.
        peak_bytes: of memory. rows_per_part: of the table, as the sampled rows say.
        groups: of the target, in the sample.
        batch_tokens: padded tokens per batch as the memory sizes them; 0 where it does not.
    """

    start_seconds: float
    unit_seconds: float
    rows: int
    units: float
    part_bytes: float
    line_bytes: float
    peak_bytes: int
    tokens_per_line: float = 0.0
    cut: float = 0.0
    rows_per_part: int = MOST
    groups: int = 0
    batch_tokens: int = 0


@dataclass(frozen=True)
class Bench:
    """What features are measured with.

    Attributes:
        config: of the run. rows: usable sampled rows by split. checkpoint: of the short training, or None.
        scratch: a folder. budget: seconds that one feature should be computed for. device: torch's.
    """

    config: Config
    rows: Mapping[str, PartedTable]
    checkpoint: Path | None
    scratch: Path
    budget: float
    device: str

    def measure(self, need: Need) -> FeatureCost:
        """Compute a feature for some rows and return what it took.

        Raises:
            UserError: a package, a model or a file that it needs is not there.
        """
        if need.name in PAIRS:
            return self._pairs(need)
        if need.name == "generations":
            return self._drawn(need)
        if self.checkpoint is None and getattr(params_of(need), "side", None) == "adam":
            need = replace(need, params=params_of(need).model_copy(update={"side": "sgd"}))
        rows = self.rows[need.split]
        tables = {"directions": self._directions(need)} if need.name == "influence" else {}
        feature = make_feature(need, self.config)
        found = self._timed(need, feature, rows, self._given(rows, **tables), _tokens)
        if need.name == "target_directions":
            groups = {*rows.part(0, ["group"]).column("group").to_pylist()}
            return replace(found, groups=len(groups))
        return found

    def _directions(self, need: Need) -> PartedTable:
        """Return directions of a few target rows, plain ones, which cost a row of the pool the same."""
        rows = write_parts(
            self.rows["target"].part(0).slice(0, FIRST_ROWS), self.scratch / f"few-{time.monotonic_ns()}"
        )
        wanted = replace(need, feature="target_directions", kind=None, split="target", params={})
        plan = plan_feature(wanted, self.config, lambda each: self._given(rows), rows.n_rows)
        return build_feature(self.scratch, plan, Silent()).table

    def _given(self, rows: PartedTable, **tables: PartedTable) -> FeatureInput:
        folder = self.scratch / f"feature-{time.monotonic_ns()}"
        folder.mkdir()
        fingerprint = None if self.checkpoint is None else "estimate"
        return FeatureInput(rows, rows.fingerprint, self.checkpoint, fingerprint, tables, folder)

    def _timed(
        self,
        need: Need,
        feature: Feature,
        rows: PartedTable,
        given: FeatureInput,
        units: Callable[[pa.Table], float],
    ) -> FeatureCost:
        names = [name for name in rows.schema.names if name in {*feature.input_columns, "n_tokens"}]
        per_part = rows_per_part(feature, rows)
        table = rows.part(0, names).slice(0, per_part)
        begin_peak(self.device)
        began = time.perf_counter()
        with feature.open(given, Silent()) as compute:
            start = time.perf_counter() - began
            part, made, seconds = self._batch_by_batch(compute, table, given.folder)
        folder = self.scratch / f"{need.name}-{need.split}-{time.monotonic_ns()}"
        made = made.select(feature.schema.names).cast(feature.schema)
        part_bytes, line_bytes = disk_of(made, folder)
        if has_widths(feature.schema):  # a few rows compress worse than a part does
            line_bytes = min(line_bytes, row_bytes(feature.schema))
        work = units(part)
        return FeatureCost(
            start,
            seconds / work,
            part.num_rows,
            work,
            part_bytes,
            line_bytes,
            peak_bytes(self.device),
            rows_per_part=per_part,
            batch_tokens=_measured_tokens(given.folder),
        )

    def _batch_by_batch(
        self, compute: Callable[[pa.Table], pa.Table], table: pa.Table, folder: Path | None
    ) -> tuple[pa.Table, pa.Table, float]:
        """Compute batches as a part of a run has them, those of middling length first, within the budget."""
        few = table.slice(0, FIRST_ROWS)
        # The first call sets up what later ones find ready, and sizes batches by the longest row.
        compute(_with_longest(table))
        _, seconds = _clocked(compute, few)
        affordable = int(PATIENCE * self.budget / seconds * few.num_rows)
        tokens = self.config.score_batch_tokens
        if tokens == "auto":  # found by now, if the feature's batches go by tokens
            tokens = _measured_tokens(folder) or LARGEST["cpu"]
        batches = measured_batches(table, tokens, max(FIRST_ROWS, affordable))
        # The memory of a whole batch is new the first time, and that of the longest rows counts too.
        compute(max(batches, key=_longest))
        done: list[pa.Table] = []
        made: list[pa.Table] = []
        spent = 0.0
        for batch in batches:
            found, seconds = _clocked(compute, batch)
            done.append(batch)
            made.append(found)
            spent += seconds
            if spent > self.budget:
                break
        return pa.concat_tables(done), pa.concat_tables(made), spent

    def _drawn(self, need: Need) -> FeatureCost:
        """Draw short completions with transformers; the cost is per drawn token."""
        asked: Any = make_feature(need, self.config).params
        shorter = min(asked.max_new_tokens, DRAWN_TOKENS)
        params = asked.model_copy(update={"generator": "transformers", "max_new_tokens": shorter})
        feature = make_feature(replace(need, params=params), self.config)
        rows = self.rows[need.split]
        count = max(1, DRAWN_TOGETHER // asked.mc_samples)
        table = rows.part(0, list(feature.input_columns)).slice(0, count)
        begin_peak(self.device)
        began = time.perf_counter()
        with feature.open(self._given(rows), Silent()) as compute:
            start = time.perf_counter() - began
            made = compute(table)
        seconds = time.perf_counter() - began - start
        drawn = made.filter(made.column("valid"))
        lengths = drawn.column("n_tokens").to_numpy()
        cut = drawn.column("finish").to_numpy(zero_copy_only=False) == "length"
        whole = np.where(cut, asked.max_new_tokens, lengths)
        part_bytes, line_bytes = disk_of(made, self.scratch / f"drawn-{time.monotonic_ns()}")
        return FeatureCost(
            start,
            seconds / max(1, lengths.sum()),
            table.num_rows,
            float(lengths.sum()),
            part_bytes,
            line_bytes * float(whole.mean() / max(1.0, lengths.mean())) if len(lengths) else line_bytes,
            peak_bytes(self.device),
            float(whole.mean()) if len(whole) else float(asked.max_new_tokens),
            float(cut.mean()) if len(cut) else 1.0,
            rows_per_part(feature, rows),
        )

    def _pairs(self, need: Need) -> FeatureCost:
        """Search among random unit vectors of the embeddings' length; the cost is per pair compared."""
        feature: Any = make_feature(need, self.config)
        inner: Any = feature.needs(need)["pool"]
        dimension = int(make_feature(inner, self.config).dimension)  # type: ignore[attr-defined]
        pool = random_vectors(VECTORS, dimension, self.scratch / f"pool-{dimension}")
        target = random_vectors(QUERIES, dimension, self.scratch / f"target-{dimension}")
        if need.name == "neighbours":
            given = self._given(target, pool=pool, target=target)
            return self._timed(need, feature, target, given, lambda part: float(part.num_rows) * VECTORS)
        near = _all_near(pool, self.scratch / f"near-{dimension}")
        given = self._given(pool, pool=pool, neighbours=near)
        return self._timed(need, feature, pool, given, lambda part: float(part.num_rows) * VECTORS)


def measured_batches(table: pa.Table, max_tokens: int, most: int) -> list[pa.Table]:
    """Cut rows into batches as losses and gradients make them, those of middling length first.

    Args:
        table: some rows; without ``n_tokens`` they are one batch. max_tokens: padded tokens per batch.
        most: rows that are kept of each.
    """
    if "n_tokens" not in table.column_names:
        return [table.slice(0, most)]
    lengths = table.column("n_tokens").to_numpy()
    batches = length_batches(lengths, np.zeros_like(lengths), max_tokens, 1)
    middle = len(batches) // 2
    order = sorted(range(len(batches)), key=lambda number: abs(number - middle))
    return [table.take(pa.array(np.sort(batches[number][:most]))).combine_chunks() for number in order]


def _measured_tokens(folder: Path | None) -> int:
    """Return the padded tokens per batch that were agreed on; 0 where there are none."""
    return (None if folder is None else agreed(folder, BATCH_TOKENS)) or 0


def _with_longest(table: pa.Table) -> pa.Table:
    """Return the first rows of a part, the longest one among them."""
    few = np.arange(min(FIRST_ROWS, table.num_rows))
    if "n_tokens" in table.column_names and table.num_rows > FIRST_ROWS:
        longest = int(np.argmax(table.column("n_tokens").to_numpy()))
        few[-1] = max(longest, few[-1])
    return table.take(pa.array(few)).combine_chunks()


def _longest(batch: pa.Table) -> int:
    return int(batch.column("n_tokens").to_numpy().max()) if "n_tokens" in batch.column_names else 0


def _clocked(compute: Callable[[pa.Table], pa.Table], part: pa.Table) -> tuple[pa.Table, float]:
    began = time.perf_counter()
    made = compute(part)
    return made, time.perf_counter() - began


def _tokens(part: pa.Table) -> float:
    return float(max(1, part.column("n_tokens").to_numpy().sum()))


def random_vectors(n_rows: int, dimension: int, folder: Path) -> PartedTable:
    """Write a table of random unit vectors in the columns of embeddings."""
    if PartedTable.is_complete(folder):
        return PartedTable.open(folder)
    vectors = np.random.default_rng(0).normal(size=(n_rows, dimension))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    kind = pa.list_(pa.float32(), dimension)
    flat = pa.array(vectors.astype(np.float32).reshape(-1))
    schema = pa.schema([ROW, ROW_ID, column("embedding", kind, "a random unit vector"), VALID, REASON])
    columns = [
        np.arange(n_rows),
        [f"{row:032x}" for row in range(n_rows)],
        pa.FixedSizeListArray.from_arrays(flat, dimension),
        np.ones(n_rows, bool),
        pa.nulls(n_rows, pa.string()),
    ]
    return write_parts(pa.table(columns, schema=schema), folder)


def _all_near(pool: PartedTable, folder: Path) -> PartedTable:
    """Write one target row whose neighbours are all rows of the pool."""
    if PartedTable.is_complete(folder):
        return PartedTable.open(folder)
    lists = pa.array([list(range(pool.n_rows))], pa.list_(pa.int64()))
    return write_parts(numbered(pa.table({"row": pa.array([0]), "neighbours": lists})), folder)
