"""Methods: probabilities against an independent re-computation from the formulas."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from dataflex_pipeline import api
from dataflex_pipeline.errors import ConfigError
from dataflex_pipeline.methods import build_method, method_class, shipped_methods
from dataflex_pipeline.methods.delta_loss import schedule, window_ranks


class Scores:
    """A score table in memory, read in small blocks."""

    def __init__(self, values, block=5):
        valid = [value is not None for value in values]
        self.table = pa.table(
            {
                "row": list(range(len(values))),
                "row_id": [str(row) for row in range(len(values))],
                "score": pa.array(values, pa.float64()),
                "loss": pa.array(values, pa.float64()),
                "valid": valid,
                "reason": pa.array([None if ok else "bad" for ok in valid], pa.string()),
            }
        )
        self.n_rows, self.schema, self.block = len(values), self.table.schema, block

    def blocks(self, columns=None, max_rows=65536):
        table = self.table if columns is None else self.table.select(columns)
        yield from table.to_batches(max_chunksize=self.block)


def selection(number=1, times=5):
    said = []
    return api.Selection(number, times, 0, said.append), said


def probabilities(name, values, number=1, times=5, **params):
    """Return the probability of every row (0 where not valid) and what the method said."""
    method = build_method(name, method_class(name), params, "a test")
    scores = Scores(values)
    about, said = selection(number, times)
    fitted = method.fit(scores, about)
    weights = np.concatenate([method.weigh(block, fitted) for block in scores.blocks()])
    weights = np.where(scores.table.column("valid").to_numpy(zero_copy_only=False), weights, 0.0)
    return weights / weights.sum(), said


losses = st.lists(st.floats(0, 20) | st.none(), min_size=1, max_size=40).filter(
    lambda values: any(value is not None for value in values)
)


class TestLoss:
    @given(
        losses,
        st.sampled_from(["low", "medium", "high"]),
        st.floats(0.1, 20),
        st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted),
        st.floats(0.2, 5),
    )
    def test_equals_the_formula(self, values, focus, weight, shares, temperature):
        found, _ = probabilities(
            "loss", values, focus=focus, focus_weight=weight, quantiles=shares, temperature=temperature
        )
        low, high = np.quantile([value for value in values if value is not None], shares)
        bands = {"low": lambda x: x <= low, "medium": lambda x: low < x <= high, "high": lambda x: x > high}
        raw = [
            0.0
            if value is None
            else ((weight if bands[focus](value) else 1.0) + 1e-12) ** (1.0 / temperature)
            for value in values
        ]
        # A loss within rounding of a threshold may fall on either side of it.
        assume(
            all(
                value is None or min(abs(value - low), abs(value - high)) > 1e-9 or value in (low, high)
                for value in values
            )
        )
        assert np.allclose(found, np.array(raw) / math.fsum(raw), rtol=1e-12, atol=0)

    def test_by_hand(self):
        found, said = probabilities("loss", [1.0, 2.0, 3.0, 4.0], quantiles=[0.25, 0.75])
        # thresholds 1.75 and 3.25: low {1}, medium {2, 3}, high {4} weighs 5
        assert found.tolist() == pytest.approx([1 / 8, 1 / 8, 1 / 8, 5 / 8])
        assert said == ["loss bands (nats per token): low <= 1.7500 < medium <= 3.2500 < high"]

    @pytest.mark.parametrize("temperature", [1e-310, 1e-9, 1e-4, 0.001, 0.005])
    @pytest.mark.parametrize("weight", [0.2, 5.0, 1e300])
    def test_a_temperature_near_0_leaves_the_heaviest(self, temperature, weight):
        found, _ = probabilities(
            "loss", [1.0, 2.0, 3.0, 4.0], quantiles=[0.25, 0.75], temperature=temperature, focus_weight=weight
        )
        ratio = 0.2 ** (1 / temperature)  # of a light row to a heavy one; at most 1e-139
        expected = [0, 0, 0, 1] if weight > 1 else [1 / 3, 1 / 3, 1 / 3, ratio / 3]
        assert found.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-130)

    @pytest.mark.parametrize("temperature", [1e-310, 0.001, 1.0, 1e300, math.inf])
    @pytest.mark.parametrize(("focus", "words"), [("high", "no row is"), ("low", "all rows are")])
    @pytest.mark.parametrize("weight", [1e-300, 5.0, 1e300])
    def test_a_band_with_no_row_or_all_is_uniform_and_said(self, temperature, focus, words, weight):
        found, said = probabilities(
            "loss", [2.5, 2.5, None, 2.5], focus=focus, temperature=temperature, focus_weight=weight
        )
        assert found.tolist() == [1 / 3, 1 / 3, 0.0, 1 / 3]
        assert said[1:] == [f"{words} in the band in focus ({focus}): every row weighs alike"]

    def test_ordinary_numbers_are_the_plain_powers_bit_for_bit(self):
        params = {"quantiles": [0.25, 0.75], "temperature": 0.3, "focus_weight": 7.0}
        method = build_method("loss", method_class("loss"), params, "a test")
        scores = Scores([1.0, 2.0, 3.0, 4.0])
        fitted = method.fit(scores, selection()[0])
        found = np.concatenate([method.weigh(block, fitted) for block in scores.blocks()])
        assert found.tolist() == np.power(np.array([1.0, 1.0, 1.0, 7.0]) + 1e-12, 1.0 / 0.3).tolist()

    @pytest.mark.parametrize(
        ("name", "key", "value"),
        [("loss", "focus_weight", math.inf), ("delta_loss", "base_weight", math.inf)],
    )
    def test_weights_are_finite(self, name, key, value):
        with pytest.raises(ConfigError, match="finite"):
            build_method(name, method_class(name), {key: value}, "a test")

    @pytest.mark.parametrize("focus", ["low", "medium", "high"])
    def test_the_bands_are_of_the_losses_whatever_the_score_is(self, focus):
        values = [1.0, 2.0, None, 3.0, 4.0, 2.0]
        method = build_method("loss", method_class("loss"), {"focus": focus}, "a test")
        plain, scored = Scores(values), Scores(values)
        scored.table = scored.table.set_column(2, "score", pa.array([9.0, -1.0, None, 0.0, 5.0, 2.0]))
        drawn = []
        for table in (plain, scored):
            fitted = method.fit(table, selection()[0])
            drawn.append(np.concatenate([method.weigh(block, fitted) for block in table.blocks()]).tobytes())
        assert drawn[0] == drawn[1]

    def test_defaults_are_the_guides(self):
        params = method_class("loss").Params()
        assert (params.focus, params.focus_weight, params.quantiles) == ("high", 5.0, (0.33, 0.66))
        assert (params.temperature, params.replacement) == (1.0, False)


def delta_by_sorting(values, t, T, size, base, centered):
    """Compute the window's probabilities with plain Python lists."""
    order = sorted(
        (row for row, value in enumerate(values) if value is not None), key=lambda r: (-values[r], r)
    )
    n = len(order)
    u = 1 / (1 + math.exp(-(10 * (t / T - 0.5) if centered else t / T)))
    start, end = math.floor(u * (n - size * n)), math.floor(u * (n - size * n) + size * n)
    while end > start and values[order[end - 1]] < 0:
        end -= 1
    inside = set(order[start:end])
    weights = [0.0] * len(values)
    for row in order:
        weights[row] = 1.0 if row in inside or not inside else base
    return np.array(weights) / math.fsum(weights)


