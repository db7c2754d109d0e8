"""Training rounds: one run over all of them, weights that are felt, nothing lost to a kill."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_training import GLOBAL_BATCH, STEPS, make_config, make_index, make_model, make_plan, make_pool

from dataflex_pipeline.api import Silent
from dataflex_pipeline.errors import ConfigError, CorruptError, DataError, RunError, StaleError, UserError
from dataflex_pipeline.store.atomic import read_json, write_json
from dataflex_pipeline.store.parts import PartedTable
from dataflex_pipeline.training import MARKER, read_marker, train_round, verify_checkpoint

ROUNDS = 3


class Listener(Silent):
    """Keeps what was said."""

    def __init__(self):
        self.lines: list[str] = []

    def say(self, line):
        self.lines.append(line)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model, a pool and a target, made once."""
    root = tmp_path_factory.mktemp("world")
    model = make_model(root / "model")
    return model, make_pool(root / "pool"), make_pool(root / "target", rows=13, seed=2, group=True)


def train(run, numbers, config, pool, target=None, progress=None, **plan):
    """Train some rounds and return the last result."""
    result = None
    for number in numbers:
        result = train_round(
            config, make_plan(run, number, config, pool, **plan), pool, target, progress or Silent()
        )
    return result


def states(checkpoint: Path):
    """Everything that the next step depends on, as comparable values."""
    import torch
    from safetensors.torch import load_file
    from transformers.trainer_pt_utils import safe_globals

    weights = {}
    for path in sorted(checkpoint.glob("*model*.safetensors")):
        weights |= load_file(path)
    with safe_globals():
        rng = torch.load(checkpoint / "rng_state.pth", weights_only=True)
    return {
        "weights": weights,
        "optimizer": torch.load(checkpoint / "optimizer.pt", weights_only=True),
        "scheduler": torch.load(checkpoint / "scheduler.pt", weights_only=True),
        "rng": rng,
    }


def assert_same(a, b, where="state"):
    """Compare nested values bit for bit."""
    import torch

    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for number, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{number}]")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, np.ndarray):
        assert np.array_equal(a, b), where
    else:
        assert a == b, where


def joined_index(pool: PartedTable, rounds: int):
    """The indices of several rounds as one round's."""
    import pyarrow as pa

    tables = [make_index(number, STEPS, pool.n_rows) for number in range(rounds)]
    whole = pa.concat_tables(tables)
    return whole.set_column(0, whole.schema.field(0), pa.array(np.arange(len(whole))))


def log_of(run: Path, number: int):
    return [
        json.loads(x) for x in (run / f"round-{number:02d}" / "training_log.jsonl").read_text().splitlines()
    ]


# --- one run ---


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


# --- killed and continued ---

KILLED = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from tiny_training import make_config, make_plan
from dataflex_pipeline.api import Silent
from dataflex_pipeline.store.parts import PartedTable
from dataflex_pipeline.training import train_round

class Killer(Silent):
    left = int(sys.argv[5])
    def advance(self, n):
        Killer.left -= n
        if Killer.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

