"""Fixtures of the unit tests."""

import textwrap
from pathlib import Path

import pytest


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a YAML file into an empty working folder and return its path relative to it."""
    monkeypatch.chdir(tmp_path)

    def _write(text: str, name: str = "run.yaml") -> Path:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(textwrap.dedent(text), encoding="utf-8")
        return Path(name)

    return _write
