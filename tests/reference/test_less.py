"""LESS: scores against a loop over single rows with autograd, and what a round with it selects."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from cli_runs import STEPS, dataflex, done, refused, two_rounds
from safetensors.torch import load_file

from dataflex_pipeline import api
from dataflex_pipeline.errors import DataError, RunError
from dataflex_pipeline.gradients.projection import make_projection
from dataflex_pipeline.gradients.similarity import group_means
from dataflex_pipeline.methods import build_method, method_class
from dataflex_pipeline.seeds import derive_seed
from dataflex_pipeline.store.tables import TableFile

K = 64
SETTINGS = (
    *STEPS,
    "per_device_train_batch_size=4",
    "lora_rank=4",
    "learning_rate=0.002",
    "plot_loss=false",
    "eval_strategy=no",
    "eval_group_column=kind",
    "component_name=less",
    f"less.proj_dim={K}",
    "less.dtype=float32",
)


@pytest.fixture(scope="module")
def world(tiny_demo, tmp_path_factory):
    """A run of two rounds with less on the tiny demo, its target in two groups; one target row leaks."""
    return two_rounds(tiny_demo, tmp_path_factory.mktemp("less"), SETTINGS, n_target=5, leaks=7)


def scores(folder, number, run="run"):
    return pq.read_table(folder / run / f"round-{number:02d}" / "scores" / "less.parquet")


def model_of(tiny_demo, checkpoint):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_demo.model)
    return PeftModel.from_pretrained(base, checkpoint, is_trainable=True).eval()


def gradient_of(model, ids, labels):
    """Return the plain gradient of one row, by parameter name."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    loss = model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def adam_of(checkpoint, gradients):
    """Return Adam's next update from each gradient, written out from optimizer.pt."""
    saved = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    (group,) = [group for group in saved["param_groups"] if group["params"]]
    result = {}
    for number, name in zip(group["params"], group["param_names"], strict=True):
        state, g = saved["state"][number], gradients[name]
        b1, b2 = group["betas"]
        t = float(state["step"]) + 1
        m = (b1 * state["exp_avg"] + (1 - b1) * g) / (1 - b1**t)
        v = (b2 * state["exp_avg_sq"] + (1 - b2) * g**2) / (1 - b2**t)
        result[name] = m / (v.sqrt() + group["eps"])
    return result


def projected(gradients, seed):
    projection = make_projection("countsketch", K, seed)
    into = torch.zeros(1, K)
    for name, gradient in gradients.items():
        projection.add(name, gradient.reshape(1, -1).contiguous(), into)
    return (into / into.norm()).double().numpy()[0]


def cosines(run, tiny_demo, checkpoint, rows, number=1):
    """Return the cosines of pool rows with all target rows at a checkpoint, row by row. [rows, M]"""
    model, seed = model_of(tiny_demo, checkpoint), derive_seed(42, "features", number)
    pool = pq.read_table(run / "pool").to_pylist()
    directions = [
        projected(gradient_of(model, row["input_ids"], row["labels"]), seed)
        for row in pq.read_table(run / "target").to_pylist()
    ]
    updates = [
        adam_of(checkpoint, gradient_of(model, pool[row]["input_ids"], pool[row]["labels"])) for row in rows
    ]
    return np.array([projected(update, seed) for update in updates]) @ np.array(directions).T


def kinds(run):
    """Return which target rows are of each group."""
    names = np.array(pq.read_table(run / "target")["group"].to_pylist())
    return {kind: names == kind for kind in ("even", "odd")}


def assert_scores(table, rows, terms, groups):
    """Check a score table against the summed terms of pool rows with target rows [rows, M]."""
    expected = {kind: terms[:, those].mean(axis=1) for kind, those in groups.items()}
    scale = 1e-5 * max(np.abs(values).max() for values in expected.values())
    for kind, values in expected.items():
        np.testing.assert_allclose(table[f"similarity_{kind}"].to_numpy()[rows], values, rtol=0, atol=scale)
    best = np.maximum(*expected.values())
    np.testing.assert_allclose(table["score"].to_numpy()[rows], best, rtol=0, atol=scale)


