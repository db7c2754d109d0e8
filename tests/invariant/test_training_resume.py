"""Training that was killed goes on and ends as if nothing had happened."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_training import (
    STEPS,
    Listener,
    assert_same,
    log_of,
    make_config,
    states,
    train,
)

from dataflex_pipeline.errors import RunError
from dataflex_pipeline.store.atomic import read_json, write_json
from dataflex_pipeline.store.fingerprint import file_digest
from dataflex_pipeline.training import MARKER, read_marker, verify_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

ROUNDS = 3


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
    arguments = [str(Path(__file__).parents[1] / "support"), str(model), str(pool.folder), str(run), "4"]
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
    # The library's own means begin anew with a process; what is saved are the lines of our log.
    logged = read_json(run / "round-01/checkpoint/trainer_state.json")
    assert logged == read_json(tmp_path / "calm/round-01/checkpoint/trainer_state.json")
    assert logged["log_history"] == log_of(run, 0) + log_of(run, 1)
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


@pytest.mark.slow
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
    write_json(edit, read_json(edit) | {"step": 99, "own_digest": ""})
    heard = Listener()
    result = train(tmp_path, [1], config, pool, target, heard)
    assert any("best/ is not the best checkpoint before this round (step 3)" in x for x in heard.lines)
    assert result.best["round"] == 1
    assert read_marker(tmp_path / "best").step == 2 * STEPS


def evaluations(monkeypatch, losses):
    """Let the evaluation after a step give that loss; None: the process dies there."""
    import torch

    from dataflex_pipeline.training.trainer import WeightedTrainer

    def sums(trainer):
        loss = losses[trainer.state.global_step]
        if loss is None:
            raise KeyboardInterrupt
        return torch.tensor([loss, 0.0, 1.0], dtype=torch.float64)

    monkeypatch.setattr(WeightedTrainer, "_sum_over_rows", sums)


@pytest.mark.parametrize("keep", [False, True])
def test_the_best_that_a_checkpoint_records_outlives_a_better_one_that_is_lost(
    world, tmp_path, monkeypatch, keep
):
    model, pool, target = world
    config = make_config(
        model,
        save_steps=2,
        keep_checkpoints=keep,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
    )
    with monkeypatch.context() as patch:
        evaluations(patch, {1: 3.0, 2: 4.0, 3: 2.0, 4: None})
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, [0], config, pool, target, steps=5)
    work = tmp_path / "round-00" / "training"
    assert sorted(path.name for path in work.glob("best-*")) == ["best-1", "best-3"]
    recorded = (work / "best-1" / "adapter_model.safetensors").read_bytes()
    with monkeypatch.context() as patch:
        evaluations(patch, {3: 5.0, 4: 5.0, 5: 5.0})  # as on a device that is not deterministic
        result = train(tmp_path, [0], config, pool, target, steps=5)
    assert result.best["step"] == verify_checkpoint(tmp_path / "best").step == 1
    assert (tmp_path / "best" / "adapter_model.safetensors").read_bytes() == recorded


def test_bests_that_no_checkpoint_records_do_not_pile_up(world, tmp_path, monkeypatch):
    model, pool, target = world
    config = make_config(
        model, save_steps=2, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True
    )
    evaluations(monkeypatch, {1: 5.0, 2: 4.0, 3: 3.0, 4: 2.0, 5: None})
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, [0], config, pool, target, steps=5)
    work = tmp_path / "round-00" / "training"
    assert sorted(path.name for path in work.glob("*-*")) == ["best-4", "checkpoint-4"]


@pytest.mark.parametrize("other", [False, True])
def test_a_best_checkpoint_that_is_lost_is_an_error(world, tmp_path, monkeypatch, other):
    model, pool, target = world
    config = make_config(model, eval_strategy="epoch", load_best_model_at_end=True)
    if other:  # the best/ of another training, at the same step
        train(tmp_path, [0], config.model_copy(update={"learning_rate": 1e-3}), pool, target)
        shutil.rmtree(tmp_path / "round-00")
    with monkeypatch.context() as patch:
        patch.setattr("dataflex_pipeline.training.rounds.commit", lambda *_: (_ for _ in ()).throw(OSError))
        with pytest.raises(OSError):
            train(tmp_path, [0], config, pool, target)
    work = tmp_path / "round-00" / "training"
    shutil.rmtree(work / f"best-{STEPS}")
    with pytest.raises(RunError, match=rf"step {STEPS}\) is neither in(.|\n)*Remove .*training and run"):
        train(tmp_path, [0], config, pool, target)
    shutil.rmtree(work)  # as the message says
    train(tmp_path, [0], config, pool, target)
    assert read_marker(tmp_path / "best").ingredients["learning_rate"] == config.learning_rate


def test_finished_round_is_not_trained_again(world, tmp_path):
    model, pool, _ = world
    config = make_config(model)
    first = train(tmp_path, [0], config, pool)
    before = (tmp_path / "round-00/checkpoint/optimizer.pt").stat().st_mtime_ns
    started = time.monotonic()
    assert train(tmp_path, [0], config, pool) == first
    assert time.monotonic() - started < 0.5
    assert (tmp_path / "round-00/checkpoint/optimizer.pt").stat().st_mtime_ns == before


def test_optimizer_states_of_other_parameters_are_refused(world, tmp_path):
    """They are loaded by number: under another order each would go to another parameter."""
    import torch

    model, pool, _ = world
    config = make_config(model)
    train(tmp_path, [0], config, pool)
    checkpoint = tmp_path / "round-00" / "checkpoint"
    saved = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    names = saved["param_groups"][0]["param_names"]
    names[0], names[2] = names[2], names[0]
    torch.save(saved, checkpoint / "optimizer.pt")
    marker = read_json(checkpoint / MARKER)
    path = checkpoint / "optimizer.pt"
    marker["files"]["optimizer.pt"] = {"bytes": path.stat().st_size, "digest": file_digest(path)}
    write_json(checkpoint / MARKER, marker | {"own_digest": ""})

    with pytest.raises(RunError) as refused:
        train(tmp_path, [1], config, pool)
    what, why, _ = str(refused.value).split("\n")
    assert names[0] in what
    assert names[2] in what
    assert why == "They are loaded by number, so each would go to another parameter without a word."
    assert not (tmp_path / "round-01" / "checkpoint").exists()
