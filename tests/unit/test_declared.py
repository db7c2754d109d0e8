"""Classes and functions of the user's own that break their contract: one error in three parts, by name."""

from __future__ import annotations

import inspect
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pydantic import Field

from dataflex_pipeline import api
from dataflex_pipeline.config.fields import Config
from dataflex_pipeline.declared import check_functions
from dataflex_pipeline.declared.feature import (
    doubts,
    has_beside,
    ingredients,
    opened,
    part_table,
    row_flops,
)
from dataflex_pipeline.declared.method import (
    check_method_class,
    group_columns,
    own_columns,
    rescored,
    target_ranking,
    weights,
)
from dataflex_pipeline.errors import ConfigError, UserError
from dataflex_pipeline.features.plan import (
    FEATURES,
    feature_class,
    make_feature,
    method_needs,
    ranking_needs,
    with_upstream,
)
from dataflex_pipeline.methods import build_method, method_class, shipped_methods
from dataflex_pipeline.sampling.probabilities import write_probabilities
from dataflex_pipeline.schemas import REASON, ROW, ROW_ID, SCORES, VALID
from dataflex_pipeline.testing.tables import MemoryTable


class Sound(api.Method):
    """A method that keeps its contract."""

    summary = "sound"
    source = "a test"

    class Params(api.Params):
        """A parameter."""

        width: int = Field(3, ge=1, description="rows")

    def score(self, block, state):
        return {"score": np.ones(block.pool.num_rows)}

    def weigh(self, block, fitted):
        return np.ones(block.num_rows)


class Lengths(api.Feature):
    """A feature that keeps its contract."""

    uses_model = False
    schema = pa.schema([ROW, ROW_ID, pa.field("x", pa.float64()), VALID, REASON])
    input_columns = ("row", "row_id", "valid", "reason")

    @contextmanager
    def open(self, given, progress):
        yield lambda rows: self.table(rows, {"x": np.ones(rows.num_rows)}, "no")


def declared(base, **given):
    """Return a subclass with attributes and functions."""
    return type("Mine", (base,), {"__module__": __name__, **given})


def said(error: ConfigError, what: str) -> None:
    """Check that an error names the class, its file and what is wrong with it."""
    assert all((error.what, error.why, error.fix))
    assert "Mine" in error.what
    assert "test_declared.py" in error.what
    assert what in str(error)


def selection(number=1):
    return api.Selection(number, 3, 0, lambda line: None)


def params(**fields):
    """Return a class of parameters, each given as (annotation, default), or as an annotation alone."""
    annotations = {name: each[0] if isinstance(each, tuple) else each for name, each in fields.items()}
    values = {name: each[1] for name, each in fields.items() if isinstance(each, tuple)}
    given = {"__annotations__": annotations, "__module__": __name__, **values}
    return type("Params", (api.Params,), given)


class NoParams:
    """Inherits from nothing."""


def test_what_comes_with_the_package_keeps_its_contract():
    for name in shipped_methods():
        check_method_class(method_class(name))
    for name in FEATURES:
        check_functions(feature_class(api.Need(name)), api.Feature, apart=("table",))
    check_method_class(Sound)
    assert make_feature(api.Need(Lengths), Config()).name == "lengths"


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ({"Params": NoParams}, "inherits from something else"),
        ({"Params": Sound.Params()}, "Params of the method"),
        ({"Params": None}, "is None"),
        ({"Params": params(width="Nothing")}, "'Nothing' is not defined"),
        ({"Params": params(width=int)}, "Params.width of the method Mine"),
        ({"Params": params(width=(int, "five"))}, "has the default 'five'"),
        ({"Params": params(width=(float, Field(-1.0, gt=0)))}, "greater than 0"),
        ({"summary": None}, "summary of the method Mine"),
        ({"source": 3}, "source of the method Mine"),
        ({"version": "1"}, "version of the method"),
        ({"version": True}, "version of the method"),
        ({"default_strategy": "top"}, "It is one of: sample, top_k, round_robin"),
        ({"default_strategy": ["sample"]}, "is ['sample']"),
        ({"compares_rounds": "no"}, "It is True or False"),
        ({"columns": ("own",)}, "tuple of fields"),
        ({"columns": pa.field("own", pa.int8())}, "tuple of fields"),
        ({"columns": (pa.field("score", pa.float64()),)}, "has a column named 'score'"),
        ({"columns": (pa.field("a", pa.int8()), pa.field("a", pa.int8()))}, "names a twice"),
        ({"columns": (pa.field("a", pa.int8(), nullable=False),)}, "may not be null"),
        ({"score": lambda self, block: None}, "takes (block): too many positional arguments"),
        ({"weigh": lambda self: None}, "The program calls weigh(block, fitted)"),
        ({"fit": None}, "is no function, but None"),
        ({"begin": property(lambda self: None)}, "is no function"),
        ({"needs": staticmethod(lambda: {})}, "needs(selection)"),
        ({"__init__": lambda self: None}, "__init__(params)"),
        ({"rescores": lambda self: False}, "a function with @property"),
    ],
)
def test_a_method_that_is_declared_wrongly(given, what):
    with pytest.raises(ConfigError) as caught:
        check_method_class(declared(Sound, **given))
    said(caught.value, what)


