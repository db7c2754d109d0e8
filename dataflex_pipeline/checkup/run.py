"""Checks of a run's configuration: method, features, first rows, model. Nothing is written."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from dataflex_pipeline.api import Feature, Need, Silent, Split
from dataflex_pipeline.checkup.environment import deepspeed_ready
from dataflex_pipeline.checkup.findings import Finding, checked, worst
from dataflex_pipeline.config.fields import DEMO
from dataflex_pipeline.data.leaks import LEAKS_SHOWN, Overlap
from dataflex_pipeline.declared.feature import doubts
from dataflex_pipeline.pipeline.run import Run
from dataflex_pipeline.store.parts import PartedTable

if TYPE_CHECKING:
    from dataflex_pipeline.data.conversation import Conversation

SAMPLE = 64
"""Rows of each data set that are looked at, from its start."""
COMPARED = 100_000
"""Rows of the pool that the target's rows are looked for in, from its start."""
UNMADE = "is the embedded demo's, which the first round makes; nothing is looked at before"


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

    splits = splits_of(context)
    if context.lacks_demo and DEMO in (context.given.dataset, context.given.model_name_or_path):
        named = "model" if context.given.dataset != DEMO else "pool"
        return [*findings, Finding(named, "ok", f"it {UNMADE}", "", "configuration")], shown
    lacking = checked("model", lambda: _model_files(context))
    findings += lacking
    for split in splits:
        findings += checked(split, lambda split=split: look(split))  # type: ignore[misc]
    if "target" in splits and worst(findings) != "problem":
        findings += checked("target in pool", lambda: _leaks(context))
    if pool and any(pool[0].column("valid").to_pylist()) and not lacking:
        findings += checked("model", lambda: _model(context, pool[0]))
        if worst(findings) != "problem":
            findings += _memory(context, name, pool[0])
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
    from dataflex_pipeline.pipeline.preflight import features_of, scoring_methods, similarity_features

    methods = [context.method(each)[0] for each in scoring_methods(context, name)]
    findings: list[Finding] = []
    needed = [each for method in methods for each in features_of(context, method)]
    for need, feature in [*needed, *similarity_features(context, scoring_methods(context, name))]:
        label = f"{need.name.replace('_', ' ')} of the {need.split}"

        def look(need: Need = need, feature: Feature = feature, label: str = label) -> list[Finding]:
            feature.check(need, None)
            found = [Finding(label, "warning", line, "", "configuration") for line in doubts(feature)]
            return found or [Finding(label, "ok", "what it needs is there", "", "configuration")]

        findings += checked(label, look)
    return findings


def _split(context: Run, split: Split) -> tuple[list[Finding], pa.Table, list[dict[str, Any]]]:
    """Prepare the first rows of the pool or the target, without writing, and check them."""
    from dataflex_pipeline.checkup.rows import check_limits, check_rows, example
    from dataflex_pipeline.data.chat.labelled import ChatFormat
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


def _model_files(context: Run) -> list[Finding]:
    """Look for the model's weights, which are read last."""
    from dataflex_pipeline.models.weights import check_model_here

    check_model_here(context.config)
    return []


def _memory(context: Run, name: str, rows: pa.Table) -> list[Finding]:
    """Say what gradients, where the method takes some, and training steps make of the free memory."""
    from dataflex_pipeline.checkup.batching import different_lengths
    from dataflex_pipeline.checkup.memory import gradients_memory, training_memory
    from dataflex_pipeline.features.plan import OF_GRADIENTS
    from dataflex_pipeline.pipeline.preflight import features_of, scoring_methods

    methods = [context.method(each)[0] for each in scoring_methods(context, name)]
    needed = {need.name for method in methods for need, _ in features_of(context, method)}
    config, findings = context.config, []
    if needed.intersection(OF_GRADIENTS):
        few = different_lengths(rows)
        findings += checked("gradient memory", lambda: list(gradients_memory(config, few)))
    if config.horizon:
        batch = context.global_batch
        findings += checked("training memory", lambda: list(training_memory(config, rows, batch)))
    return findings


def _leaks(context: Run) -> list[Finding]:
    """Look for rows of the target in the pool."""
    head = context.given.target_head
    if head is not None:
        found = f"the target is the first {head:,} rows of the pool, as eval_dataset says"
        return [Finding("target in pool", "ok", found, "", "configuration")]
    shared = _overlap(context)
    whole = f"{shared.n_target:,} target rows are in the pool"
    less = f" (its first {COMPARED:,} rows)" if shared.n_pool == COMPARED else ""
    said = f"{len(shared.exact):,} of {whole}{less} word for word, {len(shared.near):,} more but for case, "
    said += "punctuation and white space"
    pairs = [*shared.exact.items(), *shared.near.items()]
    if not pairs:
        return [Finding("target in pool", "ok", said, "", "configuration")]
    shown = ", ".join(f"target row {row} = pool row {other}" for row, other in pairs[:LEAKS_SHOWN])
    more = ", ..." if len(pairs) > LEAKS_SHOWN else ""
    advice = "Take them out of one of the two: selecting them is training on what is evaluated."
    return [Finding("target in pool", "warning", f"{said}: {shown}{more}", advice, "configuration")]


def _overlap(context: Run) -> Overlap:
    """Read the target, and the pool as far as it is compared; nothing is tokenised."""
    from dataflex_pipeline.data.leaks import overlap

    pool = itertools.islice(_conversations(context, "pool"), COMPARED)
    return overlap(_conversations(context, "target"), enumerate(pool))


def _conversations(context: Run, split: Split) -> Iterator[Conversation | None]:
    """Yield the conversations of a split in order; None for a row that cannot be used."""
    from dataflex_pipeline.data.conversation import RowError
    from dataflex_pipeline.data.formats.formats import to_conversation
    from dataflex_pipeline.data.scan import scan_sources
    from dataflex_pipeline.data.sources.named import resolve_sources
    from dataflex_pipeline.pipeline.prepare import data_settings

    settings = data_settings(context, split)
    few = dataclasses.replace(settings, max_samples=min(SAMPLE, settings.max_samples or SAMPLE))
    layouts = [each.layout for each in scan_sources(few, Silent()).sources]
    for source, layout in zip(resolve_sources(settings), layouts, strict=True):
        for row in source.rows():
            try:
                yield to_conversation(row, layout.of(row), source.columnar)
            except RowError:
                yield None
