"""Fingerprints: the ingredients of an output as a short stable digest, and as readable changes.

The *ingredients* of an output are a nested mapping of plain values. Their digest is the output's
fingerprint; equal ingredients mean an equal output, so a finished output is never made twice, and
different ingredients can be told to the user key by key.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

FINGERPRINT_KEY = b"dataflex.fingerprint"
INGREDIENTS_KEY = b"dataflex.ingredients"


def canonical(value: Any, where: str = "") -> str:
    """Return the one JSON text of a plain value.

    Raises:
        TypeError: the value has no stable text (objects, sets, NaN, non-string keys); a fingerprint
            of such a value could differ between two runs of the same configuration.
    """
    _check_plain(value, where)
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def _check_plain(value: Any, where: str) -> None:
    if value is None or isinstance(value, bool | int | str):
        return
    if isinstance(value, float):
        if math.isnan(value):
            raise TypeError(f"{where or 'value'}: NaN never equals itself and cannot be fingerprinted")
        return
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"{where or 'value'}: key {key!r} is not a string")
            _check_plain(item, f"{where}.{key}" if where else key)
        return
    if isinstance(value, list | tuple):
        for number, item in enumerate(value):
            _check_plain(item, f"{where}[{number}]")
        return
    raise TypeError(f"{where or 'value'}: {type(value).__name__} has no stable text for a fingerprint")


def digest(ingredients: Mapping[str, Any]) -> str:
    """Return the fingerprint (32 hex characters) of an output's ingredients."""
    return hashlib.blake2b(canonical(ingredients).encode(), digest_size=16).hexdigest()


def _flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        for key in sorted(value):
            yield from _flatten(value[key], f"{prefix}.{key}" if prefix else key)
    elif _is_named(value):
        for each in value:
            yield from _flatten({k: v for k, v in each.items() if k != "name"}, f"{prefix}.{each['name']}")
    else:
        yield prefix, json.dumps(value, ensure_ascii=False)


def _is_named(value: Any) -> bool:
    """Whether it is a list of mappings that have names, each its own."""
    if not isinstance(value, list) or not value:
        return False
    names = [each.get("name") if isinstance(each, Mapping) else None for each in value]
    return all(isinstance(name, str) for name in names) and len(set(names)) == len(names)


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return one line ``key: old -> new`` for every leaf that differs, sorted by key."""
    before, after = dict(_flatten(old)), dict(_flatten(new))
    keys = sorted(before.keys() | after.keys())
    return [
        f"{key}: {before.get(key, '(not set)')} -> {after.get(key, '(not set)')}"
        for key in keys
        if before.get(key) != after.get(key)
    ]


def file_digest(path: Path) -> str:
    """Return the blake2b digest (32 hex characters) of a file's bytes, read in blocks."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def file_state(path: Path) -> list[int]:
    """Return what tells cheaply that a file did not change: it is only ever compared for equality.

    Returns:
        Size in bytes and the times (ns) of the last change of its content and of the file itself. The second
        time cannot be set by a program, so a file put back with its old modification time is noticed; and
        neither says what is newer, so a wrong clock does no harm.
    """
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def digest_while_unchanged(path: Path) -> str:
    """Return ``file_digest``, read once per process while the file's ``file_state`` stays the same."""
    return _digest_in_state(path, *file_state(path))


@functools.lru_cache(maxsize=4096)
def _digest_in_state(path: Path, *state: int) -> str:
    return file_digest(path)


def files_digest(paths: Sequence[Path], names: Sequence[str]) -> str:
    """Return one digest over several files under the given names, in the given order."""
    return digest({name: file_digest(path) for name, path in zip(names, paths, strict=True)})
