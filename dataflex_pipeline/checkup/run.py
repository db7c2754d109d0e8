"""Checks of a run's configuration: method, features, first rows, model. Nothing is written."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pyarrow as pa

from dataflex_pipeline.api import Feature, Need, Silent, Split
from dataflex_pipeline.checkup.environment import deepspeed_ready
from dataflex_pipeline.checkup.findings import Finding, checked, worst
from dataflex_pipeline.pipeline.run import Run
from dataflex_pipeline.store.parts import PartedTable

SAMPLE = 64
"""Rows of each data set that are looked at, from its start."""


def check_configuration(context: Run) -> tuple[list[Finding], list[dict[str, Any]]]:
    """Return the findings about a configuration, and an example row in stretches."""
    from dataflex_pipeline.pipeline.prepare import splits_of

    name = context.given.component_name
    findings = checked("method", lambda: _method(context, name))
    if worst(findings) == "ok":
        findings += checked("method", lambda: _needed(context, name))
    if context.given.deepspeed is not None:
        findings += deepspeed_ready()
    if context.given.features_dir is not None:
        findings.append(_shared_features(context.features))
    shown: list[dict[str, Any]] = []
    pool: list[pa.Table] = []

    def look(split: Split) -> list[Finding]:
        found, rows, stretches = _split(context, split)
        if split == "pool":
            beyond = any(each.check == "pool limits" for each in found)  # the model would fail on these rows
            pool.extend([] if beyond else [rows])
            shown.extend(stretches)
        return found

    for split in splits_of(context):
        findings += checked(split, lambda split=split: look(split))  # type: ignore[misc]
    if pool and any(pool[0].column("valid").to_pylist()):
        findings += checked("model", lambda: _model(context, pool[0]))
    return findings, shown


def _method(context: Run, name: str) -> list[Finding]:
    from dataflex_pipeline.pipeline.preflight import check_target

    method, _ = context.method(name)
    check_target(context)
    return [Finding("method", "ok", f"{name}: {method.summary}", "", "configuration")]


def _shared_features(place: Path) -> Finding:
    """Look at the folder of features that runs share: what is there, and whether more can be written."""
    existing = next(each for each in (place.absolute(), *place.absolute().parents) if each.exists())
    tables = sum(PartedTable.is_complete(folder) for folder in place.glob("*"))
    found = f"features_dir {place}: {tables} finished tables"
    if os.access(existing, os.W_OK | os.X_OK):
        return Finding("features", "ok", found, "", "configuration")
    advice = "Finished ones are used; to compute others, make it writable or name another folder."
    return Finding("features", "warning", f"{found}; it cannot be written to", advice, "configuration")


def _needed(context: Run, name: str) -> list[Finding]:
    """Check the models, packages, files and servers that the method needs; nothing is loaded or paid for."""
    from dataflex_pipeline.pipeline.preflight import features_of

    method, _ = context.method(name)
    findings: list[Finding] = []
    for need, feature in features_of(context, method):
        label = f"{need.name.replace('_', ' ')} of the {need.split}"

        def look(need: Need = need, feature: Feature = feature, label: str = label) -> list[Finding]:
            feature.check(need, None)
            doubts = [Finding(label, "warning", line, "", "configuration") for line in feature.reach()]
            return doubts or [Finding(label, "ok", "what it needs is there", "", "configuration")]

        findings += checked(label, look)
    return findings


def _split(context: Run, split: Split) -> tuple[list[Finding], pa.Table, list[dict[str, Any]]]:
    """Prepare the first rows of the pool or the target, without writing, and check them."""
    from dataflex_pipeline.checkup.rows import check_limits, check_rows, example
    from dataflex_pipeline.data.chat import ChatFormat
    from dataflex_pipeline.data.rows import RowMaker
    from dataflex_pipeline.data.scan import scan_sources
    from dataflex_pipeline.pipeline.prepare import data_settings, token_limits

    settings = data_settings(context, split)
    most = min(SAMPLE, settings.max_samples or SAMPLE)
    settings = dataclasses.replace(settings, max_samples=most, workers=1)
    scan = scan_sources(settings, Silent())
    config = context.config
    chat = ChatFormat.load(config.model_name_or_path, config.template, config.trust_remote_code)
    rows = RowMaker(settings, scan, chat, split).table(0, list(scan.placed_rows()))
    limits = token_limits(context)
    beyond = checked(
        f"{split} limits", lambda: list(check_limits(rows, chat, limits, settings.cutoff_len, split))
    )
    found = check_rows(rows, chat, settings.cutoff_len, mask_history=settings.mask_history)
    named = [dataclasses.replace(each, check=f"{split} {each.check}") for each in found]
    named += [Finding(f"{split} data", "warning", line, "", "configuration") for line in scan.notices]
    said = {each.found for each in named}
    notices = [
        Finding("template", "warning", line, "", "configuration")
        for line in chat.notices()
        if line not in said
    ]
    findings = [*named, *beyond, *(notices if split == "pool" else [])]
    return findings, rows, example(rows, chat.tokenizer)


def _model(context: Run, rows: pa.Table) -> list[Finding]:
    from dataflex_pipeline.checkup.batching import check_model

    return list(check_model(context.config, rows))