def test_scores_equal_a_loop_over_single_rows(world, tiny_demo):
    run = world[0] / "run"
    checkpoint, rows = run / "round-00" / "checkpoint", list(range(0, 60, 9))
    eta = json.loads((checkpoint / "COMPLETE.json").read_text())["result"]["mean_learning_rate"]
    assert_scores(scores(world[0], 1), rows, eta * cosines(run, tiny_demo, checkpoint, rows), kinds(run))


def test_adapter_that_is_scored_is_the_checkpoints(world, tiny_demo):
    folder, _, _ = world
    checkpoint = folder / "run" / "round-00" / "checkpoint"
    saved = load_file(checkpoint / "adapter_model.safetensors")
    loaded = dict(model_of(tiny_demo, checkpoint).named_parameters())
    for name, value in saved.items():
        assert torch.equal(value, loaded[name.replace(".weight", ".default.weight")])


def test_each_round_adds_its_term(world):
    folder, settings, _ = world
    done("round", 2, *settings, "less.accumulate=false", "--run", "alone")
    first, both, alone = scores(folder, 1), scores(folder, 2), scores(folder, 2, "alone")
    for kind in ("even", "odd"):
        name = f"similarity_{kind}"
        total = first[name].to_numpy() + alone[name].to_numpy()
        np.testing.assert_allclose(both[name].to_numpy(), total, rtol=0, atol=1e-12)


def test_a_round_scored_by_another_method_ends_the_chain_and_says_so(world):
    _, settings, _ = world
    done("round", 1, *settings, "component_name=loss", "--run", "other")
    text = done("score", "--round", 2, "--method", "less", *settings, "--run", "other")
    assert "round 1 has no scores of this method: the sum over rounds starts here" in text


def test_leaking_rows_are_named(world):
    (line,) = [line for line in world[2].splitlines() if "in the target too" in line][:1]
    assert "target row 5 = pool row 7" in line


def test_best_rows_are_selected_once_each(world):
    folder, _, _ = world
    table = scores(folder, 1)
    order = sorted(range(table.num_rows), key=lambda row: (-table["score"][row].as_py(), row))
    chosen = pq.read_table(folder / "run" / "round-01" / "index.parquet")["row"].to_pylist()
    assert sorted(chosen) == sorted(order[:8])  # 2 steps x 4 rows


def test_round_robin_takes_turns_over_the_groups(world):
    folder, settings, _ = world
    done("round", 1, *settings, "strategy=round_robin", "disable_shuffling=true", "--run", "turns")
    table = scores(folder, 1, "turns")
    best = {
        kind: sorted(range(60), key=lambda row, kind=kind: (-table[f"similarity_{kind}"][row].as_py(), row))
        for kind in ("even", "odd")
    }
    expected: list[int] = []
    while len(expected) < 8:
        for kind in ("even", "odd"):
            expected.append(next(row for row in best[kind] if row not in expected))
    chosen = pq.read_table(folder / "turns" / "round-01" / "index.parquet")["row"].to_pylist()
    assert chosen == expected[:8]


def by_turns(values, count):
    """Take turns over the columns by looking at all rows every time."""
    taken: list[int] = []
    while len(taken) < count:
        for column in values.T:
            order = np.lexsort((np.arange(len(column)), -column))
            taken.append(int(next(row for row in order if row not in taken)))
    return taken[:count]


def chosen(folder, run, number=1):
    return pq.read_table(folder / run / f"round-{number:02d}" / "index.parquet")["row"].to_pylist()


@pytest.mark.slow
def test_round_robin_takes_turns_over_target_rows(world, tiny_demo):
    folder, settings, _ = world
    rows = ("strategy=round_robin", "round_robin_over=target_rows", "disable_shuffling=true")
    text = done("round", 2, *settings, *rows, "--run", "rows")
    run = folder / "rows"
    values = cosines(run, tiny_demo, run / "round-00" / "checkpoint", range(60))
    assert chosen(folder, "rows") == by_turns(values, 8)
    assert "by this round's similarities alone" in text  # round 2 adds to round 1
    later = cosines(run, tiny_demo, run / "round-01" / "checkpoint", range(60), number=2)
    assert chosen(folder, "rows", 2) == by_turns(later, 8)
    probabilities = pq.read_table(run / "round-01" / "probabilities" / "less.parquet")["probability"]
    assert {row for row, p in enumerate(probabilities.to_pylist()) if p == 1 / 8} == set(by_turns(values, 8))
    notices = TableFile(run / "round-02" / "index.parquet").metadata["notices"]
    assert "by this round's similarities alone" in notices


