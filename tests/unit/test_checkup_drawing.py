"""Findings of `dataflex doctor` on a terminal, without one, and with NO_COLOR."""

import io

import pytest
from rich.console import Console

from dataflex_pipeline.checkup.findings import Finding
from dataflex_pipeline.terminal import console
from dataflex_pipeline.terminal.checkup import draw_checkup

FOUND = [
    Finding("torch", "ok", "2.13"),
    Finding("disk", "warning", "little room [1 GB] \x1b[2J", "free some"),
    Finding("model", "problem", "is not there", "name another", "configuration"),
]
PLAIN = """Environment
  ok       torch: 2.13
  warning  disk: little room [1 GB] \\u001b[2J
           -> free some
Configuration
  problem  model: is not there
           -> name another
1 ok, 1 warnings, 1 problems
"""


def drawn(monkeypatch, **settings):
    stream = io.StringIO()
    monkeypatch.setattr(
        console, "out", Console(file=stream, highlight=False, soft_wrap=True, width=80, **settings)
    )
    draw_checkup(FOUND, [], given=True)
    return stream.getvalue()


def test_states_are_in_colour_on_a_terminal(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    text = drawn(monkeypatch, force_terminal=True, color_system="standard")
    for state, colour in (("ok", "32"), ("warning", "33"), ("problem", "1;31")):
        assert f"\x1b[{colour}m  {state}" in text


@pytest.mark.parametrize("settings", [{}, {"force_terminal": True, "no_color": True, "color_system": None}])
def test_without_colours_it_is_the_same_text(monkeypatch, settings):
    assert drawn(monkeypatch, **settings) == PLAIN