class TestDeltaLoss:
    @given(
        st.lists(st.sampled_from([-1.0, -0.0, 0.0, 0.25, 0.5, 1.0, 3.0, None]), min_size=1, max_size=60),
        st.integers(2, 9),
        st.floats(0.05, 1.0),
        st.sampled_from([0.025, 0.5]),
        st.booleans(),
        st.data(),
    )
    def test_equals_the_formula_on_ties_too(self, values, times, size, base, centered, data):
        assume(any(value is not None for value in values))
        number = data.draw(st.integers(2, times))
        found, _ = probabilities(
            "delta_loss",
            values,
            number,
            times,
            window_size=size,
            base_weight=base,
            schedule="centered" if centered else "sigmoid",
        )
        expected = delta_by_sorting(values, number - 1, times - 1, size, base, centered)
        assert np.allclose(found, expected, rtol=1e-12, atol=0)

    def test_first_selection_is_uniform(self):
        found, said = probabilities("delta_loss", [0.0] * 4, number=1)
        assert found.tolist() == [0.25] * 4
        assert "uniform" in said[0]

    def test_empty_window_is_uniform_and_said(self):
        found, said = probabilities("delta_loss", [-1.0, -2.0, -3.0, -4.0, -5.0], number=2, window_size=0.4)
        assert found.tolist() == [0.2] * 5
        assert "is empty" in said[0]

    def test_window_by_hand(self):
        # N = 10, s = 0.2, t = T: u = sigma(1) = 0.7311, start = floor(5.848) = 5, end = floor(7.848) = 7
        values = [float(10 - row) for row in range(10)]
        found, _ = probabilities("delta_loss", values, number=3, times=3)
        total = 2 + 8 * 0.025
        assert found.tolist() == pytest.approx([(1 if row in (5, 6) else 0.025) / total for row in range(10)])

    def test_schedules(self):
        assert schedule("sigmoid", 1, 4) == pytest.approx(0.5621765)  # 1 / (1 + e^-0.25)
        assert schedule("centered", 2, 4) == 0.5
        assert schedule("centered", 4, 4) == pytest.approx(0.9933071)  # 1 / (1 + e^-5)
        assert window_ranks(0.5, 100, 0.2, 45) == (40, 45)

    def test_features_of_each_selection(self):
        method = build_method("delta_loss", method_class("delta_loss"), {}, "a test")
        first = method.needs(selection(1)[0])
        third = method.needs(selection(3)[0])
        assert {name: need.checkpoint for name, need in first.items()} == {"initial": 0, "now": 0}
        assert {name: need.checkpoint for name, need in third.items()} == {"initial": 0, "now": 2}


