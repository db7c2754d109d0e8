"""`dataflex doctor`: is this machine, and a configuration, fit to run? Reads only."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from dataflex_pipeline.api import Feature, Need, Silent, Split
from dataflex_pipeline.checkup.environment import deepspeed_ready, environment
from dataflex_pipeline.checkup.findings import Finding, checked, worst
from dataflex_pipeline.config.fields import Config
from dataflex_pipeline.pipeline.locate import Options
from dataflex_pipeline.pipeline.run import Run

from . import console
from .opening import open_run
from .subject import parse_assignments

SAMPLE = 64
"""Rows of each data set that are looked at, from its start."""
STYLES = {"ok": "green", "warning": "yellow", "problem": "bold red"}
ENVIRONMENT_CODE, CONFIGURATION_CODE = 1, 2


def doctor(
    config: Path | None, settings: list[str], run: str | None, method: str | None, as_json: bool
) -> None:
    """Print one line per check; the exit code is 0 unless there is a problem.

    Raises:
        ConfigError: the configuration cannot be read at all.
        SystemExit: 1 for a problem of the environment, 2 for one of the configuration.
    """
    given = config is not None or bool(settings) or run is not None or method is not None
    stream = contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()
    with stream:
        context = _context(config, settings, run, method) if given else None
        place = Path(context.given.runs_dir if context is not None else Config().runs_dir)
        findings = list(environment(place))
        shown: list[dict[str, Any]] = []
        if context is not None:
            of_configuration, shown = _configuration(context)
            findings += of_configuration
    if as_json:
        content = {"findings": [dataclasses.asdict(each) for each in findings], "example": shown}
        sys.stdout.write(json.dumps(content, ensure_ascii=False, indent=2) + "\n")
    else:
        _draw(findings, shown, given)
    _leave(findings)


def _context(config: Path | None, settings: list[str], run: str | None, method: str | None) -> Run:
    return open_run(Options(config, parse_assignments(settings), run, method), reads_only=True)


def _configuration(context: Run) -> tuple[list[Finding], list[dict[str, Any]]]:
    """Return the findings about a configuration, and an example row in stretches."""
    from dataflex_pipeline.pipeline.prepare import splits_of

    name = context.given.component_name
    findings = checked("method", lambda: _method(context, name))
    if worst(findings) == "ok":
        findings += checked("method", lambda: _needed(context, name))
    if context.given.deepspeed is not None:
        findings += deepspeed_ready()
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


def _needed(context: Run, name: str) -> list[Finding]:
    """Check the models, packages, files and servers that the method needs; nothing is loaded or paid for."""
    from dataflex_pipeline.pipeline.preflight import features_of

    method, _ = context.method(name)
    findings: list[Finding] = []
    for need, feature in features_of(context, method):
        label = f"{need.feature.replace('_', ' ')} of the {need.split}"

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
    rows = RowMaker(settings, scan, chat, split).table(0, list(scan.rows()))
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


def _draw(findings: Sequence[Finding], shown: Sequence[dict[str, Any]], given: bool) -> None:
    for area in ("environment", "configuration"):
        chosen = [each for each in findings if each.area == area]
        if chosen:
            console.line(area.capitalize(), style="bold")
        for each in chosen:
            console.line(f"  {each.state:<8} {each.check}: {each.found}", style=_style(each))
            if each.advice:
                console.line(f"           -> {each.advice}")
    _draw_example(shown)
    counts = {state: sum(each.state == state for each in findings) for state in STYLES}
    console.line(
        f"{counts['ok']} ok, {counts['warning']} warnings, {counts['problem']} problems", style="bold"
    )
    if not given:
        console.line("To check a configuration too: dataflex doctor --config FILE (or key=value)")


def _style(finding: Finding) -> str | None:
    return None if finding.state == "ok" else STYLES[finding.state]


def _draw_example(shown: Sequence[dict[str, Any]]) -> None:
    """Print a row as it is trained on; what carries loss in colour, or in brackets where there is none."""
    if not shown:
        return
    from rich.text import Text

    coloured = console.out.is_terminal and not console.out.no_color and console.out.color_system is not None
    how = "in green" if coloured else "between [[ and ]]"
    console.line(f"A row as it is trained on; what carries loss is {how}:", style="bold")
    text = Text()
    for each in shown:
        piece = "".join(c if c.isprintable() or c == "\n" else " " for c in each["text"])
        if each["carries_loss"]:
            text.append(piece if coloured else f"[[{piece}]]", style="bold green" if coloured else None)
        else:
            text.append(piece)
    console.out.print(text)


def _leave(findings: Sequence[Finding]) -> None:
    for area, code in (("configuration", CONFIGURATION_CODE), ("environment", ENVIRONMENT_CODE)):
        if worst([each for each in findings if each.area == area]) == "problem":
            sys.exit(code)