def test_functions_whose_call_does_not_run_them():
    async def later(self, block, state):
        return {}

    def pieces(self, block, fitted):
        yield 1

    def handle(self, given, progress):
        yield 1

    for base, given, what in (
        (Sound, {"score": later}, "async function"),
        (Sound, {"weigh": pieces}, "generator (it has a yield)"),
        (Lengths, {"open": handle}, "@contextmanager is missing"),
    ):
        with pytest.raises(ConfigError) as caught:
            check_functions(declared(base, **given), base.__base__)
        said(caught.value, what)


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ({"__init__": lambda self, params: None}, "leaves self.params unset"),
        ({"__new__": lambda cls, params: 3}, "returns 3"),
        ({"Params": params(width=(Any, object()))}, "cannot be written down"),
        ({"Params": params(width=(float, float("nan")))}, "Params.width"),
        ({"pool_columns": "n_tokens"}, "It is a tuple of names"),
        ({"pool_columns": (3,)}, "is (3,)"),
        ({"accumulates": "yes"}, "accumulates of the method"),
        ({"replaces": property(lambda self: None)}, "is None"),
        ({"rescores": True}, "rescore() of the method"),
        ({"ranks_by_target_row": True}, "by_target_row() of the method"),
        ({"probabilities_to": "a.npy"}, "It is a pathlib.Path"),
    ],
)
def test_a_method_that_is_made_wrongly(given, what):
    with pytest.raises(ConfigError) as caught:
        build_method("mine", declared(Sound, **given), {}, "a test")
    said(caught.value, what)


NEEDS = [
    (None, "returns None"),
    ([], "returns []"),
    ((need for need in ()), "returns a generator"),
    ({"now": "losses"}, "'now': 'losses'"),
    ({3: api.Need("losses")}, "returns 3: "),
    ({"now": api.Need("losses", "pol")}, "split 'pol'"),
    ({"now": api.Need("losses", checkpoint="last")}, "checkpoint 'last'"),
    ({"now": api.Need("losses", checkpoint=-1)}, "checkpoint -1"),
    ({"now": api.Need("losses", step="x")}, "step 'x'"),
    ({"now": api.Need("losses", params=[1])}, "params [1]"),
    ({"now": api.Need("losses", params={1: 1})}, "params {1: 1}"),
    ({"now": api.Need("losses", params=Sound.Params())}, "params of Sound.Params"),
]


@pytest.mark.parametrize(("needs", "what"), NEEDS)
def test_needs_that_are_none(needs, what):
    kind = declared(Sound, needs=lambda self, selection: needs)
    for asked in (method_needs, ranking_needs):
        with pytest.raises(ConfigError) as caught:
            asked(kind(kind.Params()), selection())
        said(caught.value, what)
    own = declared(Lengths, needs=lambda self, need: needs)
    with pytest.raises(ConfigError) as caught:
        list(with_upstream(api.Need(own), Config()))
    said(caught.value, what)


