"""Versions of the packages that a result depends on: recorded with it, compared between rounds.

They are part of no fingerprint: another version makes nothing stale. It is recorded in every table and
checkpoint, and said.
"""

from __future__ import annotations

import contextlib
import functools
import platform
from collections.abc import Mapping
from importlib import metadata

from dataflex_pipeline import __version__

OWN = "dataflex-pipeline"
RECORDED = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "pyarrow", "numpy")
COMPARED = (OWN, "torch", "transformers", "trl", "peft")
"""What trains and scores."""


@functools.cache
def _installed() -> tuple[tuple[str, str], ...]:
    versions = [(OWN, __version__), ("python", platform.python_version())]
    for name in RECORDED:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions.append((name, metadata.version(name)))
    return tuple(versions)


def installed_versions() -> dict[str, str]:
    """Return the versions of this package, of Python and of what is installed of `RECORDED`."""
    return dict(_installed())


def version_changes(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """Return ``name old -> new`` for each package of `COMPARED` that was recorded and differs."""
    return [
        f"{name} {old[name]} -> {new.get(name, 'not installed')}"
        for name in COMPARED
        if name in old and old[name] != new.get(name)
    ]


def changes_between_rounds(begun: Mapping[str, str], rounds: Mapping[int, Mapping[str, str]]) -> list[str]:
    """Return one line for each round that was made with other versions than what came before it.

    Args:
        begun: versions when the run began. rounds: those of each finished round; empty where not recorded.
    """
    lines, before, since = [], begun, "the run's beginning"
    for number, versions in sorted(rounds.items()):
        changed = version_changes(before, versions) if versions else []
        if changed:
            lines.append(f"round {number} was made with other versions than {since}: {', '.join(changed)}")
        before, since = versions or before, f"round {number}"
    return lines
