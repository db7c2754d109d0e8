"""candidate_path, query_path and query: other names that methods' users know the data sets by."""

from pathlib import Path

import pytest
from config_refusal import refused

from dataflex_pipeline.config.fields import Config
from dataflex_pipeline.config.load import dump_config, load_config

TSDS = ["component_name=tsds"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Run in an empty folder."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("method", ["tsds", "near"])
def test_they_stand_for_the_data_sets(method):
    given = [f"component_name={method}", f"{method}.candidate_path=a.json", f"{method}.query_path=b.json"]
    loaded = load_config(None, given)
    assert (loaded.config.dataset, loaded.config.eval_dataset) == ("a.json", "b.json")
    place = f"{method}.candidate_path ({method}.candidate_path of the configuration)"
    assert f"dataset: a.json, as {place} says" in loaded.notices
    assert loaded.sources["dataset"] == place


def test_from_a_components_file(tmp_path):
    Path("c.yaml").write_text("tsds: {name: tsds, params: {candidate_path: a.json, query: first_100}}\n")
    Path("run.yaml").write_text("component_name: tsds\ncomponents_cfg_file: c.yaml\n")
    loaded = load_config(Path("run.yaml"), [])
    assert (loaded.config.dataset, loaded.config.eval_dataset) == ("a.json", "first_100")
    assert loaded.config.target_head == 100
    assert "dataset: a.json, as tsds.candidate_path (c.yaml, line 1) says" in loaded.notices


def test_they_count_for_the_method_in_use_only():
    given = ["component_name=loss", "tsds.candidate_path=a.json", "dataset=x.json"]
    assert load_config(None, given).config.dataset == "x.json"


def test_a_method_of_ones_own_may_mean_something_else_by_them():
    Path("c.yaml").write_text("mine: {file: mine.py, params: {query: select 1, candidate_path: a.json}}\n")
    loaded = load_config(None, ["component_name=mine", "components_cfg_file=c.yaml"], {})
    assert loaded.config == Config(component_name="mine", components_cfg_file="c.yaml")


@pytest.mark.parametrize(
    ("given", "what"),
    [
        (["dataset=x.json", "tsds.candidate_path=a.json"], "dataset (command line) is x.json"),
        (["eval_dataset=x.json", "tsds.query_path=a.json"], "eval_dataset (command line) is x.json"),
        (["eval_dataset=x.json", "tsds.query=first_100"], "is first_100, and eval_dataset (command line)"),
        (["tsds.query_path=a.json", "tsds.query=first_100"], "(tsds.query_path ("),
    ],
)
def test_two_answers_are_refused(given, what):
    error = refused(None, [*TSDS, *given])
    assert what in error.what
    assert "both say which rows the run works on" in error.why


def test_the_same_answer_twice_is_none():
    same = ["dataset=a.json", "tsds.candidate_path=a.json", "eval_dataset=first_100", "tsds.query=first_100"]
    loaded = load_config(None, [*TSDS, *same], {})
    assert (loaded.config.dataset, loaded.config.eval_dataset) == ("a.json", "first_100")
    assert loaded.notices == ()


def test_a_run_goes_on_with_what_it_was_started_with():
    given = [*TSDS, "tsds.candidate_path=a.json", "tsds.query_path=b.json"]
    first = load_config(None, given)
    again = load_config(None, [], dump_config(first.config))
    assert again.config == first.config
    assert again.notices == ()
    error = refused(None, ["tsds.candidate_path=c.json"], dump_config(first.config))
    assert "dataset (run.yaml) is a.json" in error.what


@pytest.mark.parametrize(
    ("value", "head"), [("first_100", 100), ("first_7", 7), ("first_0", None), ("first", None), (None, None)]
)
def test_the_first_rows_of_the_pool(value, head):
    assert Config(eval_dataset=value).target_head == head


def test_an_evaluation_counts_a_target_that_a_parameter_names():
    loaded = load_config(None, [*TSDS, "eval_strategy=epoch", "tsds.query_path=b.json"], {})
    assert loaded.config.eval_dataset == "b.json"
