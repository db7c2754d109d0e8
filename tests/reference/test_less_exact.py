"""LESS without a projection, through the commands: scores against a loop over single rows, in float64."""

from __future__ import annotations

import json
import re

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from cli_runs import STEPS, done, two_rounds
from safetensors import safe_open

from dataflex_pipeline import Run

SETTINGS = (
    *STEPS,
    "per_device_train_batch_size=4",
    "lora_rank=4",
    "learning_rate=0.002",
    "plot_loss=false",
    "eval_strategy=no",
    "eval_group_column=kind",
    "component_name=less",
    "less.checkpoints=all",
    "keep_checkpoints=true",
    "save_steps=1",
)


@pytest.fixture(scope="module")
def world(tiny_demo, tmp_path_factory):
    """Two rounds of less with nothing projected, two checkpoints in each, the target in two groups."""
    return two_rounds(tiny_demo, tmp_path_factory.mktemp("exact"), SETTINGS, n_target=6)


def scores(folder, number, run="run"):
    return pq.read_table(folder / run / f"round-{number:02d}" / "scores" / "less.parquet")


def checkpoints(run, number):
    """Return the kept checkpoints of a round with the learning rates of the steps before them."""
    lines = (run / f"round-{number:02d}" / "training_log.jsonl").read_text().splitlines()
    rates = [json.loads(line)["learning_rate"] for line in lines]
    step = run / f"round-{number:02d}" / "checkpoints" / f"step-{2 * number + 1:06d}"
    return list(zip(rates, (step, run / f"round-{number:02d}" / "checkpoint"), strict=True))


def gradient_of(model, row):
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    loss = model(input_ids=torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]])).loss
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def next_step(checkpoint, gradients):
    """Return what torch.optim.AdamW subtracts next at a rate of 1, from the states in optimizer.pt."""
    saved = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    (group,) = [group for group in saved["param_groups"] if group["params"]]
    updates = {}
    for number, name in zip(group["params"], group["param_names"], strict=True):
        weight = torch.zeros_like(gradients[name], dtype=torch.float64).requires_grad_()
        settings = {"betas": tuple(group["betas"]), "eps": group["eps"], "weight_decay": 0.0}
        optimizer = torch.optim.AdamW([weight], lr=1.0, **settings)
        state = saved["state"][number]
        optimizer.state[weight] = {k: v.clone() if k == "step" else v.double() for k, v in state.items()}
        weight.grad = gradients[name].double()
        optimizer.step()
        updates[name] = -weight.detach()
    return updates


def unit(vectors):
    whole = torch.cat([vectors[name].double().reshape(-1) for name in sorted(vectors)])
    return (whole / whole.norm()).numpy()


def cosines(run, tiny_demo, checkpoint, rows):
    """Return the cosines of pool rows with all target rows at a checkpoint, row by row. [rows, M]"""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_demo.model)
    model = PeftModel.from_pretrained(base, checkpoint, is_trainable=True).eval()
    pool = pq.read_table(run / "pool").to_pylist()
    target = [unit(gradient_of(model, row)) for row in pq.read_table(run / "target").to_pylist()]
    updates = [unit(next_step(checkpoint, gradient_of(model, pool[row]))) for row in rows]
    return np.array(updates) @ np.array(target).T


def test_scores_of_both_rounds_equal_a_loop_over_single_rows(world, tiny_demo):
    run, rows = world[0] / "run", list(range(0, 60, 5))
    names = np.array(pq.read_table(run / "target")["group"].to_pylist())
    total = np.zeros((len(rows), len(names)))
    for number in (0, 1):
        for rate, checkpoint in checkpoints(run, number):
            total += rate * cosines(run, tiny_demo, checkpoint, rows)
        table = scores(world[0], number + 1)
        expected = {kind: total[:, names == kind].mean(axis=1) for kind in ("even", "odd")}
        scale = 1e-6 * max(np.abs(values).max() for values in expected.values())
        for kind, values in expected.items():
            found = table[f"similarity_{kind}"].to_numpy()[rows]
            np.testing.assert_allclose(found, values, rtol=0, atol=scale)
        best = np.maximum(*expected.values())
        np.testing.assert_allclose(table["score"].to_numpy()[rows], best, rtol=0, atol=scale)


def test_nothing_of_the_size_of_a_gradient_is_kept_per_row(world):
    features = sorted((world[0] / "run" / "features").iterdir())
    kinds = {path.name.rsplit("-", 1)[0] for path in features}
    assert kinds == {"influence-pool", "target_directions-target"}
    assert len(features) == 8  # two checkpoints in each of two rounds
    for folder in features:
        names = {path.name for path in folder.iterdir()}
        own = {"directions.safetensors"} if "directions" in folder.name else set()
        assert names == {"_manifest.json", "part-00000.parquet"} | own
        if own:
            with safe_open(folder / "directions.safetensors", framework="pt") as file:
                header = json.loads(file.metadata()["directions"])
            manifest = json.loads((folder / "_manifest.json").read_text())
            assert re.fullmatch("[0-9a-f]{32}", header.pop("digest"))
            assert header == {"labels": ["even", "odd"], "fingerprint": manifest["fingerprint"]}


def by_turns(values, count):
    """Take turns over the columns by looking at all rows every time."""
    taken: list[int] = []
    while len(taken) < count:
        for column in values.T:
            order = np.lexsort((np.arange(len(column)), -column))
            taken.append(int(next(row for row in order if row not in taken)))
    return taken[:count]


@pytest.mark.slow
def test_target_rows_take_turns_by_directions_of_their_own(world, tiny_demo):
    folder, settings, _ = world
    rows = ("strategy=round_robin", "round_robin_over=target_rows", "disable_shuffling=true")
    done("select", "--round", 1, "--overwrite", *settings, *rows, "--run", "run")
    run = folder / "run"
    values = sum(
        rate * cosines(run, tiny_demo, checkpoint, range(60)) for rate, checkpoint in checkpoints(run, 0)
    )
    chosen = pq.read_table(run / "round-01" / "selection.parquet")["row"].to_pylist()
    assert chosen == by_turns(values, 8)


def test_the_target_rows_that_agree_with_a_row_are_found_on_demand(world, tiny_demo):
    run = world[0] / "run"
    assert "--gradients" in " ".join(Run.open(run).row(7).notices)
    found = Run.open(run).row(7, gradients=True)
    assert not [line for line in found.notices if "gradients" in line]
    assert [each.used_by for each in found.gradients] == [
        (f"less, round {number}{step}",) for number in (1, 2) for step in (f" step {2 * number - 1}", "")
    ]
    for each, (_, checkpoint) in zip(found.gradients, checkpoints(run, 0), strict=False):
        [expected] = cosines(run, tiny_demo, checkpoint, [7])
        order = np.lexsort((np.arange(len(expected)), -expected))[:5]
        assert [row.row for row in each.rows] == order.tolist()
        np.testing.assert_allclose([row.similarity for row in each.rows], expected[order], rtol=0, atol=1e-6)
    text = done("inspect", run, "--row", 7, "--gradients")
    assert text.count("Target rows whose gradients agree most") == 4
