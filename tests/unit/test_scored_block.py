"""A method's answer for a block of the pool: what is taken, and what is refused in words."""

import numpy as np
import pyarrow as pa
import pytest

from dataflex_pipeline import api
from dataflex_pipeline.errors import ConfigError
from dataflex_pipeline.pipeline.scored_block import score_block
from dataflex_pipeline.schemas import SCORES


class Given(api.Method):
    """Returns what it is given."""

    returned = None

    def needs(self, selection):
        return {}

    def score(self, block, state):
        return self.returned

    def weigh(self, scores, state):
        raise AssertionError


def scored(returned):
    columns = {"row": [0, 1, 2], "row_id": ["a", "b", "c"]}
    columns |= {"valid": [True, True, False], "reason": [None, None, "no"]}
    pool = pa.RecordBatch.from_pydict(columns)
    method = Given.__new__(Given)
    method.returned = returned
    return score_block(method, api.Block(pool, {}), None, pa.schema(SCORES))


def test_numbers_of_any_kind_and_reasons_in_any_sequence():
    for score in ([1, 2, 3], np.array([1, 2, 3], dtype=np.int8), [True, False, True], (1.0, 2.0, 3.0)):
        assert scored({"score": score})["valid"].to_pylist() == [True, True, False]
    for reason in ([None, "too odd", None], np.array([None, "too odd", None])):
        table = scored({"score": [1.0, np.nan, 1.0], "reason": reason})
        assert table["reason"].to_pylist() == [None, "too odd", "no"]


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (None, "NoneType instead of arrays"),
        ([1, 2, 3], "list instead of arrays"),
        ({}, "no score, but nothing"),
        ({"scores": [1, 2, 3]}, "no score, but scores"),
        ({1: [1, 2, 3]}, "instead of arrays by the names"),
        ({"score": 1.0}, r"score of the shape \[\] for 3 rows"),
        ({"score": [1, 2]}, r"score of the shape \[2\] for 3 rows"),
        ({"score": np.zeros((3, 2))}, r"score of the shape \[3, 2\] for 3 rows"),
        ({"score": (x for x in range(3))}, r"score of the shape \[\]"),
        ({"score": ["1", "2", "3"]}, "no real numbers"),
        ({"score": [1, 2, 10**400]}, "no real numbers"),
        ({"score": [1j, 2, 3]}, "no real numbers"),
        ({"score": [1, 2, np.nan], "reason": [1, 2, 3]}, "neither text nor None"),
        ({"score": [1, 2, np.nan], "reason": None}, "reason of the shape"),
    ],
)
def test_anything_else_is_refused_with_the_name_of_the_method(returned, said):
    with pytest.raises(ConfigError, match=said) as caught:
        scored(returned)
    assert "Given" in str(caught.value)
