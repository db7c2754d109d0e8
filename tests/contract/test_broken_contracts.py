"""The contracts themselves: what breaks a rule is found by them."""

from contextlib import contextmanager

import numpy as np
import pyarrow as pa
import pytest

from dataflex_pipeline import api
from dataflex_pipeline.errors import ConfigError
from dataflex_pipeline.features import plan
from dataflex_pipeline.methods.random import Random
from dataflex_pipeline.schemas import REASON, ROW, ROW_ID, VALID, column
from dataflex_pipeline.testing import feature as feature_contract
from dataflex_pipeline.testing.feature import FeatureContract
from dataflex_pipeline.testing.method import MethodContract


class Sound(Random):
    """A method that keeps every rule: prefers long rows, by the losses."""

    default_strategy = "top_k"
    pool_columns = ("n_tokens",)
    columns = (column("length", pa.int64(), "tokens"),)

    def needs(self, selection):
        return {"now": api.Need("losses", checkpoint=selection.round - 1)}

    def begin(self, tables, selection):
        return sum(block.num_rows for block in tables["now"].blocks(["row"]))

    def score(self, block, state):
        length = block.pool.column("n_tokens").to_numpy()
        return {"score": length / state + block.column("now", "loss"), "length": length}

    def weigh(self, block, fitted):
        return np.exp(block.column("score").to_numpy(zero_copy_only=False))


class Nameless(Sound):
    columns = (pa.field("length", pa.int64()),)


class Shifting(Sound):
    """Asks for something else each time."""

    calls = 0

    def needs(self, selection):
        Shifting.calls += 1
        return {"now": api.Need("losses", checkpoint=Shifting.calls % selection.round)}


class Ahead(Sound):
    """Asks for a checkpoint that is not there yet."""

    def needs(self, selection):
        return {"now": api.Need("losses", checkpoint=selection.round)}


class Silent(Sound):
    """Leaves a declared column out."""

    def score(self, block, state):
        return {"score": super().score(block, state)["score"]}


class Centred(Sound):
    """Takes the sum of a block off."""

    def score(self, block, state):
        found = super().score(block, state)
        return found | {"score": found["score"] - np.nansum(found["score"])}


class Gaps(Sound):
    """Gives no score to rows that have every value."""

    def score(self, block, state):
        found = super().score(block, state)
        return found | {"score": np.where(found["length"] > 10, np.nan, found["score"])}


class Drifting(Sound):
    """Draws without a seed."""

    def score(self, block, state):
        found = super().score(block, state)
        return found | {"score": found["score"] + np.random.default_rng().random(len(found["score"]))}


class Negative(Sound):
    def weigh(self, block, fitted):
        return super().weigh(block, fitted) - 3.0


class Counting(Sound):
    """Weighs a row by the size of its block."""

    def weigh(self, block, fitted):
        return super().weigh(block, fitted) / block.num_rows


class Upside(Sound):
    """Wants the lowest score."""

    def weigh(self, block, fitted):
        return 1 / super().weigh(block, fitted)


class Short(Sound):
    """Cannot be called as it is."""

    def fit(self, scores):
        return None


class Loose(Sound):
    """Takes parameters that it does not have."""

    class Params(Random.Params, extra="ignore"):
        """Takes what it does not know."""


METHODS = {
    Nameless: "test_it_says_what_it_is",
    Shifting: "test_needs_are_the_same_each_time_and_plain",
    Ahead: "test_needs_are_the_same_each_time_and_plain",
    Silent: "test_a_score_is_one_number_per_row_beside_the_declared_columns",
    Centred: "test_scores_do_not_depend_on_how_blocks_are_cut",
    Gaps: "test_a_row_without_a_value_has_no_score_and_a_reason",
    Drifting: "test_the_same_seed_gives_the_same_scores_and_weights",
    Negative: "test_weights_are_finite_and_not_negative",
    Counting: "test_weights_do_not_depend_on_how_blocks_are_cut",
    Upside: "test_a_higher_score_is_better",
    Short: "test_it_declares_what_the_program_reads_and_calls",
    Loose: "test_a_parameter_that_does_not_exist_is_refused_in_three_parts",
}


class TestSound(MethodContract):
    method = Sound


@pytest.mark.parametrize("broken", METHODS, ids=lambda kind: kind.__name__)
def test_a_broken_method_is_found(broken):
    contract = type("Contract", (MethodContract,), {"method": broken})()
    with pytest.raises((AssertionError, ConfigError)):
        getattr(contract, METHODS[broken])()


class Params(api.Params):
    power: float = 2.0
    batch: int = 8


class Lengths(api.Feature):
    """A feature of no model, with the faults that its class says."""

    uses_model = False
    fault = ""
    Params = Params
    input_columns = ("row", "row_id", "n_tokens", "valid", "reason")
    schema = pa.schema([ROW, ROW_ID, column("length", pa.float64(), "tokens to a power"), VALID, REASON])

    @contextmanager
    def open(self, given, progress):
        """Yield the function from rows to powers of their lengths."""
        yield self._compute

    def _compute(self, rows):
        valid = rows.column("valid").to_numpy()
        length = rows.column("n_tokens").to_numpy() ** self.params.power
        if self.fault == "company":
            length = length - length.mean()
        if self.fault == "chance":
            length = length + np.random.default_rng().random(len(length))
        if self.fault == "everywhere":
            valid = np.ones_like(valid)
        mask = np.zeros_like(valid) if self.fault == "no null" else ~valid
        kept = {name: rows.column(name) for name in ("row", "row_id", "reason")}
        return pa.table(kept | {"length": pa.array(length, mask=mask), "valid": valid}).select(
            self.schema.names
        )


FEATURES = {
    "company": "test_the_table_does_not_depend_on_its_parts",
    "chance": "test_the_same_again_is_the_same_file",
    "everywhere": "test_a_row_without_a_value_has_a_reason",
    "no null": "test_a_row_without_a_value_has_a_reason",
}


@pytest.fixture
def lengths(monkeypatch):
    """A contract of `Lengths` with a fault."""

    def made(fault):
        kind = type("Lengths", (Lengths,), {"fault": fault})
        for module in (plan, feature_contract):
            monkeypatch.setattr(
                module, "make_feature", lambda need, config: kind(Params(**need.params), config)
            )
        return type("Contract", (FeatureContract,), {"feature": "lengths"})()

    return made


@pytest.mark.parametrize("fault", FEATURES)
def test_a_broken_feature_is_found(lengths, fault):
    getattr(lengths(""), FEATURES[fault])()
    with pytest.raises(AssertionError):
        getattr(lengths(fault), FEATURES[fault])()


def test_a_parameter_that_is_forgotten_is_found(lengths):
    contract = lengths("")
    contract.others = {"power": 3.0}
    with pytest.raises(AssertionError, match="another value for each parameter"):
        contract.test_the_fingerprint_follows_the_parameters()
    contract.others = {"power": 3.0, "batch": 8}
    with pytest.raises(AssertionError, match="batch"):
        contract.test_the_fingerprint_follows_the_parameters()
    contract.others = {"power": 3.0, "batch": 4}
    contract.test_the_fingerprint_follows_the_parameters()
