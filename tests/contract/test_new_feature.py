"""A feature of one's own and a method that uses it, as docs/extending.md shows them: one file."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cli_runs import done, refused, small

from dataflex_pipeline import Run, api
from dataflex_pipeline.api import Feature, FeatureInput, Need
from dataflex_pipeline.config.fields import Config
from dataflex_pipeline.errors import ConfigError
from dataflex_pipeline.features.plan import (
    feature_class,
    make_feature,
    params_of,
    plain_need,
    plan_feature,
    with_upstream,
)
from dataflex_pipeline.models.base import load_for_scoring
from dataflex_pipeline.schemas import REASON, ROW, ROW_ID, VALID

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "uncertain.py"
PAGE = Path(__file__).resolve().parents[2] / "docs" / "extending.md"
USE = ("--method", "uncertain", "components_cfg_file=components.yaml", "--run", "own")
COMPONENTS = "uncertain:\n  name: uncertain\n  file: uncertain.py\n"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with nothing but the two files that a user writes."""
    shutil.copy2(EXAMPLE, tmp_path / "uncertain.py")
    (tmp_path / "components.yaml").write_text(COMPONENTS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_page_shows_this_very_file():
    text = PAGE.read_text(encoding="utf-8")
    assert EXAMPLE.read_text(encoding="utf-8").strip() in text
    assert COMPONENTS.strip() in text


def test_two_rounds_with_it_each_with_the_model_of_the_round_before(here, tiny_demo):
    import torch

    done("round", 2, *small(tiny_demo), *USE)
    run = Run.open("runs/own")
    rows = pq.read_table(here / "runs" / "own" / "pool" / "part-00000.parquet").to_pylist()
    for number in (1, 2):
        scores = pq.read_table(run.store.round(number).scores("uncertain"))["score"].to_numpy()
        model = load_for_scoring(run.config, run.store.round(number - 1).checkpoint, "cpu")
        with torch.inference_mode():
            for row in rows[:5]:
                p = torch.softmax(model(torch.tensor([row["input_ids"]])).logits[0].double(), -1)
                entropies = -(p * p.log()).sum(-1)[:-1]
                own = [entropies[t] for t in range(len(row["labels"]) - 1) if row["labels"][t + 1] != -100]
                assert scores[row["row"]] == pytest.approx(float(np.mean(own)), rel=1e-4)
    tables = sorted(path.name for path in (here / "runs" / "own" / "features").iterdir())
    assert [name.rpartition("-")[0] for name in tables] == ["entropy-pool", "entropy-pool"]


@pytest.mark.slow
def test_a_changed_file_or_parameter_is_another_table_and_estimate_knows_it(here, tiny_demo):
    done("warmup", *small(tiny_demo), *USE[2:], "component_name=uncertain")
    done("score", "--round", 1, *USE[3:])
    assert "temperature: 1.0 -> 2.0" in refused(here, "score", *USE[3:], "uncertain.temperature=2")
    told = done("estimate", *small(tiny_demo), *USE[:3], "--run", "other")
    assert "entropy, pool" in told
    assert "its FLOPs are not known" in told
    with (here / "uncertain.py").open("a") as stream:
        stream.write("# another edition\n")
    assert "implementation" in refused(here, "score", "--round", 1, *USE[3:])


def test_a_need_goes_to_another_process_and_comes_back(here):
    need = Need("uncertain.py:Entropy", "pool", 3, {"temperature": 2.0}, 7)
    plain = plain_need(need)
    back = Need(**plain)
    assert feature_class(back).__name__ == "Entropy"
    assert (back.name, back.split, back.checkpoint, back.step) == ("entropy", "pool", 3, 7)
    assert params_of(back).temperature == 2.0
    assert type(make_feature(back, Config())).__module__.endswith("uncertain")


@pytest.mark.parametrize(
    ("named", "why"),
    [
        ("gone.py:Entropy", "There is no file gone.py"),
        ("uncertain.py:Nothing", "no subclass of Feature of the name Nothing"),
        ("broken.py:Entropy", "broken.py cannot be run"),
    ],
)
def test_what_is_no_feature_is_said_in_words(here, named, why):
    (here / "broken.py").write_text("class Broken(\n")
    with pytest.raises(ConfigError) as raised:
        Need(named)
    assert why in raised.value.why
    assert "dataflex_pipeline.api.Feature" in raised.value.fix


def test_parameters_that_cannot_be_used_are_said_in_words(here):
    with pytest.raises(ConfigError, match=r"entropy\.temperature is -1") as raised:
        make_feature(Need("uncertain.py:Entropy", params={"temperature": -1}), Config())
    assert "greater than 0" in raised.value.why


def test_what_a_feature_is_computed_from_has_its_checkpoint(here):
    """A need without one is not the model before the warm-up, without a word."""

    class Doubled(Feature):
        schema = pa.schema([ROW, ROW_ID, VALID, REASON])
        input_columns = ("row", "row_id")

        def needs(self, need):
            return {"losses": Need("losses", need.split)}

        def open(self, given, progress):
            raise AssertionError("it is only planned")

    class Wrong(Doubled):
        uses_model = False

    asked = [need for need, _ in with_upstream(Need(Doubled, "pool", 3, step=7), Config())]
    assert [(need.name, need.checkpoint, need.step) for need in asked] == [
        ("losses", 3, 7),
        ("doubled", 3, 7),
    ]
    with pytest.raises(ConfigError, match="wrong says uses_model = False, and is computed from losses"):
        list(with_upstream(Need(Wrong), Config()))


def test_features_that_are_computed_from_one_another_have_an_end(here):
    """A circle of any length, and a chain that asks for ever new parameters."""

    class Depth(api.Params):
        depth: int = 0

    class First(Feature):
        Params = Depth
        schema = pa.schema([ROW, ROW_ID, VALID, REASON])
        input_columns = ("row", "row_id")
        uses_model = False

        def needs(self, need):
            return {"second": Need(Second, need.split)}

        def open(self, given, progress):
            raise AssertionError("it is only planned")

    class Second(First):
        def needs(self, need):
            return {"first": Need(First, need.split)}

    class Endless(First):
        def needs(self, need):
            return {"deeper": Need(Endless, need.split, params={"depth": self.params.depth + 1})}

    for kind, said in (
        (First, "closes a circle of the pool: first from second from first"),
        (Endless, "asks for one more feature below 16: endless from endless from endless"),
    ):
        with pytest.raises(ConfigError, match=said):
            list(with_upstream(Need(kind), Config()))
        with pytest.raises(ConfigError, match=said):
            plan_feature(Need(kind), Config(), lambda need: FeatureInput(None, "rows", None, None), 8)
