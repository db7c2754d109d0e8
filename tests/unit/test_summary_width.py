"""The summary of a command on a terminal of 80 columns: a line per stage, its result below, nothing cut."""

import io

from rich.console import Console

from dataflex_pipeline.terminal import console

ROWS = [
    ["pool", "1.4 s", "3,600 rows, 3,600 valid", "pool"],
    [
        "score perplexity, round 1",
        "up to date",
        "3,600 of 3,600 rows scored: min -0.5, median -0.25, max -0.00014",
        "round-01/scores/perplexity.parquet",
    ],
]
NARROW = """Summary of runs/x
  stage                      time        where
  pool                       1.4 s       pool
      3,600 rows, 3,600 valid
  score perplexity, round 1  up to date  round-01/scores/perplexity.parquet
      3,600 of 3,600 rows scored: min -0.5, median -0.25, max -0.00014
"""


def printed(monkeypatch, width):
    stream = io.StringIO()
    made = Console(file=stream, force_terminal=True, color_system=None, soft_wrap=True, width=width)
    monkeypatch.setattr(console, "out", made)
    console.print_table("Summary of runs/x", ["stage", "time", "result", "where"], ROWS, wraps="result")
    return stream.getvalue()


def test_with_80_columns_results_stand_below(monkeypatch):
    assert printed(monkeypatch, 80) == NARROW


def test_with_fewer_every_cell_follows_its_name(monkeypatch):
    text = printed(monkeypatch, 60)
    assert max(map(len, text.splitlines())) <= 60
    assert "stage pool, time 1.4 s, result 3,600 rows, 3,600 valid," in text


def test_with_more_it_is_a_table(monkeypatch):
    lines = printed(monkeypatch, 160).splitlines()
    assert any("3,600 rows, 3,600 valid" in line and line.split()[-1] == "pool" for line in lines)
