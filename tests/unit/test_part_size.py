"""The rows of a part where rows_per_part is auto: counted from work, and never from a clock or a launch."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataflex_pipeline.features.part_size import BUSY_ACCELERATOR, BUSY_CPU, MOST, choose_rows, rows_for

B7 = 7e9


@pytest.mark.parametrize(
    ("parameters", "tokens", "n_rows", "busy", "wanted"),
    [
        (1e6, 60, 1000, BUSY_CPU, 1024),  # the demo: one part, as it always was
        (
            135e6,
            200,
            720,
            BUSY_CPU,
            16,
        ),  # on two cores some 15 s a part
        (B7, 2048, 100_000, BUSY_ACCELERATOR, 64),
        (B7, 150, 100_000, BUSY_ACCELERATOR, 1024),
        (B7, 150, 1000, BUSY_ACCELERATOR, 128),  # a small target: 8 parts instead of one
        (B7, 2048, 50, BUSY_CPU, 1),
    ],
)
def test_some_sizes(parameters, tokens, n_rows, busy, wanted):
    assert rows_for(6 * parameters * tokens, n_rows, busy) == wanted


@given(
    work=st.floats(1e3, 1e18),
    n_rows=st.integers(1, 10**7),
    busy=st.sampled_from([BUSY_CPU, BUSY_ACCELERATOR]),
)
def test_a_part_is_busy_and_not_too_busy(work, n_rows, busy):
    rows = rows_for(work, n_rows, busy)
    assert 1 <= rows <= MOST
    assert rows & (rows - 1) == 0
    assert rows == 1 or rows * work <= busy
    whole_parts = rows in (MOST, 1) or 2 * rows * work > busy
    assert whole_parts or n_rows < 32 * 2 * rows, "parts are made smaller where there are few of them only"
    assert rows == MOST or rows == 1 or 2 * rows * work > busy / 8


def test_work_that_is_not_known_makes_large_parts():
    table = SimpleNamespace(n_rows=10, schema=SimpleNamespace(names=["n_tokens"]), sum=lambda name: 100)
    feature = SimpleNamespace(row_flops=lambda tokens: 0.0)
    assert choose_rows(feature, table) == MOST
    heavy = SimpleNamespace(row_flops=lambda tokens: 1e12 * tokens, config=SimpleNamespace(device="cpu"))
    assert choose_rows(heavy, table) == 1
