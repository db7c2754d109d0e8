"""Computes a feature table: finds the missing parts, computes them in order, writes the manifest last."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from dataflex_pipeline.api import Feature, FeatureInput, Need, Progress
from dataflex_pipeline.errors import ConfigError, DataError
from dataflex_pipeline.store.fingerprint import digest
from dataflex_pipeline.store.parts import PartedTable, PartsWriter
from dataflex_pipeline.store.stale import check_parts, set_aside_damaged

FEATURES = ("gradients", "losses")


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


def feature_ingredients(
    feature: Feature, need: Need, given: FeatureInput, rows_per_part: int
) -> dict[str, Any]:
    """Return what a feature table is made from: settings, rows, checkpoint, code version."""
    return {
        "feature": need.feature,
        "version": feature.version,
        "split": need.split,
        "params": feature.params.model_dump(mode="json"),
        "rows": given.fingerprint,
        "checkpoint": given.checkpoint_fingerprint,
        "rows_per_part": rows_per_part,
        **feature.ingredients(),
    }


def feature_folder(features: Path, need: Need, ingredients: dict[str, Any]) -> Path:
    """Return the folder of a feature table: name, split and the head of its fingerprint."""
    return features / f"{need.feature}-{need.split}-{digest(ingredients)[:16]}"


def build_feature(
    features: Path,
    need: Need,
    feature: Feature,
    given: FeatureInput,
    rows_per_part: int,
    progress: Progress,
    *,
    overwrite: bool = False,
) -> Built:
    """Open a feature table, computing only the parts that are not on disk.

    Args:
        features: the run's folder of features.
        need: what is asked for. feature: made from it. given: the rows and the checkpoint.
        rows_per_part: rows per part; batches are formed inside a part.
        progress: where to report.
        overwrite: set a damaged table aside and compute it anew.

    Raises:
        DataError: no row of the split could be computed.
        CorruptError: the table on disk is damaged or foreign, and ``overwrite`` is not set.
    """
    began = time.monotonic()
    ingredients = feature_ingredients(feature, need, given, rows_per_part)
    folder = feature_folder(features, need, ingredients)
    n_parts = -(-given.table.n_rows // rows_per_part)
    if overwrite:
        set_aside_damaged(folder, ingredients)
    if PartedTable.is_complete(folder):
        check_parts(folder, digest(ingredients))
        return Built(PartedTable.open(folder), 0, n_parts, time.monotonic() - began)
    writer = PartsWriter(folder, feature.schema, ingredients)
    missing = [number for number in range(n_parts) if number not in writer.done]
    read = _part_reader(given, feature, rows_per_part)
    sizes = {number: min(rows_per_part, given.table.n_rows - number * rows_per_part) for number in missing}
    if missing:
        with feature.open(given, progress) as compute:
            what, n_rows = f"{need.feature} of the {need.split}", given.table.n_rows
            progress.start(what, n_rows, "rows", n_rows - sum(sizes.values()))
            for number in missing:
                writer.write(number, compute(read(number)))
                progress.advance(sizes[number])
            progress.finish()
    summary = _check_valid(writer, n_parts, need)
    return Built(writer.finish(n_parts, summary), len(missing), n_parts, time.monotonic() - began)


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
