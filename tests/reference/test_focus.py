"""perplexity and the score of loss: both against a plain loop over sorted losses, with ties and gaps."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sampling_tables import MemoryTable, identities

from dataflex_pipeline import api
from dataflex_pipeline.methods import build_method, method_class
from dataflex_pipeline.methods.focus import Focus
from dataflex_pipeline.pipeline.scored_block import score_block
from dataflex_pipeline.schemas import LOSSES, SCORES

SAME = {"low": "low", "medium": "middle", "high": "high"}
"""The focus of loss, and that of perplexity which means the same rows."""


def losses_of(losses, tokens=None, cut=65536):
    """Return a table of losses; None is a row that has none."""
    valid = [loss is not None for loss in losses]
    columns = {
        "row": np.arange(len(losses)),
        "row_id": identities(len(losses)),
        "loss": pa.array(losses, pa.float64()),
        "n_tokens": pa.array(tokens or [1] * len(losses), pa.int32()),
        "valid": valid,
        "reason": pa.array([None if fine else "the loss is not finite" for fine in valid], pa.string()),
    }
    return MemoryTable(pa.table(columns).cast(LOSSES), cut)


def scored(name, losses, tokens=None, cut=65536, **params):
    """Return the score table of a method on losses."""
    method = build_method(name, method_class(name), params, "a test")
    table = losses_of(losses, tokens, cut)
    state = method.begin({"now": table}, api.Selection(1, 2, 0, lambda line: None))
    schema = pa.schema([*SCORES, *method.own_columns(state)])
    pool = ["row", "row_id", "valid", "reason"]
    blocks = [api.Block(block.select(pool), {"now": block}) for block in table.blocks()]
    return pa.concat_tables([score_block(method, block, state, schema) for block in blocks])


def by_loop(losses, focus):
    """Return the scores from the definition, with one loop per row."""
    there = [loss for loss in losses if loss is not None]
    found = []
    for loss in losses:
        if loss is None:
            found.append(None)
        elif focus in ("high", "low"):
            found.append(loss if focus == "high" else -loss)
        else:
            places = [place for place, other in enumerate(sorted(there)) if other == loss]
            rank = math.fsum(places) / len(places) / (len(there) - 1) if len(there) > 1 else 0.5
            found.append(-abs(rank - 0.5))
    return found


values = st.lists(
    st.none() | st.sampled_from([0.0, 0.5, 1.0]) | st.floats(0, 20), min_size=1, max_size=30
).filter(lambda losses: any(loss is not None for loss in losses))


@given(values, st.sampled_from(sorted(SAME)), st.sampled_from([1, 4, 65536]))
def test_scores_are_those_of_a_plain_loop(losses, focus, cut):
    expected = by_loop(losses, SAME[focus])
    for name, own in (("loss", focus), ("perplexity", SAME[focus])):
        table = scored(name, losses, cut=cut, focus=own)
        assert table["score"].to_pylist() == pytest.approx(expected, abs=1e-15)
        assert table["loss"].to_pylist() == losses


@given(values, st.sampled_from(sorted(SAME)))
def test_loss_and_perplexity_of_one_focus_rank_alike(losses, focus):
    one, other = scored("loss", losses, focus=focus), scored("perplexity", losses, focus=SAME[focus])
    assert one["score"].equals(other["score"])


@given(st.lists(st.floats(0, 9) | st.sampled_from([1.0, 2.0]), min_size=1, max_size=30))
def test_rows_as_far_on_either_side_of_the_median_have_the_same_score(losses):
    """Bit for bit: ties go by row, not by rounding."""
    up = Focus.over("middle", [np.array(losses)]).scores(np.array(losses))
    down = Focus.over("middle", [-np.array(losses)]).scores(-np.array(losses))
    assert up.tobytes() == down.tobytes()
    assert up.min() >= -0.5
    assert len(set(zip(losses, up.tolist(), strict=True))) == len(set(losses))


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([3.0, 1.0, 2.0], [-0.5, -0.5, 0.0]),
        ([1.0, 2.0, 3.0, 4.0], [-1 / 2, -1 / 6, -1 / 6, -1 / 2]),
        ([1.0, 1.0, 5.0], [-0.25, -0.25, -0.5]),  # places 0 and 1 are shared: 1/2 of 2
        ([7.0, 7.0, 7.0], [0.0, 0.0, 0.0]),
        ([7.0], [0.0]),
        ([None, 7.0, None], [None, 0.0, None]),
    ],
)
def test_the_middle_by_hand(losses, expected):
    assert scored("perplexity", losses, focus="middle")["score"].to_pylist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("focus", "best"),
    [("high", 2), ("low", 1), ("middle", 0)],  # totals 6, 4, 12
)
def test_the_total_is_the_sum_over_the_response(focus, best):
    table = scored("perplexity", [3.0, 4.0, 1.2], [2, 1, 10], focus=focus, loss="total")
    assert np.argmax(table["score"].to_pylist()) == best
    sums = {"high": [6, 4, 12], "low": [-6, -4, -12], "middle": [0, -0.5, -0.5]}
    assert table["score"].to_pylist() == pytest.approx(sums[focus])
    assert table["loss"].to_pylist() == [3.0, 4.0, 1.2]
    assert table["n_tokens"].to_pylist() == [2, 1, 10]


def test_the_perplexity_is_that_of_a_token():
    table = scored("perplexity", [0.0, 2.0, 800.0, None], [3, 3, 3, 3], loss="total")
    assert table["perplexity"].to_pylist() == pytest.approx([1.0, math.exp(2), math.inf, None])
    assert table["valid"].to_pylist() == [True, True, True, False]
    assert table["reason"].to_pylist() == [None, None, None, "the loss is not finite"]


def test_only_the_middle_reads_the_losses_beforehand():
    def unread():
        raise AssertionError("read")
        yield

    assert Focus.over("low", unread()).rising.size == 0
    with pytest.raises(AssertionError, match="read"):
        Focus.over("middle", unread())


def test_both_ask_for_the_same_feature():
    selection = api.Selection(3, 5, 0, lambda line: None)
    needs = [
        build_method(name, method_class(name), {}, "t").needs(selection) for name in ("loss", "perplexity")
    ]
    assert needs[0] == needs[1] == {"now": api.Need("losses", checkpoint=2)}
