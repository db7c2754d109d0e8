"""NICE through the commands: scores against autograd on the run's own tables, sharing with LESS, refusals."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from cli_runs import STEPS, dataflex, done, refused, two_rounds

from dataflex_pipeline.gradients.projection import make_projection
from dataflex_pipeline.seeds import derive_seed

K, SAMPLES = 64, 3
SETTINGS = (
    *STEPS,
    "per_device_train_batch_size=4",
    "lora_rank=4",
    "learning_rate=0.002",
    "plot_loss=false",
    "eval_strategy=no",
    "eval_group_column=kind",
    "component_name=nice",
    f"nice.proj_dim={K}",
    "nice.dtype=float32",
    "nice.generator=transformers",
    f"nice.mc_samples={SAMPLES}",
    "nice.max_new_tokens=8",
    "nice.generation_temperature=0.8",
    "nice.reward_model_backend=metric",
    "nice.reward_backend_params.metric.name=chrf",
)


@pytest.fixture(scope="module")
def world(tiny_demo, tmp_path_factory):
    """A run of two rounds with nice on the tiny demo, its target in two groups."""
    return two_rounds(tiny_demo, tmp_path_factory.mktemp("nice"), SETTINGS, n_target=6)


def scores(folder, number, run="run", method="nice"):
    return pq.read_table(folder / run / f"round-{number:02d}" / "scores" / f"{method}.parquet")


def feature(folder, kind, number, run="run"):
    """Return the table of a feature at the checkpoint of a round; rounds were scored in their order."""
    tables = sorted((folder / run / "features").glob(f"{kind}-*"), key=lambda path: path.stat().st_mtime)
    assert len(tables) == 2
    return pq.read_table(tables[number])


def model_of(tiny_demo, checkpoint):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_demo.model)
    return PeftModel.from_pretrained(base, checkpoint, is_trainable=True).eval()


def policy_gradient(model, answers, seed):
    """Return the unit projection of the gradient of (1/S) sum_s A_s (- sum_t log p(y_t)), by autograd."""
    total, rewards = 0.0, np.array([reward for reward, *_ in answers])
    for sample, (reward, prompt, answer) in enumerate(answers):
        ids = torch.tensor([[*prompt, *answer]])
        steps = (model(input_ids=ids, use_cache=False).logits[0] / 0.8).log_softmax(-1)
        nll = -sum(steps[t - 1, ids[0, t]] for t in range(len(prompt), ids.shape[1]))
        total = total + (reward - np.delete(rewards, sample).mean()) * nll / len(answers)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    projection, into = make_projection("countsketch", K, seed), torch.zeros(1, K)
    for name, gradient in zip(named, torch.autograd.grad(total, list(named.values())), strict=True):
        projection.add(name, gradient.reshape(1, -1).contiguous(), into)
    return (into / into.norm())[0].double().numpy()


@pytest.mark.parametrize("number", [1, 2])
def test_scores_are_mean_cosines_with_the_written_out_policy_gradients(world, tiny_demo, number):
    folder, _, _ = world
    model = model_of(tiny_demo, folder / "run" / f"round-{number - 1:02d}" / "checkpoint")
    answers = feature(folder, "generations-target", number - 1).to_pylist()
    rewards = feature(folder, "rewards-target", number - 1)["reward"].to_pylist()
    target = pq.read_table(folder / "run" / "target").to_pylist()
    directions = {"even": [], "odd": []}
    for row in target:
        lines = range(row["row"] * SAMPLES, (row["row"] + 1) * SAMPLES)
        drawn = [(rewards[i], answers[i]["prompt"], answers[i]["token_ids"]) for i in lines]
        assert all(answers[i]["row_id"] == row["row_id"] for i in lines)
        directions[row["group"]].append(policy_gradient(model, drawn, derive_seed(42, "features", number)))
    pool = feature(folder, "gradients-pool", number - 1)["gradient"].to_pylist()
    found = scores(folder, number).to_pylist()
    for row, vector in enumerate(pool):
        expected = {g: np.mean([np.dot(vector, d) for d in those]) for g, those in directions.items()}
        for group, value in expected.items():
            assert found[row][f"similarity_{group}"] == pytest.approx(value, abs=1e-5)
        assert found[row]["score"] == pytest.approx(max(expected.values()), abs=1e-5)


def test_the_best_rows_are_selected_and_the_rewards_are_said(world):
    folder, _, text = world
    ranked = scores(folder, 2).sort_by([("score", "descending"), ("row", "ascending")])["row"].to_pylist()
    index = pq.read_table(folder / "run" / "round-02" / "index.parquet")
    assert sorted(index["row"].to_pylist()) == sorted(ranked[:8])  # update_step x batch
    rewards = feature(folder, "rewards-target", 1)["reward"].to_numpy()
    line = f"mean reward {rewards.mean():.4g} of 18 of 18 answers to the target's 6 prompts"
    assert line in text
    footer = pq.read_metadata(folder / "run" / "round-02" / "scores" / "nice.parquet").metadata
    assert line in footer[b"dataflex.notices"].decode()


def test_the_pools_gradients_are_shared_with_less(world):
    """Also where nice was first: the same projection, unless a method has a seed of its own."""
    folder, settings, _ = world
    before = {path.name for path in (folder / "run" / "features").glob("gradients-pool-*")}
    less = ("--round", 1, *settings, "less.proj_dim=64", "less.dtype=float32", "--run", "run")
    less += ("--method", "less")
    text = done("score", *less)
    assert "gradients of the pool" not in text
    assert {path.name for path in (folder / "run" / "features").glob("gradients-pool-*")} == before
    assert scores(folder, 1, method="less").num_rows == 60
    assert "gradients of the pool" in done("score", *less, "less.seed=5", "--overwrite")


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("nice.reward_backend_params.metric.nam=chrf", "Did you mean 'name'?"),
        ("nice.reward_backend_params.metrik.name=chrf", "Did you mean 'metric'?"),
        ("nice.reward_model_backend=judge", "nice.reward_model_backend is 'judge'"),
        ("nice.policy=best", "nice.policy is 'best'"),
        ("nice.mc_samples=0", "nice.mc_samples is 0"),
        ("nice.reward_model_backend=reward_model", "without a model"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_done(world, setting, words):
    folder, settings, _ = world
    assert words in refused(folder, "round", 1, *settings, setting, "--run", "fresh")


def test_a_baseline_needs_two_samples(world):
    folder, settings, _ = world
    wrong = ("nice.mc_samples=1", "nice.baseline=leave_one_out")
    text = refused(folder, "round", 1, *settings, *wrong, "--run", "fresh")
    assert "leave_one_out needs mc_samples of at least 2" in text


def test_scores_of_other_parameters_are_not_added_to(world):
    """Plain cosines of round 1 do not go into a sum of cosines times learning rates."""
    folder, settings, _ = world
    shutil.copytree(folder / "run", folder / "summed")
    more = ("nice.accumulate=true", "--run", "summed", "--overwrite")
    text = " ".join(done("score", "--round", 2, *settings, *more).split())
    assert "the scores of round 1 were made with other parameters and do not count: accumulate: false" in text
    assert "the sum over rounds starts here" in text
    marker = json.loads((folder / "run" / "round-01" / "checkpoint" / "COMPLETE.json").read_text())
    eta = marker["result"]["mean_learning_rate"]
    for name in ("similarity_even", "similarity_odd"):
        plain, summed = scores(folder, 2)[name].to_numpy(), scores(folder, 2, "summed")[name].to_numpy()
        np.testing.assert_allclose(summed, eta * plain, rtol=1e-9)


def test_hard_rejection_judges_the_rows_own_answers(world):
    folder, settings, _ = world
    more = ("nice.policy=hard_rejection", "--run", "hard")
    text = done("round", 1, *settings, *more)
    table = pq.read_table(next((folder / "hard" / "features").glob("policy_gradients-*")))
    own = pq.read_table(next((folder / "hard" / "features").glob("rewards-*")))["reference_reward"]
    assert own.to_pylist() == [1.0] * 18  # chrF of an answer with itself
    assert table["from_reference"].to_pylist() == [True] * 6
    assert "6 target rows take the gradient of their own answer" in text


def test_rewards_without_any_signal_stop_the_selection(world):
    folder, settings, _ = world
    more = ("nice.reward_backend_params.metric.name=exact_match", "--run", "silent")
    ran = dataflex("round", 1, *settings, *more)
    assert ran.code != 0
    assert "None of the 6 target rows has a signal: for each of them all their rewards are 0." in ran.err
    assert "nice.policy=rejection" in ran.err
    assert not (folder / "silent" / "round-01" / "scores" / "nice.parquet").exists()
    done("round", 1, *settings, *more, "nice.policy=rejection", "--overwrite")


def test_every_setting_of_the_judges_is_listed_with_its_meaning():
    text = done("methods", "nice")
    name = "nice.reward_backend_params.metric.name\texact_match\texact_match\texact_match, contains, "
    assert name in text
    assert "nice.reward_backend_params.local_vllm.vllm_top_k\t40\t40\ttokens that are drawn from" in text
