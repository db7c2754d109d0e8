"""Other versions of torch, transformers, trl, peft or this package than a run's rounds were made with."""

from __future__ import annotations

from dataflex_pipeline.errors import CorruptError
from dataflex_pipeline.pipeline.open_run import OpenRun
from dataflex_pipeline.store.versions import changes_between_rounds, installed_versions, version_changes
from dataflex_pipeline.training.marker import read_marker


def _recorded(run: OpenRun) -> tuple[dict[str, str], dict[int, dict[str, str]]]:
    """Return the versions when the run began, and those of each finished round."""
    rounds = {}
    for number in range(run.given.last_round + 1):
        try:
            marker = read_marker(run.store.round(number).checkpoint)
        except CorruptError:  # which check_outputs reports, and --overwrite mends
            break
        if marker is None:
            break
        rounds[number] = marker.versions
    return run.store.read()[1].get("versions", {}), rounds


def versions_said(run: OpenRun) -> list[str]:
    """Return one line per round made with other versions than the one before, and one on those installed."""
    now = versions_now(run)
    return changes_between_rounds(*_recorded(run)) + ([now] if now else [])


def versions_now(run: OpenRun) -> str:
    """Return which versions installed now are not those of the last finished round; empty if none."""
    if not run.store.exists():
        return ""
    begun, rounds = _recorded(run)
    known = {number: versions for number, versions in rounds.items() if versions}
    before = known[max(known)] if known else begun
    since = f"round {max(known)}" if known else "the run's beginning"
    changed = version_changes(before, installed_versions())
    return f"other versions are installed now than at {since}: {', '.join(changed)}" if changed else ""


def say_versions(run: OpenRun) -> None:
    """Say in one line which versions are others than when the last round was made."""
    line = versions_now(run)
    if line:
        run.progress.say(f"note: {line}; results may differ from those of the old ones")