config = make_config(Path(sys.argv[2]), lora_dropout=0.2, save_steps=2)
pool = PartedTable.open(Path(sys.argv[3]))
run = Path(sys.argv[4])
train_round(config, make_plan(run, 1, config, pool, steps=5), pool, None, Killer())
"""


def test_sigkill_in_the_middle_then_the_same_call_is_identical(world, tmp_path):
    model, pool, _ = world
    config = make_config(model, lora_dropout=0.2, save_steps=2)
    train(tmp_path / "calm", range(2), config, pool, steps=5)
    shutil.copytree(tmp_path / "calm" / "round-00", tmp_path / "killed" / "round-00")

    run = tmp_path / "killed"
    arguments = [str(Path(__file__).parent), str(model), str(pool.folder), str(run), "4"]
    child = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True, check=False)
    assert child.returncode == -signal.SIGKILL, child.stderr.decode()[-2000:]
    work = run / "round-01" / "training"
    assert not (run / "round-01" / "checkpoint").exists()
    assert (work / "checkpoint-8" / MARKER).is_file()
    (work / "checkpoint-9").mkdir()
    (work / "checkpoint-9" / "adapter_model.safetensors").write_bytes(b"cut off")

    heard = Listener()
    again = train(run, [1], config, pool, progress=heard, steps=5)
    assert any("goes on from step 8" in line for line in heard.lines)
    assert_same(states(tmp_path / "calm/round-01/checkpoint"), states(run / "round-01/checkpoint"))
    assert log_of(run, 1) == log_of(tmp_path / "calm", 1)
    calm = read_marker(tmp_path / "calm/round-01/checkpoint").result
    assert {**again.plain(), "seconds": 0} == {**calm, "seconds": 0}
    assert not work.exists()


def stop_at_replace(monkeypatch, number: int):
    """Let the n-th rename of a durable write fail as if the process had died just before it."""
    real, count = os.replace, [0]

    def replace_or_die(source, target):
        count[0] += 1
        if count[0] == number:
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", replace_or_die)
    return count


def test_dying_before_any_rename_then_the_same_call_is_identical(world, tmp_path, monkeypatch):
    model, pool, target = world
    config = make_config(
        model, save_steps=2, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True, plot_loss=True
    )
    train(tmp_path / "calm", [0], config, pool, target)
    with monkeypatch.context() as patch:
        count = stop_at_replace(patch, -1)
        train(tmp_path / "counted", [0], config, pool, target)
    assert count[0] >= 6
    for number in range(1, count[0] + 1):
        run = tmp_path / str(number)
        with monkeypatch.context() as patch:
            stop_at_replace(patch, number)
            with pytest.raises(KeyboardInterrupt):
                train(run, [0], config, pool, target)
        assert not (run / "round-00/checkpoint").exists()
        train(run, [0], config, pool, target)
        assert_same(states(tmp_path / "calm/round-00/checkpoint"), states(run / "round-00/checkpoint"))
        assert (run / "best/adapter_model.safetensors").read_bytes() == (
            tmp_path / "calm/best/adapter_model.safetensors"
        ).read_bytes()
        assert sorted(p.name for p in run.iterdir()) == ["best", "round-00", "training_loss.png"]
    print(f"{count[0]} kill points in a round of {STEPS} steps")


def test_leftovers_of_other_settings_are_removed_and_said(world, tmp_path, monkeypatch):
    model, pool, _ = world
    config = make_config(model, save_steps=1)
    with monkeypatch.context() as patch:
        stop_at_replace(patch, 2)  # the marker of the second step
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, [0], config, pool)
    assert (tmp_path / "round-00/training/checkpoint-1" / MARKER).is_file()
    other = config.model_copy(update={"learning_rate": 1e-3})
    heard = Listener()
    assert train(tmp_path, [0], other, pool, progress=heard).mean_learning_rate < 1e-3
    assert any("was made from other settings" in line for line in heard.lines)
    assert not any("goes on" in line for line in heard.lines)


def test_a_best_checkpoint_of_an_abandoned_course_is_not_taken_for_the_best(world, tmp_path):
    model, pool, target = world
    config = make_config(model, eval_strategy="epoch", load_best_model_at_end=True)
    train(tmp_path, [0], config, pool, target)
    edit = tmp_path / "best" / MARKER
    write_json(edit, read_json(edit) | {"step": 99})
    heard = Listener()
    result = train(tmp_path, [1], config, pool, target, heard)
    assert any("best/ is not the best checkpoint before this round (step 3)" in x for x in heard.lines)
    assert result.best["round"] == 1
    assert read_marker(tmp_path / "best").step == 2 * STEPS


def test_finished_round_is_not_trained_again(world, tmp_path):
    model, pool, _ = world
    config = make_config(model)
    first = train(tmp_path, [0], config, pool)
    before = (tmp_path / "round-00/checkpoint/optimizer.pt").stat().st_mtime_ns
    started = time.monotonic()
    assert train(tmp_path, [0], config, pool) == first
    assert time.monotonic() - started < 0.5
    assert (tmp_path / "round-00/checkpoint/optimizer.pt").stat().st_mtime_ns == before


# --- what must not be continued ---


@pytest.fixture(scope="module")
def warm(world, tmp_path_factory):
    """A run with its warm-up done."""
    model, pool, _ = world
    run = tmp_path_factory.mktemp("warm")
    config = make_config(model)
    train(run, [0], config, pool)
    return run, config, pool


@pytest.fixture
def run(warm, tmp_path):
    """A copy of that run, to be damaged."""
    shutil.copytree(warm[0], tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("damage", "kind", "wording"),
    [
        (lambda c: (c / "optimizer.pt").unlink(), CorruptError, "optimizer.pt.*missing[^.]*.\n.*start anew"),
        (lambda c: (c / "scheduler.pt").unlink(), CorruptError, "scheduler.pt.*missing[^.]*.\n.*start anew"),
        (
            lambda c: (c / "rng_state.pth").unlink(),
            CorruptError,
            "rng_state.pth.*missing[^.]*.\nWithout it dropout",
        ),
        (lambda c: (c / MARKER).unlink(), CorruptError, "has no COMPLETE.json"),
        (lambda c: (c / MARKER).write_text('{"a": 1}'), CorruptError, "not the marker of a checkpoint"),
        (lambda c: (c / MARKER).write_text('{"a": '), CorruptError, "not valid JSON"),
        (
            lambda c: (c / "adapter_model.safetensors").write_bytes(
                (c / "adapter_model.safetensors").read_bytes()[:-1] + b"\x55"
            ),
            CorruptError,
            "adapter_model.safetensors: its content is not what was written",
        ),
        (
            lambda c: (c / "optimizer.pt").write_bytes(b"x"),
            CorruptError,
            "optimizer.pt: it has 1 bytes where",
        ),
        (lambda c: (c / "pytorch_model.bin").write_bytes(b"x"), CorruptError, "put there after"),
    ],
)
def test_damaged_previous_checkpoint_is_refused(run, warm, damage, kind, wording):
    _, config, pool = warm
    damage(run / "round-00/checkpoint")
    with pytest.raises(kind, match=wording):
        train(run, [1], config, pool)
    assert not (run / "round-01").exists()


def edit_marker(run, **changed):
    path = run / "round-00/checkpoint" / MARKER
    write_json(path, read_json(path) | changed)


def test_previous_checkpoint_of_another_step_or_shape_is_refused(run, warm):
    _, config, pool = warm
    plan = make_plan(run, 1, config, pool)
    wrong = replace(plan, first_step=STEPS + 1, last_step=2 * STEPS + 1)
    with pytest.raises(RunError, match=r"at step 3, and round 1 starts at step 4"):
        train_round(config, wrong, pool, None, Silent())
    with pytest.raises(StaleError, match="horizon: 12 -> 15"):
        train_round(config, replace(plan, horizon=15), pool, None, Silent())
    edit_marker(run, finished=False)
    with pytest.raises(RunError, match="continues the optimizer"):
        train_round(config, plan, pool, None, Silent())


def test_other_settings_for_a_finished_checkpoint_are_told(run, warm):
    _, config, pool = warm
    changed = config.model_copy(update={"learning_rate": 1e-3})
    with pytest.raises(StaleError, match=r"learning_rate: 0.005 -> 0.001"):
        train(run, [0], changed, pool)
    plan = make_plan(run, 0, config, pool, index=make_index(9, STEPS, pool.n_rows))
    with pytest.raises(StaleError, match="index: "):
        train_round(config, plan, pool, None, Silent())


def test_an_index_that_does_not_fit_is_refused(warm, tmp_path):
    _, config, pool = warm
    good = make_index(0, STEPS, pool.n_rows)

    def attempt(index):
        train(tmp_path / "bad", [0], config, pool, index=index)

    with pytest.raises(CorruptError, match="11 positions where steps x global_batch = 12"):
        attempt(good.slice(0, 11))
    rows = good.column("row").to_numpy().copy()
    rows[3] = pool.n_rows
    with pytest.raises(CorruptError, match="row 40, and the pool has 40 rows"):
        attempt(good.set_column(1, good.schema.field(1), [rows]))
    rows[3] = (good["row"][3].as_py() + 1) % pool.n_rows
    with pytest.raises(CorruptError, match="row_id is another one"):
        attempt(good.set_column(1, good.schema.field(1), [rows]))
    weights = np.ones(12, np.float32)
    weights[0] = np.nan
    with pytest.raises(CorruptError, match="negative or not finite"):
        attempt(make_index(0, STEPS, pool.n_rows, weights))
    assert not (tmp_path / "bad/round-00/checkpoint").exists()


def test_a_pool_of_another_tokenizer_is_refused(world, tmp_path):
    _, pool, _ = world
    import torch
    from transformers import AutoModelForCausalLM

    small = AutoModelForCausalLM.from_pretrained(world[0])
    small.resize_token_embeddings(32)
    folder = shutil.copytree(world[0], tmp_path / "small")
    with torch.no_grad():
        small.save_pretrained(folder)
    with pytest.raises(DataError, match="The model knows 32 token ids"):
        train(tmp_path / "run", [0], make_config(folder), pool)


def test_loss_that_is_not_finite_stops_before_anything_is_saved(world, tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    model, pool, _ = world
    folder = shutil.copytree(model, tmp_path / "broken")
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = torch.full_like(weights["model.norm.weight"], float("nan"))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RunError, match=r"training loss of step 1 is nan.*\(pool rows \d+"):
        train(tmp_path / "run", [0], make_config(folder), pool)
    assert not (tmp_path / "run/round-00/checkpoint").exists()


def test_a_full_disk_is_one_clear_error_and_nothing_half_visible(world, tmp_path):
    import resource

    model, pool, _ = world
    config = make_config(model)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(UserError, match=r"could not be written(.|\n)*MiB are free(.|\n)*Make room"):
            train(tmp_path, [0], config, pool)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "round-00/checkpoint").exists()
    assert not list((tmp_path / "round-00/training").glob("checkpoint-*"))
    assert train(tmp_path, [0], config, pool).steps == STEPS


# --- what a checkpoint is ---


def test_checkpoint_holds_no_training_arguments_and_a_whole_marker(warm):
    checkpoint = warm[0] / "round-00/checkpoint"
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


# --- evaluation on the target ---


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


def test_settings_that_cannot_work_are_refused_before_training(world, tmp_path):
    model, pool, _ = world

    def attempt(**settings):
        train(tmp_path, [0], make_config(model, **settings), pool)

    with pytest.raises(ConfigError, match=r"report_to: 'wandbb' is not known. Did you mean 'wandb'"):
        attempt(report_to="wandbb")
    with pytest.raises(ConfigError, match=r"mlflow is not installed(.|\n)*pip install mlflow"):
        attempt(report_to="mlflow")
    with pytest.raises(ConfigError, match="eval_strategy: epoch was set, and there is no target"):
        attempt(eval_strategy="epoch")
    with pytest.raises(ConfigError, match=r"metric_for_best_model: eval_los is not known. Did you mean"):
        attempt(metric_for_best_model="eval_los")
    with pytest.raises(ConfigError, match=r"lr_scheduler_type: cosin is not known. Did you mean 'cosine'"):
        attempt(lr_scheduler_type="cosin")
    with pytest.raises(ConfigError, match="There is no such file"):
        attempt(deepspeed="nowhere.json")
    with pytest.raises(ConfigError, match="device: cuda:7"):
        attempt(device="cuda:7")
    assert not any(tmp_path.iterdir())


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


def test_positions_of_earlier_rounds_cannot_be_loaded(world, tmp_path):
    from dataflex_pipeline.training.positions import PaddingCollator, training_positions

    model, pool, _ = world
    config = make_config(model)
    data = training_positions(make_plan(tmp_path, 1, config, pool), pool, 64)
    assert len(data) == 2 * STEPS * GLOBAL_BATCH
    batch = PaddingCollator(0)([data[STEPS * GLOBAL_BATCH + i] for i in range(4)])
    assert set(batch) == {"input_ids", "attention_mask", "labels", "weight"}
    with pytest.raises(RuntimeError, match="outside of this round"):
        PaddingCollator(0)([data[STEPS * GLOBAL_BATCH - 1]])
