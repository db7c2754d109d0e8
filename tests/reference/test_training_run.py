"""Training rounds are one run over all of them, and weights are felt."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from tiny_training import (
    GLOBAL_BATCH,
    STEPS,
    Listener,
    assert_same,
    joined_index,
    log_of,
    make_config,
    make_index,
    make_plan,
    states,
    train,
)

from dataflex_pipeline.api import Silent
from dataflex_pipeline.errors import ConfigError, CorruptError
from dataflex_pipeline.training import read_marker, train_round

pytestmark = pytest.mark.usefixtures("one_thread")

ROUNDS = 3


def test_rounds_are_one_uninterrupted_run_bit_for_bit(world, tmp_path):
    model, pool, target = world
    config = make_config(model, lora_dropout=0.2, eval_strategy="epoch")
    train(tmp_path / "rounds", range(ROUNDS), config, pool, target)
    # One call over all steps, with evaluations at other times: they must not touch dropout.
    single = make_config(model, lora_dropout=0.2, eval_strategy="steps", eval_steps=2)
    plan = replace(
        make_plan(tmp_path / "one", 0, single, pool, index=joined_index(pool, ROUNDS)),
        last_step=ROUNDS * STEPS,
    )
    train_round(single, plan, pool, target, Silent())

    assert_same(states(tmp_path / "rounds/round-02/checkpoint"), states(plan.checkpoint))
    steps = [line for n in range(ROUNDS) for line in log_of(tmp_path / "rounds", n) if "loss" in line]
    assert steps == [line for line in log_of(tmp_path / "one", 0) if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, ROUNDS * STEPS + 1))


def test_learning_rate_is_one_schedule_over_the_horizon(world, tmp_path):
    model, pool, _ = world
    config = make_config(model, warmup_ratio=0.25)
    results = [train(tmp_path, [number], config, pool) for number in range(2)]

    horizon, rise = config.horizon, 3  # ceil(0.25 x 12)
    expected = [
        config.learning_rate
        * (t / rise if t < rise else 0.5 * (1 + math.cos(math.pi * (t - rise) / (horizon - rise))))
        for t in range(2 * STEPS)
    ]
    applied = [line["learning_rate"] for number in range(2) for line in log_of(tmp_path, number)]
    assert applied == pytest.approx(expected, rel=1e-12)
    for number, result in enumerate(results):
        here = expected[number * STEPS : (number + 1) * STEPS]
        assert result.mean_learning_rate == pytest.approx(sum(here) / STEPS, rel=1e-12)
        assert result.steps == STEPS
        marker = read_marker(tmp_path / f"round-{number:02d}" / "checkpoint")
        assert marker.result["mean_learning_rate"] == result.mean_learning_rate


def hand_written(config, pool, indices):
    """Train without the trainer: plain forward passes, the loss from its formula, torch's AdamW."""
    import torch

    from dataflex_pipeline.models.adapters import wrap_for_training
    from dataflex_pipeline.models.base import load_base
    from dataflex_pipeline.seeds import derive_seed

    model = wrap_for_training(config, load_base(config, "cpu"), derive_seed(config.seed, "adapter")).train()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(
        trained.values(),
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
    )
    positions = [
        (row, w)
        for t in indices
        for row, w in zip(t["row"].to_pylist(), t["weight"].to_pylist(), strict=True)
    ]
    rows = pool.take(np.arange(pool.n_rows), ["input_ids", "labels"]).to_pylist()
    losses = []
    for step in range(len(positions) // GLOBAL_BATCH):
        rate = config.learning_rate * 0.5 * (1 + math.cos(math.pi * step / config.horizon))
        for group in optimizer.param_groups:
            group["lr"] = rate
        total, tokens = 0.0, 0
        for row, weight in positions[step * GLOBAL_BATCH : (step + 1) * GLOBAL_BATCH]:
            ids = torch.tensor([rows[row]["input_ids"]])
            labels = torch.tensor(rows[row]["labels"])[1:]
            log_p = torch.log_softmax(model(input_ids=ids).logits[0, :-1].float(), -1)
            wanted = labels != -100
            nll = -log_p[wanted].gather(1, labels[wanted, None]).sum()
            total = total + weight * nll
            tokens += int(wanted.sum())
        loss = total / tokens
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return model, trained, optimizer, losses


def test_weighted_training_equals_a_hand_written_adamw_loop(world, tmp_path):
    import torch

    from dataflex_pipeline.models.base import load_for_scoring
    from dataflex_pipeline.models.optimizer_states import adam_states

    model, pool, _ = world
    config = make_config(model, weight_decay=0.1, max_grad_norm=0.5, adam_beta2=0.98)
    rng = np.random.default_rng(7)
    indices = []
    for number in range(2):
        weights = rng.exponential(1.0, STEPS * GLOBAL_BATCH)
        indices.append(make_index(number, STEPS, pool.n_rows, weights / weights.mean()))
        plan = make_plan(tmp_path, number, config, pool, index=indices[-1])
        train_round(config, plan, pool, None, Silent())

    _, trained, optimizer, losses = hand_written(config, pool, indices)
    logged = [line["loss"] for number in range(2) for line in log_of(tmp_path, number)]
    assert logged == pytest.approx(losses, rel=1e-5)
    found = dict(load_for_scoring(config, plan.checkpoint, "cpu").named_parameters())
    for name, parameter in trained.items():
        assert torch.allclose(found[name], parameter, atol=2e-6), name
    for name, state in adam_states(plan.checkpoint).items():
        live = optimizer.state[trained[name]]
        assert state.step == live["step"] == 2 * STEPS
        assert torch.allclose(state.exp_avg, live["exp_avg"], atol=1e-6)
        assert torch.allclose(state.exp_avg_sq, live["exp_avg_sq"], atol=1e-6)
        assert (state.betas, state.eps) == ((0.9, 0.98), config.adam_epsilon)


def test_a_step_of_one_row_feels_its_weight(world, tmp_path):
    model, pool, _ = world
    losses = {}
    for weight in (1.0, 3.0):
        config = make_config(
            model, per_device_train_batch_size=1, gradient_accumulation_steps=1, max_grad_norm=0
        )
        index = make_index(0, STEPS, pool.n_rows, np.full(STEPS * GLOBAL_BATCH, weight)).slice(0, 1)
        run = tmp_path / str(weight)
        plan = replace(
            make_plan(run, 0, config, pool, index=index), last_step=1, global_batch=1, horizon=config.horizon
        )
        train_round(config, plan, pool, None, Silent())
        losses[weight] = log_of(run, 0)[0]
    assert losses[3.0]["loss"] == pytest.approx(3 * losses[1.0]["loss"], rel=1e-6)
    assert losses[3.0]["grad_norm"] == pytest.approx(3 * losses[1.0]["grad_norm"], rel=1e-5)


def test_split_into_micro_batches_changes_nothing(world, tmp_path):
    import torch

    model, pool, _ = world
    splits = {(4, 1): tmp_path / "a", (1, 4): tmp_path / "b"}
    index = make_index(0, STEPS, pool.n_rows, np.linspace(0.5, 1.5, STEPS * GLOBAL_BATCH))
    for (batch, accumulation), run in splits.items():
        config = make_config(
            model, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation
        )
        train(run, [0], config, pool, index=index)
    a, b = (states(run / "round-00/checkpoint")["weights"] for run in splits.values())
    assert all(torch.allclose(a[name], b[name], atol=1e-5) for name in a)


def test_loader_workers_do_not_change_the_result(world, tmp_path):
    model, pool, _ = world
    for workers in (0, 2):
        config = make_config(model, lora_dropout=0.2, dataloader_num_workers=workers)
        train(tmp_path / str(workers), range(2), config, pool)
    assert_same(
        states(tmp_path / "0/round-01/checkpoint"),
        states(tmp_path / "2/round-01/checkpoint"),
    )


def test_gradient_checkpointing_changes_memory_not_the_result(world, tmp_path):
    import torch

    model, pool, _ = world
    for on in (False, True):
        config = make_config(model, lora_dropout=0.2, gradient_checkpointing=on)
        train(tmp_path / str(on), range(2), config, pool)
    a, b = (states(tmp_path / str(on) / "round-01/checkpoint")["weights"] for on in (False, True))
    assert all(torch.allclose(a[name], b[name], atol=1e-6) for name in a)


def test_bf16_on_a_cpu_is_fp32_and_said(world, tmp_path):
    model, pool, _ = world
    heard = Listener()
    train(tmp_path / "bf16", [0], make_config(model, bf16=True), pool, progress=heard)
    train(tmp_path / "fp32", [0], make_config(model), pool)
    assert "bf16: true becomes fp32 on a CPU." in heard.lines
    assert_same(*(states(tmp_path / kind / "round-00/checkpoint") for kind in ("bf16", "fp32")))


def test_number_of_processes_adapts_the_accumulation(world):
    from dataflex_pipeline.training.arguments import accumulation

    config = make_config(world[0], per_device_train_batch_size=2)
    assert [accumulation(config, 8, world_size) for world_size in (1, 2, 4)] == [4, 2, 1]
    with pytest.raises(ConfigError, match="no multiple of 6"):
        accumulation(config, 8, 3)


def test_positions_of_earlier_rounds_cannot_be_loaded(world, tmp_path):
    from dataflex_pipeline.training.positions import PaddingCollator, training_positions

    model, pool, _ = world
    config = make_config(model)
    data = training_positions(make_plan(tmp_path, 1, config, pool), pool, 64)
    assert len(data) == 2 * STEPS * GLOBAL_BATCH
    batch = PaddingCollator()([data[STEPS * GLOBAL_BATCH + i] for i in range(4)])
    assert set(batch) == {"input_ids", "attention_mask", "labels", "weight"}
    with pytest.raises(RuntimeError, match="outside of this round"):
        PaddingCollator()([data[STEPS * GLOBAL_BATCH - 1]])


def test_an_index_of_other_row_ids_is_refused(world, tmp_path):
    from dataflex_pipeline.training.positions import training_positions

    model, pool, _ = world
    plan = make_plan(tmp_path, 1, make_config(model), pool)
    ids = plan.index.column("row_id").to_pylist()
    changed = plan.index.set_column(
        plan.index.schema.names.index("row_id"), "row_id", pa.array([*ids[:5], "0" * 32, *ids[6:]])
    )
    other = make_plan(tmp_path, 1, make_config(model), pool, index=changed)
    with pytest.raises(
        CorruptError,
        match=r"another one in the pool.(.|\n)*selection.parquet, its index.parquet, and _row_ids.bin",
    ):
        training_positions(other, pool, 64)
