"""Whether two run folders hold the same (times and locks aside), and whether anything was done twice."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml

CIRCUMSTANCES = frozenset({"seconds", "created", "time", "git", "hardware", "versions", "own_digest"})
"""Keys of JSON and YAML files that say when and where something was made."""
NOT_COMPARED = {".lock", ".lock-owner", "history.jsonl", "sources.json"}
"""Files that say who works, when something was done, and when the sources were last changed."""


def differences(expected: Path, found: Path, besides: frozenset[str] = frozenset()) -> list[str]:
    """Return one line per file that is missing, left over or of other content.

    Args:
        expected, found: run folders. besides: keys of JSON and YAML files that may differ too.
    """
    here, there = _files(expected), _files(found)
    lines = [f"{name}: missing" for name in sorted(here - there)]
    lines += [f"{name}: left over" for name in sorted(there - here)]
    for name in sorted(here & there):
        lines += [f"{name}: {text}" for text in _compare(expected / name, found / name, besides)]
    return lines


def _files(folder: Path) -> set[str]:
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name not in NOT_COMPARED]
    # an empty folder that only one of them has is left over too
    paths += [path for path in folder.rglob("*") if path.is_dir() and not any(path.iterdir())]
    return {path.relative_to(folder).as_posix() for path in paths}


def _compare(expected: Path, found: Path, besides: frozenset[str]) -> Iterator[str]:
    if expected.read_bytes() == found.read_bytes():
        return
    if expected.suffix == ".parquet":
        yield from _compare_tables(expected, found)
    elif expected.suffix in (".json", ".yaml"):
        old, new = _plain(expected, besides), _plain(found, besides)
        yield from (
            f"{key} differs" for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)
        )
    else:  # weights, optimizer, schedule and random streams too: equal tensors are equal bytes
        yield "other bytes"


def _compare_tables(expected: Path, found: Path) -> Iterator[str]:
    old, new = pq.read_table(expected), pq.read_table(found)
    if not old.schema.equals(new.schema, check_metadata=True):
        yield "other schema or metadata"
    yield "other rows" if not old.equals(new) else "other bytes, equal rows"


def _plain(path: Path, besides: frozenset[str]) -> dict[str, Any]:
    content = yaml.safe_load(path.read_text()) if path.suffix == ".yaml" else json.loads(path.read_text())
    stripped: dict[str, Any] = _without(CIRCUMSTANCES | besides, content, path.name)
    return stripped


def _without(keys: frozenset[str], content: Any, name: str) -> Any:
    if isinstance(content, dict):
        kept = {key: value for key, value in content.items() if key not in keys}
        # the marker of a checkpoint holds digests of files; those are compared themselves
        kept.pop("files" if name == "COMPLETE.json" else None, None)
        return {key: _without(keys, value, name) for key, value in kept.items()}
    if isinstance(content, list):
        return [_without(keys, value, name) for value in content]
    return content


def done_twice(book: Sequence[tuple[str, str]]) -> list[str]:
    """Return what was begun although its result was on disk already, from a book over all restarts.

    A part or table counts as on disk once it was renamed into place; a training step once a checkpoint
    of it or of a later step has its marker, or the round's checkpoint is there.
    """
    visible: set[str] = set()
    lines = []
    for event, name in book:
        if event == "table" and name in visible:
            lines.append(f"{name} was made again")
        elif event == "step" and _is_trained(Path(name), visible):
            lines.append(f"the step of {name} was trained again")
        elif event == "visible":
            visible.add(name)
    return lines


def _is_trained(checkpoint: Path, visible: set[str]) -> bool:
    if (checkpoint.parent.parent / "checkpoint").as_posix() in visible:
        return True
    step = int(checkpoint.name.removeprefix("checkpoint-"))
    markers = [Path(name).parent for name in visible if name.endswith("COMPLETE.json")]
    inside = [path.name.partition("checkpoint-")[2] for path in markers if path.parent == checkpoint.parent]
    return any(int(other) >= step for other in inside if other)
