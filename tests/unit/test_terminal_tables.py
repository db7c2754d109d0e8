"""Tables on terminals of several widths: no cell is cut off, and none is a column of single words."""

import io

import pytest
from rich.console import Console

from dataflex_pipeline.terminal import console

COLUMNS = ("stage", "time", "result", "where")
ROWS = [
    ("pool", "2.5 s", "3,600 rows, 3,600 valid", "pool"),
    (
        "train, warm-up",
        "11.8 s",
        "2 steps, train loss 3.1055, mean lr 0.00387, target loss 1.8112",
        "round-00/checkpoint",
    ),
    (
        "score loss, round 1",
        "up to date",
        "3,600 of 3,600 rows scored: min 0.0004856, max 14.23",
        "round-01/scores/loss.parquet",
    ),
]


@pytest.fixture
def printed(monkeypatch):
    """Print the table on a terminal of some width; return its lines."""

    def _printed(width):
        file = io.StringIO()
        drawn = Console(file=file, force_terminal=True, color_system=None, width=width, soft_wrap=True)
        monkeypatch.setattr(console, "out", drawn)
        console.print_table("Summary of x", COLUMNS, ROWS, wraps="result")
        return file.getvalue().splitlines()

    return _printed


@pytest.mark.parametrize("width", [40, 60, 80, 100, 120, 160])
def test_every_cell_is_there_and_no_line_is_wider_than_the_terminal(printed, width):
    lines = printed(width)
    assert max(map(len, lines)) <= width
    words = " ".join(lines).split()
    for row in ROWS:
        assert all(word.strip(",") in " ".join(words) for cell in row for word in cell.split())


def test_at_80_columns_a_long_result_stands_below_its_row(printed):
    lines = [line.rstrip() for line in printed(80)]
    assert lines == [
        "Summary of x",
        "  stage                time        where",
        "  pool                 2.5 s       pool",
        "      3,600 rows, 3,600 valid",
        "  train, warm-up       11.8 s      round-00/checkpoint",
        "      2 steps, train loss 3.1055, mean lr 0.00387, target loss 1.8112",
        "  score loss, round 1  up to date  round-01/scores/loss.parquet",
        "      3,600 of 3,600 rows scored: min 0.0004856, max 14.23",
    ]


def test_where_there_is_room_a_row_is_one_line(printed):
    (line,) = [each for each in printed(160) if "train loss" in each]
    assert "train, warm-up" in line
    assert "round-00/checkpoint" in line