@pytest.mark.slow
def test_with_one_group_target_rows_take_turns_by_default(world):
    folder, settings, _ = world
    one_group = (*settings, "eval_group_column=null", "strategy=round_robin", "disable_shuffling=true")
    done("round", 1, *one_group, "--run", "default")
    done("round", 1, *one_group, "round_robin_over=target_rows", "--run", "named")
    done("round", 1, *one_group, "round_robin_over=groups", "--run", "group")
    assert chosen(folder, "default") == chosen(folder, "named") != chosen(folder, "group")
    table = scores(folder, 1, "group")
    best = sorted(range(60), key=lambda row: (-table["score"][row].as_py(), row))
    assert chosen(folder, "group") == best[:8]


def test_turns_of_target_rows_need_a_method_that_has_them(world):
    folder, settings, _ = world
    rows = ("strategy=round_robin", "round_robin_over=target_rows")
    text = refused(folder / "run", "select", "--round", 1, "--method", "loss", *settings, "--run", "run")
    assert "has no finished loss scores" in text
    done("round", 1, *settings, "component_name=loss", "--run", "loss")
    text = refused(
        folder / "loss", "select", "--round", 1, "--method", "loss", *settings, *rows, "--run", "loss"
    )
    assert "round_robin_over: target_rows was set with the method loss" in text
    early = refused(folder, "round", 1, *settings, "component_name=loss", *rows, "--run", "early")
    assert "round_robin_over: target_rows was set with the method loss" in early


KEEP = ("less.checkpoints=all", "keep_checkpoints=true", "save_steps=1")


@pytest.mark.slow
def test_all_checkpoints_of_a_round_add_up(world, tiny_demo):
    folder, settings, _ = world
    done("round", 2, *settings, *KEEP, "--run", "all")
    run, rows = folder / "all", list(range(0, 60, 9))
    total = np.zeros((len(rows), 6))
    for number in (0, 1):
        lines = (run / f"round-{number:02d}" / "training_log.jsonl").read_text().splitlines()
        rates = [json.loads(line)["learning_rate"] for line in lines]
        step = run / f"round-{number:02d}" / "checkpoints" / f"step-{2 * number + 1:06d}"
        for rate, checkpoint in zip(rates, (step, step.parents[1] / "checkpoint"), strict=True):
            total += rate * cosines(run, tiny_demo, checkpoint, rows, number + 1)
        assert_scores(scores(folder, number + 1, "all"), rows, total, kinds(run))
    assert len(list((run / "features").glob("gradients-pool-*"))) == 4


@pytest.mark.slow
def test_tables_of_the_last_checkpoint_are_shared_and_as_without(world, tmp_path):
    folder, settings, _ = world
    keep = (*settings, "keep_checkpoints=true", "save_steps=1")
    done("round", 1, *keep, "--run", "both")
    names = {path.name for path in (folder / "both" / "features").iterdir()}
    assert names == {path.name for path in (folder / "run" / "features").iterdir()} & names
    done("score", "--round", 1, "--method", "less", *keep, "--run", "both", "--overwrite", KEEP[0])
    more = {path.name for path in (folder / "both" / "features").iterdir()}
    assert names < more
    assert len(more - names) == 2  # pool and target at step 1; those of the end were there


def test_all_checkpoints_without_any_kept_are_refused_before_any_training(world):
    folder, settings, _ = world
    ran = dataflex("round", 1, *settings, "less.checkpoints=all", "--run", "none")
    assert ran.code == 2
    assert "keep_checkpoints is false, save_steps null" in ran.err
    assert "Set keep_checkpoints: true and save_steps below 2" in ran.err
    assert not (folder / "none" / "round-00" / "training").exists()
    text = refused(
        folder / "run",
        *("score", "--round", 1, "--method", "less", *settings, "less.checkpoints=all", "--run", "run"),
    )
    assert "only its end was kept" in text


