"""LESS: scores against a loop over single rows with autograd, and what a round with it selects."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from cli_runs import STEPS, done, refused
from safetensors.torch import load_file

from dataflex_pipeline import api
from dataflex_pipeline.errors import DataError, RunError
from dataflex_pipeline.gradients.projection import make_projection
from dataflex_pipeline.methods import build_method, method_class
from dataflex_pipeline.methods.less import group_means
from dataflex_pipeline.seeds import derive_seed

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
    folder = tmp_path_factory.mktemp("less")
    pool = [json.loads(line) for line in tiny_demo.pool.read_text().splitlines()][:60]
    target = [json.loads(line) for line in tiny_demo.target.read_text().splitlines()][:5]
    target.append({key: pool[7][key] for key in ("instruction", "input", "output")})
    for number, row in enumerate(target):
        row.pop("skill", None), row.pop("quality", None)
        row["kind"] = "odd" if number % 2 else "even"
    (folder / "pool.json").write_text(json.dumps(pool))
    (folder / "target.json").write_text(json.dumps(target))
    settings = (
        *SETTINGS,
        f"dataset={folder / 'pool.json'}",
        f"eval_dataset={folder / 'target.json'}",
        f"model_name_or_path={tiny_demo.model}",
        f"runs_dir={folder}",
    )
    text = done("round", 2, *settings, "--run", "run")
    return folder, settings, text


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


def test_scores_equal_a_loop_over_single_rows(world, tiny_demo):
    folder, _, _ = world
    checkpoint = folder / "run" / "round-00" / "checkpoint"
    model = model_of(tiny_demo, checkpoint)
    seed = derive_seed(42, "method", "less", 1)
    pool = pq.read_table(folder / "run" / "pool").to_pylist()
    target = pq.read_table(folder / "run" / "target").to_pylist()
    directions = {"even": [], "odd": []}
    for row in target:
        plain = gradient_of(model, row["input_ids"], row["labels"])
        directions[row["group"]].append(projected(plain, seed))
    eta = json.loads((checkpoint / "COMPLETE.json").read_text())["result"]["mean_learning_rate"]
    found = scores(folder, 1).to_pylist()
    for row in pool[::9]:
        update = adam_of(checkpoint, gradient_of(model, row["input_ids"], row["labels"]))
        mine = projected(update, seed)
        expected = {kind: eta * np.mean([mine @ d for d in those]) for kind, those in directions.items()}
        for kind, value in expected.items():
            assert found[row["row"]][f"similarity_{kind}"] == pytest.approx(value, abs=1e-5 * eta)
        assert found[row["row"]]["score"] == pytest.approx(max(expected.values()), abs=1e-5 * eta)


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
    groups, means = group_means(table)
    assert groups == ("a", "b")
    assert means.tolist() == [[0.0, 1.0], [0.5, 0.5]]
    with pytest.raises(DataError, match="no row with a gradient"):
        group_means(gradients([[1, 0]], ["a"], [False]))


def test_a_learning_rate_of_zero_is_refused():
    method = build_method("less", method_class("less"), {}, "a test")
    with pytest.raises(RunError, match="mean learning rate of round 2 is 0"):
        method.begin({}, api.Selection(3, 5, 0, print, 0.0))


def test_wrong_settings_are_refused(world):
    folder, settings, _ = world
    assert "less.proj_dim is 0" in refused(folder, "round", 2, *settings, "less.proj_dim=0", "--run", "run")
    text = refused(folder, "round", 1, *settings, "eval_dataset=null", "--run", "fresh")
    assert "eval_dataset" in text
