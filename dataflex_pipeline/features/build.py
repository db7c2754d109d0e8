"""Computes a feature table: finds the missing parts, computes them in order, writes the manifest last."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from dataflex_pipeline.api import Feature, FeatureInput, Need, Progress
from dataflex_pipeline.errors import ConfigError, DataError
from dataflex_pipeline.store.fingerprint import digest
from dataflex_pipeline.store.parts import PartedTable, PartsWriter
from dataflex_pipeline.store.stale import check_parts, set_aside_damaged

FEATURES = (
    "density",
    "embeddings",
    "generations",
    "gradients",
    "losses",
    "neighbours",
    "policy_gradients",
    "rewards",
)


@dataclass(frozen=True)
class FeaturePlan:
    """A feature table worked out and not yet computed.

    Attributes:
        need: what is asked for. feature: made from it. given: the rows and the checkpoint.
        upstream: plans of the features that it is computed from, by the feature's own names.
        rows_per_part: rows of the split per part; batches are formed inside a part.
        ingredients: what the table is made from; their digest is its fingerprint.
    """

    need: Need
    feature: Feature
    given: FeatureInput
    upstream: Mapping[str, FeaturePlan]
    rows_per_part: int
    ingredients: dict[str, Any]

    def folder(self, features: Path) -> Path:
        """Return the table's folder: name, split and the head of its fingerprint."""
        return features / f"{self.need.feature}-{self.need.split}-{digest(self.ingredients)[:16]}"


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


def make_feature(need: Need, config: Any) -> Feature:
    """Make the feature that a need names.

    Raises:
        ConfigError: there is no such feature.
    """
    if need.feature not in FEATURES:
        raise ConfigError(
            f"A method asks for the feature '{need.feature}'.",
            f"The features are: {', '.join(FEATURES)}.",
            "Correct the method's needs().",
        )
    module = importlib.import_module(f"dataflex_pipeline.features.{need.feature}")
    kind: type[Feature] = getattr(module, need.feature.title().replace("_", ""))
    return kind(kind.Params(**need.params), config)


def plan_feature(
    need: Need, config: Any, given: Callable[[Need], FeatureInput], rows_per_part: int
) -> FeaturePlan:
    """Work out a feature table and those that it is computed from.

    Args:
        need: what is asked for. config: the run's configuration.
        given: finds the rows and the checkpoint that a need speaks of.
        rows_per_part: rows of the split per part.
    """
    feature, found = make_feature(need, config), given(need)
    upstream = {
        key: plan_feature(inner, config, given, rows_per_part) for key, inner in feature.needs(need).items()
    }
    ingredients = {
        "feature": need.feature,
        "version": feature.version,
        "split": need.split,
        "params": feature.params.model_dump(mode="json"),
        "rows": found.fingerprint,
        "checkpoint": found.checkpoint_fingerprint,
        "rows_per_part": rows_per_part,
        **feature.ingredients(),
    }
    if upstream:
        ingredients["features"] = {key: digest(plan.ingredients) for key, plan in upstream.items()}
    return FeaturePlan(need, feature, found, upstream, rows_per_part, ingredients)


def build_feature(
    features: Path,
    plan: FeaturePlan,
    progress: Progress,
    *,
    overwrite: bool = False,
    verify: Callable[[Path], object] = lambda checkpoint: None,
) -> Built:
    """Open a feature table, computing only the parts that are not on disk, and what it is computed from.

    Args:
        features: the run's folder of features.
        plan: the table.
        progress: where to report.
        overwrite: set a damaged table aside and compute it anew.
        verify: is called with the checkpoint before anything is computed from it.

    Raises:
        DataError: no row of the split could be computed.
        CorruptError: the table on disk is damaged or foreign, and ``overwrite`` is not set.
    """
    began = time.monotonic()
    folder, given, feature = plan.folder(features), plan.given, plan.feature
    n_parts = -(-given.table.n_rows // plan.rows_per_part)
    if overwrite:
        set_aside_damaged(folder, plan.ingredients)
    if PartedTable.is_complete(folder):
        check_parts(folder, digest(plan.ingredients))
        return Built(PartedTable.open(folder), 0, n_parts, time.monotonic() - began)
    tables = {
        key: build_feature(features, inner, progress, overwrite=overwrite, verify=verify).table
        for key, inner in plan.upstream.items()
    }
    if given.checkpoint is not None:
        verify(given.checkpoint)
    writer = PartsWriter(folder, feature.schema, plan.ingredients)
    missing = [number for number in range(n_parts) if number not in writer.done]
    if missing:
        _compute(writer, missing, plan, replace(given, tables=tables, folder=folder), progress)
    summary = _check_valid(writer, n_parts, plan.need)
    return Built(writer.finish(n_parts, summary), len(missing), n_parts, time.monotonic() - began)


def _compute(
    writer: PartsWriter, missing: list[int], plan: FeaturePlan, given: FeatureInput, progress: Progress
) -> None:
    read = _part_reader(given, plan.feature, plan.rows_per_part)
    n_rows = given.table.n_rows
    sizes = [min(plan.rows_per_part, n_rows - number * plan.rows_per_part) for number in missing]
    with plan.feature.open(given, progress) as compute:
        what = f"{plan.need.feature} of the {plan.need.split}"
        progress.start(what, n_rows, "rows", n_rows - sum(sizes))
        for number, size in zip(missing, sizes, strict=True):
            writer.write(number, compute(read(number)))
            progress.advance(size)
        progress.finish()


def _part_reader(given: FeatureInput, feature: Feature, rows_per_part: int) -> Callable[[int], pa.Table]:
    table = given.table
    if not isinstance(table, PartedTable):
        raise TypeError("features are computed over a parted table")
    columns = [name for name in feature.input_columns if name in table.schema.names]

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
            f"The feature {need.feature} has no valid row in the {need.split} ({worst}).",
            "Without a single finite value there is nothing to select by.",
            "Check that the weights are sound (a diverged training gives NaN) and that the data is right.",
        )
    return {"valid": n_valid, "invalid": reasons}