def test_needs_that_cannot_be_met():
    for need, what in (
        (api.Need("losses", checkpoint=2), "The rows of round 2 are selected with the rounds before it: 1"),
        (api.Need("losses", "test"), "split 'test'"),
    ):
        kind = declared(Sound, needs=lambda self, selection, need=need: {"now": need})
        with pytest.raises(ConfigError) as caught:
            method_needs(kind(kind.Params()), selection(2))
        said(caught.value, what)
    kind = declared(Lengths, needs=lambda self, need: {"again": need})
    with pytest.raises(ConfigError, match="asks for mine of the pool itself"):
        list(with_upstream(api.Need(kind), Config()))
    for named in (3, None, dict, api.Method):
        with pytest.raises(ConfigError, match="neither the name of a feature nor a subclass"):
            api.Need(named)


BLOCK = pa.record_batch(
    {"row": [0, 1, 2], "score": [1.0, 2.0, None], "valid": [True, True, False], "reason": [None, None, "no"]}
)


def test_weights_of_rows_without_a_score_may_be_anything():
    for returned in ([1, 2, -1], np.array([True, False, True]), pa.array([1.0, 2.0, None])):
        kind = declared(Sound, weigh=lambda self, block, fitted, given=returned: given)
        assert weights(kind(None), BLOCK, None).shape == (3,)


@pytest.mark.parametrize(
    ("returned", "what"),
    [
        (None, "returns None"),
        ("abc", "returns 'abc'"),
        (1.0, "returns weights of the shape []"),
        ([1, 2], "weights of the shape [2] for 3 rows"),
        (np.ones((3, 2)), "weights of the shape [3, 2]"),
        ([1, -1, 0], "returns -1 for row 1"),
        ([np.nan, 1, 1], "returns nan for row 0"),
        ([np.inf, 1, 1], "returns inf for row 0"),
        (["1", "2", "3"], "returns ['1', '2', '3']"),
        ([None, None, None], "returns [None, None, None]"),
        ([[1], [1, 2], 3], "returns [[1], [1, 2], 3]"),
        ([1j, 1, 1], "returns [1j, 1, 1]"),
        ({"w": 1}, "returns {'w': 1}"),
        (iter([1]), "returns a list_iterator"),
    ],
)
def test_what_is_no_weights(returned, what):
    kind = declared(Sound, weigh=lambda self, block, fitted: returned)
    with pytest.raises(ConfigError) as caught:
        weights(kind(None), BLOCK, None)
    said(caught.value, what)


def test_weights_that_are_others_the_second_time(tmp_path):
    table = pa.table({"row": [0, 1], "row_id": ["a", "b"], "valid": [True, True]})
    calls = iter(range(1, 9))
    with pytest.raises(UserError, match=r"come to 2 instead of 1"):
        write_probabilities(
            MemoryTable(table), lambda block: np.full(2, next(calls)), tmp_path / "p.parquet", {}
        )
    assert not (tmp_path / "p.parquet").exists()


@pytest.mark.parametrize(
    ("returned", "what"),
    [
        (None, "rescore() of the method Mine"),
        (lambda: {}, "too many positional arguments"),
        (lambda block: None, "a function that returns None"),
        (lambda block: {"row": [0, 0, 0]}, "the column 'row'"),
        (lambda block: {3: [0, 0, 0]}, "the column 3"),
        (lambda block: {"score": [1.0]}, "score of another length than 3 rows"),
        (lambda block: {"score": ["a", "b", "c"]}, "scores that are no real numbers"),
        (lambda block: {"score": [np.nan, 1.0, 1.0]}, "scores that are not finite"),
    ],
)
def test_what_is_no_second_look(returned, what):
    kind = declared(Sound, rescores=True, rescore=lambda self, scores, selection: returned)
    with pytest.raises(ConfigError) as caught:
        rescored(kind(None), None, selection())(BLOCK)
    said(caught.value, what)


def test_columns_and_rankings():
    schema = pa.schema([*SCORES, pa.field("similarity_a", pa.float64())])
    for names, what in (
        (None, "returns None"),
        ("similarity_a", "returns 'similarity_a'"),
        (("row_id",), "names 'row_id'"),
        (("gone",), "names 'gone'"),
        (("similarity_a", "similarity_a"), "names similarity_a twice"),
    ):
        kind = declared(Sound, group_columns=lambda self, schema, names=names: names)
        with pytest.raises(ConfigError) as caught:
            group_columns(kind(None), schema)
        said(caught.value, what)
    kind = declared(Sound, own_columns=lambda self, state: ["own"])
    with pytest.raises(ConfigError, match=r"own_columns\(\) of the method Mine .* returns \['own'\]"):
        own_columns(kind(None), None)


