"""The rewards table built with the generations that it needs, as `dataflex score` builds it."""

from __future__ import annotations

import shutil

import pytest
from reward_tables import Listener
from tiny_training import make_config

from dataflex_pipeline.api import FeatureInput, Need
from dataflex_pipeline.features.build import build_feature
from dataflex_pipeline.features.plan import plan_feature
from dataflex_pipeline.store.parts import PartedTable

GENERATIONS = {"generator": "transformers", "mc_samples": 3, "max_new_tokens": 4, "seed": 5}
METRIC = {"reward_model_backend": "metric", "reward_backend_params": {"metric": {"name": "valid_json"}}}


@pytest.fixture
def plan(world):
    model, _, target = world
    config = make_config(model)

    def given(need):
        return FeatureInput(target, target.fingerprint, None, None)

    def made(**params):
        need = Need("rewards", "target", None, {"generations": GENERATIONS} | METRIC | params)
        return plan_feature(need, config, given, rows_per_part=5)

    return made


def test_built_with_its_generations_and_again_nothing_is_computed(tmp_path, plan):
    built = build_feature(tmp_path, plan(), Listener())
    assert (built.computed, built.n_parts) == (3, 3)
    assert built.table.n_rows == 13 * 3
    assert built.table.part(0).column("sample").to_pylist()[:4] == [0, 1, 2, 0]
    generations = PartedTable.open(next(tmp_path.glob("generations-*")))
    for name in ("row", "row_id", "sample"):
        assert built.table.part(1).column(name) == generations.part(1).column(name)
    assert build_feature(tmp_path, plan(), Listener()).computed == 0
    assert plan().feature.lines_per_row == 3


def test_a_lost_part_alone_is_made_again(tmp_path, plan):
    built = build_feature(tmp_path, plan(), Listener())
    before = built.table.part(1, ["row", "sample", "reward"])
    (built.table.folder / "_manifest.json").unlink()
    (built.table.folder / "part-00001.parquet").unlink()
    again = build_feature(tmp_path, plan(), Listener())
    assert again.computed == 1
    assert again.table.part(1, ["row", "sample", "reward"]) == before
    shutil.rmtree(built.table.folder)
    assert build_feature(tmp_path, plan(), Listener()).table.part(1, ["row", "sample", "reward"]) == before


def test_what_counts_in_the_fingerprint(plan):
    ingredients = plan().ingredients
    assert plan(generations=GENERATIONS | {"generation_batch_size": 2}).ingredients == ingredients
    others = {"api": {"model_name": "x"}, **METRIC["reward_backend_params"]}
    assert plan(reward_backend_params=others).ingredients == ingredients
    for change in (
        {"generations": GENERATIONS | {"seed": 6}},
        {"reference": True},
        {"reward_backend_params": {"metric": {"name": "contains"}}},
    ):
        assert plan(**change).ingredients != ingredients