def test_random_is_uniform_over_valid_rows():
    found, _ = probabilities("random", [0.0, None, 0.0, 0.0])
    assert found.tolist() == pytest.approx([1 / 3, 0, 1 / 3, 1 / 3])


@pytest.mark.parametrize("name", shipped_methods())
def test_every_method_says_what_it_is(name):
    kind = method_class(name)
    assert kind.summary
    assert kind.source
    for parameter, info in kind.Params.model_fields.items():
        assert info.description, f"{name}.{parameter} has no meaning"
    for column in kind.columns:
        assert column.metadata, f"column {column.name} has no meaning"


class TestErrors:
    def test_unknown_parameter(self):
        with pytest.raises(ConfigError) as error:
            build_method("loss", method_class("loss"), {"focuss": "low"}, "my.yaml:3")
        assert "loss.focuss" in error.value.what
        assert "my.yaml:3" in error.value.what
        assert "Did you mean 'focus'?" in error.value.what

    @pytest.mark.parametrize(
        ("name", "params", "part"),
        [
            ("loss", {"focus": "hihg"}, "loss.focus is 'hihg'"),
            ("loss", {"quantiles": [0.7, 0.3]}, "loss.quantiles is [0.7, 0.3]"),
            ("loss", {"temperature": 0}, "loss.temperature is 0"),
            ("delta_loss", {"window_size": 1.5}, "delta_loss.window_size is 1.5"),
        ],
    )
    def test_value_out_of_range(self, name, params, part):
        with pytest.raises(ConfigError) as error:
            build_method(name, method_class(name), params, "the command line")
        assert part in error.value.what
        assert "default" in error.value.fix

    def test_unknown_method(self):
        with pytest.raises(ConfigError, match="Did you mean 'loss'"):
            method_class("los")

    def test_file_with_two_methods(self, tmp_path):
        (tmp_path / "two.py").write_text(
            "from dataflex_pipeline.methods.random import Random\n"
            "class A(Random):\n    summary = 'a'\nclass B(Random):\n    summary = 'b'\n"
        )
        with pytest.raises(ConfigError, match="defines 2 subclasses"):
            method_class("two", tmp_path / "two.py")

    def test_file_that_does_not_import(self, tmp_path):
        (tmp_path / "bad.py").write_text("import nothing_of_that_name\n")
        with pytest.raises(ConfigError, match="nothing_of_that_name"):
            method_class("bad", tmp_path / "bad.py")
        with pytest.raises(ConfigError, match="no Python file"):
            method_class("gone", tmp_path / "gone.py")
        with pytest.raises(ConfigError, match="cannot be imported"):
            method_class("gone", module="gone_module")


class TestSoftmax:
    """The draw of methods that rank by default: exp(score / (largest |score| x temperature))."""

    @pytest.mark.parametrize(
        "name", ["bm25", "column", "ifd", "judge", "less", "near", "nice", "perplexity", "rds"]
    )
    @pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-17, 0.1, 1.0, 1e300, math.inf])
    @pytest.mark.parametrize("scale", [0.0, 1e-300, 1.0, 1e300])
    def test_extreme_temperatures_and_scores(self, name, temperature, scale):
        shares = [-1.0, 0.5, 1.0, 1.0]
        values = [scale * share for share in shares] + [None]
        with np.errstate(divide="raise", invalid="raise", over="raise"):
            found, _ = probabilities(name, values, temperature=temperature)
        steps = [(share - 1) / temperature if scale else 0.0 for share in shares]
        weights = [math.exp(step) if step > -700 else 0.0 for step in steps]
        expected = [*(weight / math.fsum(weights) for weight in weights), 0.0]
        assert found.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-300)

    def test_ordinary_numbers_are_the_plain_exponentials_bit_for_bit(self):
        values = [0.1, 0.7, -0.3, 0.65]
        method = build_method("near", method_class("near"), {"temperature": 0.3}, "a test")
        scores = Scores(values)
        fitted = method.fit(scores, selection()[0])
        found = np.concatenate([method.weigh(block, fitted) for block in scores.blocks()])
        assert found.tolist() == np.exp((np.array(values) - 0.7) / (0.7 * 0.3)).tolist()
