"""Runs without a warm-up, selections apart from training, and `dataflex pick`."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from cli_runs import copied, data, done, refused, small, snapshot
from transformers import AutoModelForCausalLM

from dataflex_pipeline import Run
from dataflex_pipeline.errors import ConfigError, RunError, StaleError, UserError
from dataflex_pipeline.training.marker import read_marker

LOW = ("loss.focus=low", "strategy=top_k")
UNTRAINED = {"warmup_step": 0, "update_times": 0}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def files(demo, **more):
    return {
        "dataset": str(demo.pool),
        "eval_dataset": str(demo.target),
        "model_name_or_path": str(demo.model),
        **more,
    }


def plain_losses(model, pool):
    """Mean loss of the labelled tokens, one row at a time, by plain transformers."""
    found = []
    for ids, labels in zip(pool["input_ids"].to_pylist(), pool["labels"].to_pylist(), strict=True):
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss
        found.append(float(loss))
    return np.array(found)


def prepared(folder):
    return pq.read_table(sorted((folder / "pool").glob("part-*.parquet")))


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


class TestInOneCommand:
    def test_the_file_holds_exactly_the_rows_of_lowest_loss(self, tiny_demo, here):
        text = done(
            "pick", "loss", *LOW, *data(tiny_demo), "fraction=0.1", "--run", "p", "--to", "best.jsonl"
        )
        losses = plain_losses(
            AutoModelForCausalLM.from_pretrained(tiny_demo.model), prepared(here / "runs/p")
        )
        expected = np.argsort(losses, kind="stable")[:20]
        exported = lines(here / "best.jsonl")
        assert [line["_row"] for line in exported] == expected.tolist()
        assert np.allclose([-line["_score"] for line in exported], losses[expected], atol=1e-5)
        pool = lines(tiny_demo.pool)
        for line in exported:
            assert {key: line[key] for key in pool[0]} == pool[line["_row"]]
            assert line["_line"] == line["_row"] + 1
        assert "20 of 200 rows selected" in text
        assert "Selected by source" in text
        assert not list((here / "runs/p").rglob("checkpoint"))
        assert not list((here / "runs/p").rglob("index.parquet"))

    def test_it_is_repeated_for_nothing_and_another_amount_keeps_the_scores(self, tiny_demo, here):
        command = ("pick", "random", *data(tiny_demo), "--run", "p", "--to", "best.jsonl")
        done(*command, "num_samples=7")
        before = snapshot(here)
        assert done(*command, "num_samples=7").count("up to date") == 5
        assert snapshot(here) == before
        assert "best.jsonl exists" in refused(here, *command, "num_samples=9")
        scores = (here / "runs/p/round-01/scores/random.parquet").stat().st_mtime_ns
        done(*command[:-1], "more.jsonl", "num_samples=9")
        assert len(lines(here / "more.jsonl")) == 9
        assert (here / "runs/p/round-01/scores/random.parquet").stat().st_mtime_ns == scores

    def test_four_commands_write_the_same_file(self, tiny_demo, here):
        settings = (*LOW, *data(tiny_demo), "fraction=0.1", "warmup_step=0", "update_times=0")
        done("pick", "loss", *settings, "--run", "one", "--to", "one.jsonl")
        done("warmup", *settings, "--run", "four", "component_name=loss")
        done("score", "four", "--round", 1)
        done("select", "four", "--round", 1)
        done("export", "four", "--to", "four.jsonl")
        assert (here / "one.jsonl").read_bytes() == (here / "four.jsonl").read_bytes()
        assert done("status", "four").count("\tdone\t") == 4

    def test_scoring_alone_begins_a_run(self, tiny_demo, here):
        done("score", *data(tiny_demo), "warmup_step=0", "--run", "s", "--method", "random")
        assert (here / "runs/s/round-01/scores/random.parquet").is_file()
        text = done("status", "s", "--json")
        assert json.loads(text)["next"] == "dataflex round 1 --run s"

    @pytest.mark.parametrize(
        ("settings", "said"),
        [
            (("loss",), "Nothing says how many rows"),
            (("less", "fraction=0.1"), "gradient_type is adam"),
            (("delta_loss", "fraction=0.1"), "no round is trained"),
            (("less", "fraction=0.1", "less.gradient_type=sgd", "less.checkpoints=all"), "checkpoints: all"),
            (("lss", "fraction=0.1"), "Did you mean"),
            (("loss", "fraction=0.1", "weights=importance", "strategy=top_k"), "not random"),
            (("loss", "num_samples=3", "balanced=source", "source_quotas.a=1"), "balanced"),
        ],
    )
    def test_what_cannot_be_is_refused_before_anything_is_written(self, tiny_demo, here, settings, said):
        assert said in refused(here, "pick", *settings, *data(tiny_demo), "--run", "p")

    def test_a_target_is_asked_for_by_methods_that_select_towards_one(self, tiny_demo, here):
        command = ("pick", "near", f"dataset={tiny_demo.pool}", f"model_name_or_path={tiny_demo.model}")
        assert "eval_dataset is not set" in refused(here, *command, "fraction=0.1", "--run", "p")


class TestWithoutAWarmUp:
    @pytest.mark.parametrize("finetuning_type", ["lora", "full"])
    def test_scores_are_those_of_the_model_as_it_is(self, tiny_demo, here, finetuning_type):
        run = Run(here / "r", **files(tiny_demo), **UNTRAINED, finetuning_type=finetuning_type)
        scores = run.score(1, "loss").to_arrow()
        losses = plain_losses(AutoModelForCausalLM.from_pretrained(tiny_demo.model), prepared(here / "r"))
        assert np.allclose(scores["loss"].to_numpy(), losses, atol=1e-5)

    def test_a_given_adapter_counts(self, tiny_demo, here):
        from peft import PeftModel

        adapter = copied(tiny_demo, here) / "round-01" / "checkpoint"
        run = Run(here / "r", **files(tiny_demo, adapter_name_or_path=str(adapter)), **UNTRAINED)
        scores = run.score(1, "loss").to_arrow()
        base = AutoModelForCausalLM.from_pretrained(tiny_demo.model)
        losses = plain_losses(PeftModel.from_pretrained(base, adapter), prepared(here / "r"))
        assert np.allclose(scores["loss"].to_numpy(), losses, atol=1e-5)
        with pytest.raises(StaleError, match="checkpoint"):
            Run(here / "r", adapter_name_or_path=None).score(1, "loss")

    def test_plain_gradients_are_those_of_a_fresh_adapter(self, tiny_demo, here):
        """LESS against single rows by autograd; the projection leaves 1/sqrt(K) of noise."""
        from dataflex_pipeline.models.adapters import fresh_seed, load_for_training

        less = {"gradient_type": "sgd", "proj_dim": 8192}
        given = files(tiny_demo, max_samples=24, lora_rank=4)
        run = Run(here / "r", **given, **UNTRAINED, less=less)
        scores = run.score(1, "less").to_arrow()
        model = load_for_training(run.config, None, "cpu", fresh_seed(run.config)).eval()
        trained = [p for p in model.parameters() if p.requires_grad]

        def unit(split):
            table = pq.read_table(sorted((here / "r" / split).glob("part-*.parquet")))
            for ids, labels in zip(table["input_ids"].to_pylist(), table["labels"].to_pylist(), strict=True):
                loss = model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss
                flat = torch.cat([g.flatten() for g in torch.autograd.grad(loss, trained)]).double()
                yield flat / flat.norm()

        direction = torch.stack(list(unit("target"))).mean(0)
        exact = torch.stack(list(unit("pool"))) @ direction * run.config.learning_rate
        found = scores["score"].to_numpy()
        assert np.allclose(found, exact.numpy(), atol=4 * run.config.learning_rate / np.sqrt(8192))
        assert np.corrcoef(found, exact)[0, 1] > 0.97

    def test_rounds_after_it_begin_with_the_model_as_it_is(self, tiny_demo, here):
        settings = files(tiny_demo, warmup_step=0, update_step=2, update_times=2, lora_rank=4)
        run = Run(here / "r", **settings, per_device_train_batch_size=4)
        assert run.round(0) is None
        checkpoint = run.round(2)
        assert checkpoint.number == 2
        first = read_marker(run.store.round(1).checkpoint)
        assert (first.plan["first_step"], first.ingredients["previous"]) == (0, None)
        assert read_marker(checkpoint.path).step == 4
        assert not run.store.round(0).folder.exists()
        assert {state.name for state in (output.state() for output in run.outputs())} == {"done"}
        with pytest.raises(StaleError, match="learning_rate"):
            Run(here / "r", learning_rate=0.5).round(2)

    def test_a_second_round_needs_training(self, tiny_demo, here):
        run = Run(here / "r", **files(tiny_demo), **UNTRAINED)
        with pytest.raises(RunError, match="Round 2 was asked for"):
            run.score(2, "random")

    def test_less_with_a_warm_up_then_only_selected(self, tiny_demo, here):
        settings = files(tiny_demo, warmup_step=2, update_times=0, lora_rank=4, max_samples=40)
        run = Run(here / "r", **settings, less={"proj_dim": 64})
        assert run.warmup().number == 0
        run.score(1, "less")
        chosen = run.select(1, "less", num_samples=5).to_arrow()
        assert chosen["rank"].to_pylist() == [1, 2, 3, 4, 5]
        assert not run.store.round(1).index.exists()


class TestAnotherSelection:
    def test_it_replaces_one_that_nothing_was_trained_on(self, tiny_demo, here):
        run = Run(here / "r", **files(tiny_demo, warmup_step=0, update_step=2, update_times=1), lora_rank=4)
        run.score(1, "loss")
        run.score(1, "random")
        first = run.select(1, "loss", num_samples=30, strategy="top_k").to_arrow()
        assert first.num_rows == 30
        index = pq.read_table(run.store.round(1).index)
        assert set(index["row"].to_pylist()) <= set(first["row"].to_pylist())
        second = run.select(1, "random", num_samples=10, strategy="sample").to_arrow()
        assert second.num_rows == 10
        index = pq.read_table(run.store.round(1).index)
        assert set(index["row"].to_pylist()) == set(second["row"].to_pylist())
        assert {state.name for o in run.outputs() if (state := o.state()).name != "done"} == {"missing"}
        assert run.train(1, component_name="random").number == 1
        with pytest.raises(StaleError, match="num_samples"):
            run.select(1, "random", num_samples=20)

    def test_one_with_a_name_leaves_what_was_trained(self, tiny_demo, here):
        folder = copied(tiny_demo, here / "runs")
        before = snapshot(folder)
        text = done("select", "base", "--round", 2, "--name", "best", "strategy=top_k", "fraction=0.05")
        after = snapshot(folder)
        assert {path for path in after if path not in before} == {
            "round-02/selections/",
            "round-02/selections/best/",
            "round-02/selections/best/selection.parquet",
            "round-02/selections/best/probabilities.parquet",
        }
        kept = ("history.jsonl", "sources.json", "/")
        assert all(after[path] == before[path] for path in before if not path.endswith(kept))
        assert "10 of 200 rows selected" in text
        scores = pq.read_table(folder / "round-02/scores/loss.parquet")
        order = np.lexsort((scores["row"].to_numpy(), -scores["score"].to_numpy()))
        named = pq.read_table(folder / "round-02/selections/best/selection.parquet")
        assert named["row"].to_pylist() == scores["row"].to_numpy()[order][:10].tolist()
        done("export", "base", "--round", 2, "--selection", "best", "--to", "best.jsonl")
        assert [line["_row"] for line in lines(here / "best.jsonl")] == named["row"].to_pylist()
        done("select", "base", "--round", 2, "--name", "best", "strategy=top_k", "fraction=0.1")
        assert pq.read_table(folder / "round-02/selections/best/selection.parquet").num_rows == 20
        assert "fraction: null" in (folder / "run.yaml").read_text()
        assert "up to date" in done("round", 2, "base")

    def test_one_with_a_name_leaves_the_settings_of_a_run_that_only_selects(self, tiny_demo, here):
        run = Run(here / "r", **files(tiny_demo), **UNTRAINED)
        run.score(1, "random")
        run.select(1, "random", fraction=0.1)
        begun = (here / "r/run.yaml").read_text()
        assert run.select(1, "random", name="half", fraction=0.5).to_arrow().num_rows == 100
        assert (here / "r/run.yaml").read_text() == begun
        assert {output.state().name for output in run.outputs()} == {"done"}

    def test_another_amount_takes_the_place_of_the_one_in_the_run(self, tiny_demo, here):
        settings = (*data(tiny_demo), "warmup_step=0", "update_times=0", "--run", "r", "--method", "random")
        done("score", *settings)
        done("select", "r", "--method", "random", "fraction=0.1")
        text = done("select", "r", "--method", "random", "num_samples=7")
        assert "num_samples (command line) stands in place of fraction: 0.1 (run.yaml)" in text
        assert pq.read_table(here / "runs/r/round-01/selection.parquet").num_rows == 7
        assert "Keep one" in refused(here, "select", "r", "fraction=0.1", "num_samples=7")

    @pytest.mark.parametrize("name", ["../up", "a/b", ".", "", "-x", "a" * 101])
    def test_its_name_is_that_of_a_folder(self, name, tiny_demo, here):
        run = Run(copied(tiny_demo, here / "runs"))
        with pytest.raises(UserError, match="A selection is named"):
            run.select(2, "loss", name=name, fraction=0.1)

    def test_the_same_share_of_every_source(self, tiny_demo, here):
        rows = lines(tiny_demo.pool)
        for name, part in (("a", rows[:150]), ("b", rows[150:190]), ("c", rows[190:])):
            (here / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
        given = {"dataset": "a.jsonl,b.jsonl,c.jsonl", "model_name_or_path": str(tiny_demo.model)}
        run = Run(here / "r", **given, **UNTRAINED)
        picked = run.pick("random", to="best.jsonl", balanced="source", num_samples=60).to_arrow()
        counts = {each["values"]: each["counts"] for each in picked["source"].value_counts().to_pylist()}
        assert counts == {"a": 25, "b": 25, "c": 10}


def test_a_stale_index_makes_what_is_trained_on_it_stale(tiny_demo, here):
    copied(tiny_demo, here / "runs")
    found = json.loads(done("status", "base", "loss.focus_weight=7", "--json"))["outputs"]
    states = {each["output"]: each["state"] for each in found}
    assert states["round 1 scores/loss"] == "stale"
    assert states["round 1 checkpoint"] == "stale"
    assert states["round 0 checkpoint"] == "done"


def test_pick_of_a_run_that_was_trained_is_refused(tiny_demo, here):
    copied(tiny_demo, here / "runs")
    text = refused(here, "pick", "loss", *small(tiny_demo)[:3], "fraction=0.1", "--run", "base")
    assert "draw.fraction: null -> 0.1" in text


def test_a_config_error_names_both_ways_to_say_how_many(tiny_demo, here):
    with pytest.raises(ConfigError, match="Nothing says how many"):
        Run(here / "r", **files(tiny_demo)).pick("loss")
    assert not (here / "r").exists()


def test_what_looks_at_runs_looks_at_one_that_only_selects(tiny_demo, here):
    done("pick", "loss", *LOW, *data(tiny_demo), "num_samples=12", "--run", "p", "--to", "best.jsonl")
    assert "selected by loss: 12 rows" in (here / _report(done("report", "p"))).read_text(encoding="utf-8")
    found = json.loads(done("inspect", "p", "--json"))
    assert [(each["round"], each["selected"]) for each in found["rounds"]] == [(1, 12)]
    query = "select count(*) as n, max(rank) as last, count(name) as named from selections"
    assert json.loads(done("inspect", "p", "--sql", query, "--json")) == [{"n": 12, "last": 12, "named": 0}]
    assert "Selection of round 1, by loss" in done("inspect", "runs/p/round-01/selection.parquet")
    assert "scored and selected only" in (here / "runs/p/report.html").read_text(encoding="utf-8")


def _report(said):
    return said.partition(": ")[2].partition(" (")[0]


def test_estimate_of_a_run_that_only_selects_has_no_training(tiny_demo, here):
    text = done("estimate", *data(tiny_demo), "warmup_step=0", "update_times=0", "fraction=0.1", "--json")
    stages = {each["stage"]: each for each in json.loads(text)["stages"]}
    assert "train" not in stages
    assert stages["select"]["rows"] == 20


BY_METHOD = {
    "random": (),
    "loss": ("loss.focus=medium",),
    "perplexity": ("perplexity.focus=high", "perplexity.loss=total"),
    "column": ("column.column=s",),
    "near": ("near.embeddings=pool.npy", "near.query_embeddings=target.npy"),
    "tsds": ("tsds.embeddings=pool.npy", "tsds.query_embeddings=target.npy"),
    "less": ("less.gradient_type=sgd", "less.proj_dim=64"),
}


@pytest.mark.parametrize("method", BY_METHOD)
def test_every_method_that_needs_no_warm_up_gives_a_file_that_others_read(method, tiny_demo, here):
    import datasets

    random = np.random.default_rng(1)
    rows = lines(tiny_demo.pool)[:48]
    for row in rows:
        row["s"] = float(random.integers(0, 9))
    (here / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for name, count in (("pool", len(rows)), ("target", len(lines(tiny_demo.target)))):
        vectors = random.standard_normal((count, 4)).astype(np.float32)
        np.save(here / f"{name}.npy", vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
    given = ("dataset=mine.jsonl", *data(tiny_demo)[1:], "strategy=top_k", "num_samples=9")
    done("pick", method, *given, *BY_METHOD[method], "--run", "p", "--to", "best.jsonl")
    scores = pq.read_table(here / f"runs/p/round-01/scores/{method}.parquet")
    order = np.lexsort((scores["row"].to_numpy(), -scores["score"].to_numpy()))[:9]
    exported = lines(here / "best.jsonl")
    assert [line["_row"] for line in exported] == order.tolist()
    assert [{key: line[key] for key in rows[0]} for line in exported] == [rows[row] for row in order]
    read = datasets.load_dataset("json", data_files=str(here / "best.jsonl"), split="train")
    assert read["_rank"] == list(range(1, 10))
    again = Run(here / "again", dataset=str(here / "best.jsonl"), model_name_or_path=str(tiny_demo.model))
    again.pick("random", num_samples=9)
    assert prepared(here / "again")["row_id"].to_pylist() == [line["_row_id"] for line in exported]
