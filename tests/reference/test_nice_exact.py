"""NICE without a projection, through the commands: scores against autograd on the run's own answers."""

from __future__ import annotations

import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from cli_runs import STEPS, done, two_rounds
from test_less_exact import gradient_of, next_step, unit

SAMPLES, TEMPERATURE = 3, 0.8
SETTINGS = (
    *STEPS,
    "per_device_train_batch_size=4",
    "lora_rank=4",
    "learning_rate=0.002",
    "plot_loss=false",
    "eval_strategy=no",
    "eval_group_column=kind",
    "component_name=nice",
    "nice.generator=transformers",
    f"nice.mc_samples={SAMPLES}",
    "nice.max_new_tokens=8",
    f"nice.generation_temperature={TEMPERATURE}",
    "nice.reward_model_backend=metric",
    "nice.reward_backend_params.metric.name=chrf",
)
POLICIES = {
    "vanilla": ("nice.baseline=none",),
    "leave_one_out": (),
    "topk": ("nice.policy=topk", "nice.kept_samples=2", "nice.token_mean=true"),
    "hard_rejection": ("nice.policy=hard_rejection",),  # nothing passes: the rows' own answers
}


@pytest.fixture(scope="module")
def world(tiny_demo, tmp_path_factory):
    """A run of one round with nice, its target in two groups."""
    return two_rounds(tiny_demo, tmp_path_factory.mktemp("nice"), SETTINGS, n_target=6)


def model_of(tiny_demo, checkpoint):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_demo.model)
    return PeftModel.from_pretrained(base, checkpoint, is_trainable=True).eval()


def sample_weight(kind, rewards, sample):
    """Return A_s / S of a sample, or 0 where the policy leaves it out."""
    others = (sum(rewards) - rewards[sample]) / (len(rewards) - 1)
    if kind == "vanilla":
        return rewards[sample] / len(rewards)
    if kind == "leave_one_out":
        return (rewards[sample] - others) / len(rewards)
    kept = best_of(rewards)
    return (rewards[sample] - others) / len(kept) if sample in kept else 0.0


def best_of(rewards):
    """Return the two samples with the highest rewards, as far as these are above 0."""
    best = np.argsort(-np.array(rewards), kind="stable")[:2].tolist()
    return [sample for sample in best if rewards[sample] > 0]


def policy_gradient(model, kind, rewards, answers):
    total = 0.0
    for sample, (prompt, answer) in enumerate(answers):
        ids = torch.tensor([[*prompt, *answer]])
        steps = (model(input_ids=ids, use_cache=False).logits[0] / TEMPERATURE).log_softmax(-1)
        nll = -sum(steps[t - 1, ids[0, t]] for t in range(len(prompt), ids.shape[1]))
        total = total + sample_weight(kind, rewards, sample) * nll / (len(answer) if kind == "topk" else 1)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(named, torch.autograd.grad(total, list(named.values())), strict=True))


@pytest.mark.parametrize(
    "kind",
    [pytest.param(each, marks=() if each == "leave_one_out" else pytest.mark.slow) for each in POLICIES],
)
def test_scores_equal_a_loop_over_written_out_policy_gradients(world, tiny_demo, kind):
    folder, settings, _ = world
    done("round", 1, *settings, *POLICIES[kind], "--run", kind)
    run, checkpoint = folder / kind, folder / kind / "round-00" / "checkpoint"
    model, (features,) = model_of(tiny_demo, checkpoint), [folder / kind / "features"]
    drawn = pq.read_table(next(features.glob("generations-target-*"))).to_pylist()
    rewards = pq.read_table(next(features.glob("rewards-target-*")))["reward"].to_pylist()
    directions = {"even": [], "odd": []}
    for row in pq.read_table(run / "target").to_pylist():
        lines = range(row["row"] * SAMPLES, (row["row"] + 1) * SAMPLES)
        answers = [(drawn[i]["prompt"], drawn[i]["token_ids"]) for i in lines]
        if kind == "hard_rejection" or (kind == "topk" and not best_of([rewards[i] for i in lines])):
            gradient = gradient_of(model, row)
        else:
            gradient = policy_gradient(model, kind, [rewards[i] for i in lines], answers)
        directions[row["group"]].append(unit(gradient))
    table = pq.read_table(run / "round-01" / "scores" / "nice.parquet").to_pylist()
    pool, rows = pq.read_table(run / "pool").to_pylist(), range(0, 60, 6)
    updates = {row: unit(next_step(checkpoint, gradient_of(model, pool[row]))) for row in rows}
    expected = {g: {row: np.mean(d, axis=0) @ updates[row] for row in rows} for g, d in directions.items()}
    scale = max(abs(value) for values in expected.values() for value in values.values())
    for row in rows:
        for group, values in expected.items():
            assert table[row][f"similarity_{group}"] == pytest.approx(values[row], abs=1e-6 * scale)
        assert table[row]["score"] == pytest.approx(max(v[row] for v in expected.values()), abs=1e-6 * scale)
    assert not list(features.glob("*gradients-*"))


def test_one_pass_for_two_methods_gives_what_each_gives_alone(world):
    folder, settings, _ = world
    shutil.copytree(folder / "run", folder / "both")
    for name in ("round-01", "round-02", "features"):
        shutil.rmtree(folder / "both" / name)
    text = done("score", "--round", 1, "--method", "less,nice", *settings, "--run", "both")
    assert "influence of the pool: one pass for 2 targets" in text
    done("score", "--round", 1, "--method", "less", *settings, "--run", "run")
    for name in ("less", "nice"):
        one, other = (folder / run / "round-01" / "scores" / f"{name}.parquet" for run in ("run", "both"))
        assert pq.read_table(one).equals(pq.read_table(other))
    tables = sorted((folder / "both" / "features").glob("influence-pool-*"))
    assert len(tables) == 2
    for table in tables:
        alone = folder / "run" / "features" / table.name
        assert {p.name: p.read_bytes() for p in table.iterdir()} == {
            p.name: p.read_bytes() for p in alone.iterdir()
        }
    text = done("score", "--round", 1, "--method", "less,nice", *settings, "--run", "both")
    assert "one pass" not in text
