"""What a round leaves behind: checkpoint, evaluation, best checkpoint, curves and pictures."""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pytest
from tiny_training import (
    STEPS,
    Listener,
    assert_same,
    joined_index,
    make_config,
    make_model,
    make_plan,
    make_pool,
    states,
    train,
)

from dataflex_pipeline.api import Silent
from dataflex_pipeline.errors import RunError
from dataflex_pipeline.training import MARKER, read_marker, train_round, verify_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

ROUNDS = 3


def test_checkpoint_holds_no_training_arguments_and_a_whole_marker(world, tmp_path):
    model, pool, _ = world
    train(tmp_path, [0], make_config(model), pool)
    checkpoint = tmp_path / "round-00/checkpoint"
    names = {path.name for path in checkpoint.iterdir()}
    assert "training_args.bin" not in names
    assert {"adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"} <= names
    marker = verify_checkpoint(checkpoint)
    assert set(marker.files) == names - {MARKER}
    assert marker.step == STEPS
    assert marker.ingredients == {"round": 0, "learning_rate": 5e-3}


def test_full_finetuning_carries_over_too(tmp_path):
    import torch
    from safetensors.torch import load_file

    from dataflex_pipeline.models.base import load_for_scoring

    model = make_model(tmp_path / "tied", tied=True)
    pool = make_pool(tmp_path / "pool")
    config = make_config(model, finetuning_type="full", learning_rate=1e-3)
    train(tmp_path / "rounds", range(2), config, pool)
    plan = replace(
        make_plan(tmp_path / "one", 0, config, pool, index=joined_index(pool, 2)), last_step=2 * STEPS
    )
    train_round(config, plan, pool, None, Silent())
    assert_same(states(tmp_path / "rounds/round-01/checkpoint"), states(plan.checkpoint))
    base = load_file(model / "model.safetensors")
    scored = load_for_scoring(config, plan.checkpoint, "cpu")
    moved = dict(scored.named_parameters())
    assert not scored.training
    assert all(not torch.equal(base[name], moved[name]) for name in base)
    assert all(parameter.requires_grad for parameter in moved.values())


def test_evaluation_is_the_token_weighted_mean_whatever_the_batch_size(world, tmp_path):
    import torch

    from dataflex_pipeline.models.base import load_for_scoring

    model, pool, target = world
    values = []
    for batch in (1, 5):
        config = make_config(model, eval_strategy="epoch", per_device_eval_batch_size=batch)
        values.append(train(tmp_path / str(batch), [0], config, pool, target).metrics)
    scored = load_for_scoring(config, tmp_path / "5/round-00/checkpoint", "cpu")
    total, correct, tokens = 0.0, 0, 0
    for row in target.take(np.arange(target.n_rows), ["input_ids", "labels"]).to_pylist():
        labels = torch.tensor(row["labels"])[1:]
        with torch.no_grad():
            logits = scored(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
        wanted = labels != -100
        total += torch.nn.functional.cross_entropy(logits[wanted], labels[wanted], reduction="sum").item()
        correct += int((logits[wanted].argmax(-1) == labels[wanted]).sum())
        tokens += int(wanted.sum())
    for metrics in values:
        assert metrics["eval_loss"] == pytest.approx(total / tokens, abs=2e-6)
        assert metrics["eval_token_accuracy"] == correct / tokens


@pytest.mark.slow
def test_early_stopping_counts_over_rounds_and_best_is_kept(world, tmp_path):
    model, pool, target = world
    # No improvement can exceed this delta: the first evaluation is the only one that counts.
    config = make_config(
        model,
        eval_strategy="epoch",
        early_stopping_steps=2,
        early_stopping_min_delta=100.0,
        load_best_model_at_end=True,
    )
    heard = Listener()
    results = [train(tmp_path, [number], config, pool, target, heard) for number in range(3)]
    assert [result.stopped_early for result in results] == [False, False, True]
    assert any("Early stopping at step 9: 2 evaluations without" in line for line in heard.lines)
    values = [result.metrics["eval_loss"] for result in results]
    best = int(np.argmin(values))
    assert results[-1].best["round"] == best
    kept = read_marker(tmp_path / "best")
    assert kept.step == (best + 1) * STEPS
    source = tmp_path / f"round-{best:02d}" / "checkpoint" / "adapter_model.safetensors"
    assert (tmp_path / "best/adapter_model.safetensors").read_bytes() == source.read_bytes()
    with pytest.raises(RunError, match="early stopping fired at step 9"):
        train(tmp_path, [3], config, pool, target)


def test_early_stopping_inside_a_round_leaves_a_complete_checkpoint(world, tmp_path):
    model, pool, target = world
    config = make_config(
        model, eval_strategy="steps", eval_steps=1, early_stopping_steps=1, early_stopping_min_delta=100.0
    )
    result = train(tmp_path, [0], config, pool, target)
    assert (result.steps, result.stopped_early) == (2, True)
    marker = verify_checkpoint(tmp_path / "round-00/checkpoint")
    assert (marker.step, marker.finished) == (2, True)


@pytest.mark.slow
def test_tensorboard_gets_the_curves_and_secrets_stay_in_the_environment(world, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model, pool, _ = world
    monkeypatch.delenv("SWANLAB_API_KEY", raising=False)
    config = make_config(model, report_to="tensorboard", swanlab_api_key="s3cret-key")
    train(tmp_path, range(2), config, pool)
    events = EventAccumulator(str(tmp_path / "logs"))
    events.Reload()
    assert [e.step for e in events.Scalars("train/loss")] == [2, 4, 6]
    assert "SWANLAB_API_KEY" not in os.environ
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or b"s3cret-key" not in path.read_bytes(), path


@pytest.mark.slow
def test_plot_is_a_picture_of_all_rounds(world, tmp_path):
    from matplotlib.image import imread

    model, pool, target = world
    config = make_config(model, plot_loss=True, eval_strategy="epoch")
    train(tmp_path, [0], config, pool, target)
    first = imread(tmp_path / "training_loss.png")
    train(tmp_path, [1], config, pool, target)
    second = imread(tmp_path / "training_loss.png")
    assert first.shape == second.shape
    assert min(first.shape[:2]) > 400
    assert first.std() > 0.05
    assert not np.array_equal(first, second)