@pytest.mark.slow
def test_features_resume_and_do_not_depend_on_the_batch(world):
    folder, settings, _ = world
    args = (*settings, "rows_per_part=16")
    done("round", 1, *args, "--run", "parts")
    made = next((folder / "parts" / "features").glob("gradients-pool-*"))
    whole = {path.name: path.read_bytes() for path in made.iterdir()}
    (made / "_manifest.json").unlink()
    (made / "part-00002.parquet").unlink()
    scored = folder / "parts" / "round-01" / "scores" / "less.parquet"
    before = scored.read_bytes()
    scored.unlink()
    done("score", "--round", 1, "--method", "less", *args, "--run", "parts")
    assert {path.name: path.read_bytes() for path in made.iterdir()} == whole
    assert scored.read_bytes() == before
    done("round", 1, *args, "score_batch_tokens=1", "--run", "single")
    one, other = (scores(folder, 1, run)["score"].to_numpy() for run in ("parts", "single"))
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * np.abs(other).max())


def test_sampling_is_a_softmax(world):
    folder, _, _ = world
    table = scores(folder, 1)
    method = build_method("less", method_class("less"), {"temperature": 0.5}, "a test")
    selection = api.Selection(1, 3, 0, print, 1e-3)
    fitted = method.fit(Memory(table), selection)
    found = np.concatenate([method.weigh(block, fitted) for block in table.to_batches()])
    values = table["score"].to_numpy()
    scaled = values / (np.abs(values).max() * 0.5)
    np.testing.assert_allclose(found / found.sum(), np.exp(scaled) / np.exp(scaled).sum(), rtol=1e-9)


class Memory:
    """A table in memory, read in blocks."""

    def __init__(self, table):
        self.table, self.schema, self.n_rows = table, table.schema, table.num_rows

    def blocks(self, columns=None, max_rows=65536):
        yield from (self.table if columns is None else self.table.select(columns)).to_batches(max_chunksize=2)


def gradients(rows, groups, valid):
    lists = pa.FixedSizeListArray.from_arrays(pa.array(np.ravel(rows), pa.float32()), 2)
    return Memory(pa.table({"gradient": lists, "group": groups, "valid": valid}))


def test_group_means_by_hand():
    table = gradients([[1, 0], [0, 1], [0, 1], [9, 9]], ["b", "a", "b", "a"], [True, True, True, False])
    means = group_means(table, pytest.fail)
    assert list(means) == ["a", "b"]
    assert [mean.tolist() for mean in means.values()] == [[0.0, 1.0], [0.5, 0.5]]
    with pytest.raises(DataError, match="no row with a gradient"):
        group_means(gradients([[1, 0]], ["a"], [False]), pytest.fail)


def test_a_group_without_gradients_is_left_out_and_named():
    said = []
    means = group_means(gradients([[1, 0], [0, 1]], ["a", "b"], [True, False]), said.append)
    assert list(means) == ["a"]
    assert said == ["no row of the target group 'b' has a gradient: the group is left out"]


def test_a_learning_rate_of_zero_is_refused():
    method = build_method("less", method_class("less"), {}, "a test")
    with pytest.raises(RunError, match="mean learning rate of round 2 is 0"):
        method.begin({}, api.Selection(3, 5, 0, print, 0.0))


def test_wrong_settings_are_refused(world):
    folder, settings, _ = world
    assert "less.proj_dim is 0" in refused(folder, "round", 2, *settings, "less.proj_dim=0", "--run", "run")
    text = refused(folder, "round", 1, *settings, "eval_dataset=null", "--run", "fresh")
    assert "eval_dataset" in text


def test_a_round_on_real_text(tiny_demo, shared_data, tmp_path):
    """English rows as the pool, Chinese ones as the target, read as they come."""
    settings = (
        *SETTINGS,
        f"dataset={shared_data / 'alpaca_en_demo.json'}",
        f"eval_dataset={shared_data / 'alpaca_zh_demo.json'}",
        "eval_group_column=null",
        "max_samples=48",
        "cutoff_len=96",
        f"model_name_or_path={tiny_demo.model}",
        f"runs_dir={tmp_path}",
    )
    done("round", 1, *settings, "--run", "run")
    table = scores(tmp_path, 1).to_pandas()
    assert len(table) == 48
    assert table.loc[table["valid"], "score"].notna().all()
    assert (table["valid"] == table["reason"].isna()).all()
    best = table.sort_values(["score", "row"], ascending=[False, True])["row"].head(8)
    assert set(chosen(tmp_path, "run")) == set(best)