@pytest.mark.parametrize(
    ("found", "what"),
    [
        (None, "returns None"),
        (api.TargetRanking(np.arange(2), None), "returns"),
        (api.TargetRanking(np.arange(0), lambda block: None), "has the target rows"),
        (api.TargetRanking(np.array(["a"]), lambda block: None), "has the target rows"),
        (api.TargetRanking(np.array([1, 1]), lambda block: None), "each once"),
        (api.TargetRanking(np.arange(2), lambda: None), "too many positional arguments"),
        (api.TargetRanking(np.arange(2), lambda block: None), "object of the shape []"),
        (api.TargetRanking(np.arange(2), lambda block: np.ones((3, 1))), "the shape [3, 2]"),
    ],
)
def test_what_is_no_ranking(found, what):
    kind = declared(Sound, by_target_row=lambda self, tables, selection: found)
    with pytest.raises(ConfigError) as caught:
        target_ranking(kind(None), {}, selection()).values(api.Block(BLOCK, {}))
    said(caught.value, what)


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ({"name": "a/b"}, "'a/b'"),
        ({"name": 3}, "name of the feature"),
        ({"name": "losses"}, "comes with the package"),
        ({"version": None}, "version of the feature"),
        ({"uses_model": "no"}, "uses_model of the feature"),
        ({"schema": None}, "is None"),
        ({"schema": [ROW, ROW_ID]}, "It is a pa.schema"),
        ({"schema": pa.schema([ROW, ROW_ID, pa.field("x", pa.int8())])}, "no column valid of bool"),
        ({"schema": pa.schema([VALID, ROW, ROW_ID, REASON])}, "begins with valid, row"),
        ({"input_columns": "row"}, "input_columns of the feature"),
        ({"input_columns": ("row", "row_id", "nothing")}, "has 'nothing'"),
        ({"input_columns": ("n_tokens",)}, "lacks row, row_id"),
        ({"lines_per_row": 0}, "It is a whole number, at least 1"),
        ({"lines_per_row": property(lambda self: "2")}, "is '2'"),
        ({"side_files": "part-*.parquet"}, "part-00000.parquet matches it"),
        ({"side_files": "*"}, "matches it"),
        ({"side_files": "../*"}, "side_files of the feature"),
        ({"side_files": 3}, "is 3"),
        ({"Params": NoParams}, "inherits from something else"),
        ({"__init__": lambda self, params, config: None}, "leaves self.params unset"),
        ({"check": lambda self: None}, "check(need, n_rows)"),
        ({"finish": lambda self, folder: None}, "finish(folder, first_rows, fingerprint)"),
    ],
)
def test_a_feature_that_is_declared_wrongly(given, what):
    with pytest.raises(ConfigError) as caught:
        make_feature(api.Need(declared(Lengths, **given)), Config())
    assert "Mine" in caught.value.what
    assert what in str(caught.value)


def test_a_feature_without_schema_columns_or_open_says_so():
    bare = {"uses_model": False, "open": Lengths.open}
    for given, what in (
        (bare | {"input_columns": ("row", "row_id")}, "schema of the feature Mine"),
        (bare | {"schema": Lengths.schema}, "input_columns of the feature Mine"),
        ({}, "open() of the feature Mine"),
    ):
        with pytest.raises(ConfigError) as caught:
            make_feature(api.Need(declared(api.Feature, **given)), Config())
        said(caught.value, what)


def beside(feature):
    return has_beside(feature, Path(), 0, "")


