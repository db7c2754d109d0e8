"""Rows of an optimizer step in order of length: less padding, the same step."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_training import (
    GLOBAL_BATCH,
    STEPS,
    Listener,
    make_config,
    make_index,
    make_model,
    make_plan,
    make_pool,
    train_round,
)

from dataflex_pipeline.models.optimizer_states import adam_states
from dataflex_pipeline.training import arguments
from dataflex_pipeline.training.positions import longest_first, training_positions


def padded_per_token(lengths: np.ndarray, micro: int) -> float:
    """Return the tokens that micro-batches hold for each real one."""
    batches = lengths.reshape(-1, micro)
    return float(batches.max(1).sum() * micro / lengths.sum())


def test_rows_stay_in_their_step_and_take_less_padding():
    drawn = np.random.default_rng(0).normal(np.log(512), 0.7, 64 * 32)
    lengths = np.clip(np.exp(drawn), 4, 2048).astype(int)
    order = longest_first(lengths, 32)
    assert np.array_equal(np.sort(order.reshape(64, 32)), np.arange(64 * 32).reshape(64, 32))
    assert (np.diff(lengths[order].reshape(64, 32)) <= 0).all()
    before, after = padded_per_token(lengths, 4), padded_per_token(lengths[order], 4)
    assert before > 1.6
    assert after < 1.2
    assert np.array_equal(longest_first(np.full(6, 3), 3), np.arange(6))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("order")
    return make_model(folder / "model"), make_pool(folder / "pool")


def trained(world, run, monkeypatch, *, by_length):
    """The result of a round with weighted rows, its Adam states and its adapter."""
    from safetensors.torch import load_file

    model, pool = world
    config = make_config(model)
    if not by_length:
        monkeypatch.setattr(arguments, "balances_experts", lambda *_: True)
    weights = np.random.default_rng(5).uniform(0.2, 1.8, STEPS * GLOBAL_BATCH)
    plan = make_plan(run, 0, config, pool, make_index(0, STEPS, pool.n_rows, weights))
    result = train_round(config, plan, pool, None, Listener())
    states = adam_states(plan.checkpoint)
    return result, states, load_file(plan.checkpoint / "adapter_model.safetensors")


def test_the_step_is_the_same_within_rounding(world, tmp_path, monkeypatch):
    sorted_ = trained(world, tmp_path / "sorted", monkeypatch, by_length=True)
    drawn = trained(world, tmp_path / "drawn", monkeypatch, by_length=False)
    assert sorted_[0].train_loss == pytest.approx(drawn[0].train_loss, rel=1e-6)
    for name, state in drawn[1].items():
        largest = float(state.exp_avg.abs().max())
        assert torch.allclose(sorted_[1][name].exp_avg, state.exp_avg, atol=1e-5 * largest)
    # Adam divides by the root of the second moment, so a gradient of nothing but rounding moves more.
    moved = [(drawn[2][name] - sorted_[2][name]).abs().max() for name in drawn[2]]
    assert max(map(float, moved)) < 1e-4


def test_the_weight_travels_with_its_row(world, tmp_path):
    model, pool = world
    weights = np.arange(1, STEPS * GLOBAL_BATCH + 1) / 6.5
    plan = make_plan(tmp_path, 0, make_config(model), pool, make_index(0, STEPS, pool.n_rows, weights))
    found = training_positions(plan, pool, 64)
    asked = training_positions(plan, pool, 64, by_length=False)
    for step in range(STEPS):
        rows = slice(step * GLOBAL_BATCH, (step + 1) * GLOBAL_BATCH)
        pairs = [
            sorted(zip(data[rows]["weight"], data[rows]["input_ids"], strict=True)) for data in (found, asked)
        ]
        assert pairs[0] == pairs[1]
    assert np.allclose(asked["weight"], weights)
