"""Charts: what they count against numpy, and that the drawing library takes each of them."""

import json

import numpy as np
import pandas
import pyarrow as pa
import pytest

from dataflex_pipeline.reports import charts

MADE = np.random.default_rng(0)
SHARES = [
    {"name": name, "of": of, "rows": 1, "share": 0.5}
    for name in "xy"
    for of in ("pool", "round 1", "round 2")
]
RANGES = [
    {"name": name, "rows": 3, "p05": 1.0, "p25": 2.0, "p50": 3.0, "p75": 4.0, "p95": 5.0, "table": "a"}
    for name in "xy"
]
POINTS = [
    {"row": 3, "source": "</script>", "length": 7, "score": 0.5, "of": "selected", "table": "a"},
    {"row": 4, "source": "s", "length": 700, "score": -0.5, "of": "the rest", "table": "a"},
]
OVERLAPS = [{"round": a, "other": b, "rows": 2, "share": 0.5} for a in ("1", "2") for b in ("1", "2")]
LOSSES = [{"step": step, "loss": 1.0, "of": of} for of in ("training", "target") for step in (1, 2, 3)]


def test_bars_are_what_numpy_counts_of_each_kind():
    scores, chosen = MADE.normal(size=1000), MADE.random(1000) < 0.2
    scores[:3] = np.nan, np.inf, -np.inf
    bars = charts.score_bars(scores, chosen, bars=8)
    finite = np.isfinite(scores)
    edges = np.linspace(scores[finite].min(), scores[finite].max(), 9)
    for of, kind in (("selected", chosen), ("the rest", ~chosen)):
        lines = [line for line in bars if line["of"] == of]
        expected = np.histogram(scores[finite & kind], edges)[0]
        assert [line["rows"] for line in lines] == expected.tolist()
        np.testing.assert_allclose([line["share"] for line in lines], expected / expected.sum())
        np.testing.assert_allclose([line["low"] for line in lines], edges[:-1])


def test_one_far_value_does_not_squeeze_the_rest_into_one_bar():
    scores = np.append(np.linspace(0, 1, 1000), 1e6)
    bars = charts.score_bars(scores, bars=10)
    assert bars[-1]["high"] < 2
    assert sum(line["rows"] for line in bars) == 1001
    assert max(line["share"] for line in bars) < 0.2


def test_scores_that_are_all_alike_or_none_have_no_bars():
    assert charts.score_bars(np.ones(5)) == []
    assert charts.score_bars(np.full(5, np.nan)) == []
    assert charts.score_bars(np.empty(0)) == []


BARS = [line | {"table": "a"} for line in charts.score_bars(np.arange(9.0))]
MEANS = [{"length": 9.0, "mean": 0.1, "table": "a"}]


@pytest.mark.parametrize(
    "drawn",
    [
        lambda: charts.score_chart(BARS, pick=["a", "b"]),
        lambda: charts.share_chart(SHARES),
        lambda: charts.range_chart(RANGES, pick=["a"]),
        lambda: charts.length_chart(POINTS, MEANS, pick=["a", "b"]),
        lambda: charts.length_chart(POINTS),
        lambda: charts.overlap_chart(OVERLAPS),
        lambda: charts.loss_chart(LOSSES, {1: 2}),
        lambda: charts.rate_chart([{"step": 1, "learning_rate": 1e-4}]),
    ],
)
def test_the_library_compiles_every_chart_and_a_second_one_is_the_same(drawn):
    import vl_convert

    made = drawn().to_dict()
    assert vl_convert.vegalite_to_vega(json.dumps(made), vl_version="6.4")["marks"]
    assert drawn().to_dict() == made


def test_tables_of_any_kind_give_the_same_chart():
    given = [SHARES, pandas.DataFrame(SHARES), pa.Table.from_pylist(SHARES), iter(SHARES)]
    drawn = [charts.share_chart(each).to_dict() for each in given]
    assert all(each == drawn[0] for each in drawn)
    assert drawn[0]["data"]["values"] == SHARES