@pytest.mark.parametrize(
    ("asked", "name", "returned", "what"),
    [
        (row_flops, "row_flops", float("nan"), "returns nan"),
        (row_flops, "row_flops", "many", "returns 'many'"),
        (row_flops, "row_flops", -1.0, "returns -1.0"),
        (doubts, "reach", None, "returns None"),
        (doubts, "reach", "slow", "returns 'slow'"),
        (beside, "has_beside", None, "returns None"),
        (beside, "has_beside", "yes", "returns 'yes'"),
        (ingredients, "ingredients", None, "returns None"),
        (ingredients, "ingredients", {"rows": 3}, "returns the name 'rows'"),
        (ingredients, "ingredients", {"a": object()}, "cannot be written down"),
        (ingredients, "ingredients", {1: 2}, "cannot be written down"),
    ],
)
def test_what_a_feature_says_of_itself(asked, name, returned, what):
    kind = declared(Lengths, **{name: lambda self, *given: returned})
    feature = kind(kind.Params(), Config())
    with pytest.raises(ConfigError) as caught:
        asked(feature, 3.0) if asked is row_flops else asked(feature)
    said(caught.value, what)


ROWS = pa.table(
    {"row": [4, 5], "row_id": ["a", "b"], "valid": [True, False], "reason": pa.array([None, "no"])}
)
TABLE = pa.table(
    {"row": [4, 5], "row_id": ["a", "b"], "x": [1.0, None], "valid": [True, False], "reason": [None, "no"]}
)


def test_a_part_comes_in_the_order_and_types_of_the_schema():
    feature = declared(Lengths)(api.Params(), Config())
    turned = TABLE.select(TABLE.column_names[::-1]).set_column(2, "x", pa.array([1, None], pa.int8()))
    assert part_table(feature, ROWS, turned).equals(TABLE.cast(Lengths.schema))


@pytest.mark.parametrize(
    ("table", "what"),
    [
        (None, "returns None"),
        (TABLE.to_pylist(), "returns a list"),
        (TABLE.drop_columns(["x"]), "the columns row, row_id, valid, reason, and the schema has"),
        (TABLE.append_column("y", TABLE["x"]), "the columns"),
        (TABLE.slice(1), "1 lines for 2 rows"),
        (pa.concat_tables([TABLE, TABLE]), "4 lines for 2 rows"),
        (TABLE.set_column(2, "x", pa.array(["a", "b"])), "columns of other types"),
        (TABLE.take([1, 0]), "another row than that of the rows"),
        (TABLE.set_column(1, "row_id", pa.array(["a", "z"])), "another row_id"),
        (TABLE.set_column(3, "valid", pa.array([None, True])), "valid"),
    ],
)
def test_what_is_no_part(table, what):
    feature = declared(Lengths)(api.Params(), Config())
    with pytest.raises(ConfigError) as caught:
        part_table(feature, ROWS, table)
    said(caught.value, what)


def opens(body):
    """Return a feature that opens so."""
    return declared(Lengths, open=body)(api.Params(), Config())


def test_what_cannot_be_opened():
    @contextmanager
    def nothing(self, given, progress):
        yield

    @contextmanager
    def never(self, given, progress):
        if given:
            yield

    @contextmanager
    def twice(self, given, progress):
        yield lambda rows: TABLE
        yield

    @contextmanager
    def of_none(self, given, progress):
        yield lambda: TABLE

    for body, what in (
        (lambda self, given, progress: None, "returns None"),
        (lambda self, given, progress: len, "returns <built-in function len>"),
        (nothing, "yields None"),
        (never, "does not yield exactly once"),
        (twice, "does not yield exactly once"),
        (of_none, "what open() yields of the feature"),
    ):
        with pytest.raises(ConfigError) as caught, opened(opens(body), None, None) as compute:
            assert compute(ROWS) is not None
        said(caught.value, what)


def test_an_error_of_a_part_is_not_lost_in_open():
    @contextmanager
    def swallows(self, given, progress):
        with suppress(ZeroDivisionError):
            yield lambda rows: 1 / 0

    @contextmanager
    def goes_on(self, given, progress):
        try:
            yield lambda rows: 1 / 0
        except ZeroDivisionError:
            yield

    for body in (swallows, goes_on):
        with pytest.raises(ZeroDivisionError), opened(opens(body), None, None) as compute:
            compute(ROWS)


def test_the_functions_of_the_api_are_called_by_position():
    """What a signature is held to is how the program calls it: no keyword-only argument among them."""
    for base in (api.Method, api.Feature):
        for name, function in vars(base).items():
            if inspect.isfunction(function) and not name.startswith("_"):
                kinds = {each.kind for each in inspect.signature(function).parameters.values()}
                assert kinds == {inspect.Parameter.POSITIONAL_OR_KEYWORD}, name
