"""A training step that will not fit is taken in smaller pieces, with the same result, or refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_training
from cli_runs import data, dataflex
from safetensors.numpy import load_file

from dataflex_pipeline.errors import UserError
from dataflex_pipeline.models import memory
from dataflex_pipeline.training import conductor, first_step
from dataflex_pipeline.training.marker import read_marker

SETTINGS = ("warmup_step=2", "update_step=1", "update_times=1", "lora_dropout=0.2", "eval_strategy=no")


@pytest.fixture
def warmed_up(tiny_demo, tmp_path, monkeypatch):
    """Run warm-ups with so much memory free; return what steps were found to take, too."""
    monkeypatch.chdir(tmp_path)
    seen: list[float] = []
    whole = first_step._step_needs

    def noting(trainer, batch, free):
        needs = whole(trainer, batch, free)
        seen.append(needs.of(batch.rows))
        return needs

    monkeypatch.setattr(first_step, "_step_needs", noting)

    def run(name, free, *more):
        monkeypatch.setattr(first_step, "free_bytes", lambda device: free)
        ran = dataflex("warmup", *data(tiny_demo), *SETTINGS, "--run", name, *more)
        path = tmp_path / "runs" / name / "round-00" / "checkpoint" / "adapter_model.safetensors"
        return ran, load_file(path) if path.exists() else None, seen

    return run


def farthest_tensors(one, other):
    return farthest(
        {name: value.numpy() for name, value in one.items()},
        {name: value.numpy() for name, value in other.items()},
    )


def farthest(one, other):
    return max(float(np.abs(one[name] - other[name]).max()) for name in one)


def test_a_step_is_measured_and_changes_nothing(warmed_up):
    """Dropout draws the same numbers after it."""
    _, plain, _ = warmed_up("plain", None)
    ran, measured, seen = warmed_up("measured", 1 << 50)
    assert len(seen) == 1
    assert farthest(plain, measured) == 0
    assert "gradient_checkpointing" not in ran.out


def test_where_it_does_not_fit_activations_are_recomputed_or_it_is_refused(warmed_up, monkeypatch):
    _, plain, seen = warmed_up("plain", 1 << 50)
    warmed_up("closely", int(4 * seen[0]))
    needed = seen[-1]
    with monkeypatch.context() as patch:
        patch.setattr(first_step, "ROWS_SHARE", 1.0)  # as many rows at a time, so that dropout is the same
        ran, recomputed, _ = warmed_up("recomputed", int(needed / 0.52))
    assert "gradient_checkpointing: auto is on: a step takes about" in ran.out
    assert seen[-1] < needed
    assert farthest(plain, recomputed) < 1e-5

    ran, nothing, _ = warmed_up("refused", int(needed / 32), "gradient_checkpointing=false")
    assert (ran.code, nothing) == (2, None)
    assert "A training step would take about" in ran.err
    assert "A forward pass takes 1 row of up to" in ran.err
    assert "Set gradient_checkpointing: true, or lower cutoff_len (in a new run)." in ran.err
    assert "Traceback" not in ran.err


def test_an_evaluation_takes_fewer_rows_at_a_time_or_is_refused(warmed_up, monkeypatch):
    monkeypatch.setattr(first_step, "_step_needs", lambda *given: first_step.Needs(0.0, 0.0))
    more = ("eval_strategy=epoch", "per_device_eval_batch_size=64")
    metrics = ("round-00", "training_log.jsonl")
    whole, _, _ = warmed_up("whole", 1 << 40, *more)
    ran, trained, _ = warmed_up("fewer", 10 << 20, *more)
    assert trained is not None
    assert "per_device_eval_batch_size 64 -> " in ran.out
    logs = [Path("runs", name, *metrics).read_text().splitlines()[-1] for name in ("whole", "fewer")]
    losses = [json.loads(line)["eval_loss"] for line in logs]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)

    ran, nothing, _ = warmed_up("refused", 1 << 18, *more)
    assert (ran.code, nothing) == (2, None)
    assert "An evaluation would take about" in ran.err
    assert "A forward pass takes 1 row of up to" in ran.err
    assert whole.code == 0


STEPS = 4


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Train a round of the tiny model, 8 rows a step with weights, where so many rows at a time fit."""
    monkeypatch.setattr(tiny_training, "GLOBAL_BATCH", 8)
    model, pool, target = tiny_training.make_world(tmp_path / "world")
    weights = np.random.default_rng(3).uniform(0, 2, STEPS * 8)
    index = tiny_training.make_index(0, STEPS, pool.n_rows, weights)

    def run(name, rows_that_fit, **settings):
        batch = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
        config = tiny_training.make_config(
            model,
            **batch,
            warmup_step=STEPS,
            gradient_checkpointing=False,
            adam_epsilon=1e-3,  # the step of a gradient of nearly 0 is as large as any with a small one
            **settings,
        )
        needs = first_step.Needs(fixed=1000.0, per_row=100.0, held=10.0, undivided=8)
        monkeypatch.setattr(first_step, "_step_needs", lambda *given: needs)
        free = int(needs.of(rows_that_fit) / first_step.ROWS_SHARE) + 1 if rows_that_fit else 1000
        monkeypatch.setattr(first_step, "free_bytes", lambda device: free)
        listener = tiny_training.Listener()
        plan = tiny_training.make_plan(tmp_path / name, 0, config, pool, index, STEPS)
        tiny_training.train_round(config, plan, pool, target, listener)
        return tiny_training.states(plan.checkpoint), listener.lines, plan

    return run


def test_fewer_rows_at_a_time_train_the_same(train):
    whole, said, _ = train("whole", 8)
    assert not any("per_device_train_batch_size" in line for line in said)
    for rows in (4, 2, 1):
        fewer, said, plan = train(f"fewer-{rows}", rows)
        (line,) = [line for line in said if "per_device_train_batch_size" in line]
        assert (
            f"per_device_train_batch_size 8 -> {rows}, gradient_accumulation_steps 1 -> {8 // rows}" in line
        )
        assert "A step takes about" in line
        assert f"with 8 rows at a time and 0.0 with {rows}" in line
        assert farthest_tensors(whole["weights"], fewer["weights"]) < 1e-6
        assert [entry["step"] for entry in tiny_training.log_of(plan.run_folder, 0)] == [1, 2, 3, 4]
        assert read_marker(plan.checkpoint).plan["global_batch"] == 8
        assert line in read_marker(plan.checkpoint).result["notices"]
    assert farthest_tensors(whole["weights"], train("other", 8, seed=1)[0]["weights"]) > 1e-3


def test_a_row_that_does_not_fit_is_refused_and_nothing_is_written(train, tmp_path):
    with pytest.raises(UserError, match="A training step would take about") as caught:
        train("refused", 0)
    assert "A forward pass takes 1 row of up to" in str(caught.value)
    assert not [path for path in (tmp_path / "refused").rglob("*") if path.is_file()]


class Killed(Exception):
    """What ends a training in this test."""


def test_a_training_goes_on_with_the_rows_at_a_time_that_it_began_with(train, monkeypatch):
    """Bit for bit where memory allows; with fewer still where it has become less."""
    whole, _, _ = train("whole", 8)
    straight, _, _ = train("straight", 4)

    def stop_after(name):
        with monkeypatch.context() as patch:
            report = conductor.Conductor._report

            def stop(self, loss):
                report(self, loss)
                if self.step == 3:
                    raise Killed

            patch.setattr(conductor.Conductor, "_report", stop)
            with pytest.raises(Killed):
                train(name, 4, save_steps=2)

    stop_after("roomy")
    resumed, said, plan = train("roomy", 8, save_steps=2)
    assert any("This round began so: per_device_train_batch_size 8 -> 4" in line for line in said)
    assert any("goes on from step 2" in line for line in said)
    tiny_training.assert_same(straight["weights"], resumed["weights"])
    assert not plan.work.exists()

    stop_after("tight")
    resumed, said, _ = train("tight", 1, save_steps=2)
    assert any(
        "per_device_train_batch_size 8 -> 1, gradient_accumulation_steps 1 -> 8" in line for line in said
    )
    assert farthest_tensors(whole["weights"], resumed["weights"]) < 1e-6


def test_the_largest_part_that_fits_is_taken():
    needs = first_step.Needs(fixed=10.0, per_row=1.0, held=5.0, undivided=12)
    assert [needs.most_rows(12, room) for room in (22, 21.9, 21, 19, 18, 17, 0)] == [12, 6, 6, 4, 3, 2, 1]
    assert needs.of(12) == 22


def test_low_memory_is_measured_on_a_real_step(warmed_up):
    """With the real measurement: 8 rows need more than there is, fewer do not."""
    even = ("lora_dropout=0", "adam_epsilon=1e-3")
    _, whole, seen = warmed_up("plain", 1 << 50, *even)
    warmed_up("closely", int(4 * seen[0]), *even)
    ran, fewer, _ = warmed_up("fewer", int(seen[-1] / 0.7), *even, "gradient_checkpointing=false")
    assert "per_device_train_batch_size 8 -> 4, gradient_accumulation_steps 1 -> 2" in ran.out
    assert "but for dropout" not in ran.out
    assert farthest(whole, fewer) < 1e-6


def test_it_is_foreseen_by_doctor_and_estimate(tiny_demo, tmp_path, monkeypatch):
    """The division that a warm-up then makes, and the size of scoring batches that its table is made with."""
    monkeypatch.chdir(tmp_path)
    needs = first_step.Needs(fixed=1000.0, per_row=100.0, held=10.0, undivided=8)
    monkeypatch.setattr(first_step, "_step_needs", lambda *given: needs)
    free = int(needs.of(4) / first_step.ROWS_SHARE) + 1
    monkeypatch.setattr(first_step, "free_bytes", lambda device: free)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 3_000_000)
    given = (*data(tiny_demo), *SETTINGS, "gradient_checkpointing=false", "--run", "r", "--method", "loss")
    division = "per_device_train_batch_size 8 -> 4, gradient_accumulation_steps 1 -> 2"

    found = json.loads(dataflex("doctor", *given, "--json").out)["findings"]
    (line,) = [each["found"] for each in found if each["check"] == "training memory"]
    assert line.endswith(f"; {division}")
    assert "(4 rows of up to " in line
    estimated = json.loads(dataflex("estimate", *given, "--json").out)
    step = estimated["memory"]["step"]
    assert step["per_device_train_batch_size"] == [8, 4]
    assert step["gradient_accumulation_steps"] == [1, 2]
    assert step["step_bytes"] == 1000 + 4 * 100 + 10
    assert step["free_bytes"] == free
    assert not (tmp_path / "runs").exists()

    assert division in dataflex("round", "1", *given).out
    (table,) = (tmp_path / "runs" / "r" / "features").glob("losses-pool-*")
    tokens = json.loads((table / "_manifest.json").read_text())["summary"]["batch_tokens"]
    assert tokens < 16_384
    assert estimated["memory"]["score_batch_tokens"] == {"losses": tokens}


def test_doctor_says_what_gradients_take_where_a_method_takes_some(tiny_demo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = (*data(tiny_demo), "warmup_step=0", "less.gradient_type=sgd", "update_step=0", "num_samples=8")
    found = json.loads(dataflex("doctor", *given, "--method", "less", "--json").out)["findings"]
    kinds = {each["check"]: each["found"] for each in found}
    assert kinds["gradient memory"].startswith("score_batch_tokens: auto is ")
    assert "training memory" not in kinds  # nothing is trained


def test_what_is_missing_is_said_before_the_data_is_read(tiny_demo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lone = tmp_path / "lone"
    lone.mkdir()
    for path in tiny_demo.model.iterdir():
        if path.suffix != ".safetensors":
            (lone / path.name).write_bytes(path.read_bytes())
    given = (*data(tiny_demo)[:2], f"model_name_or_path={lone}")
    ran = dataflex("estimate", *given)
    assert ran.code == 2
    assert "no *.safetensors file" in ran.err
    assert "By config.json there are 213,312 parameters" in ran.err
    assert "reading" not in ran.out + ran.err
    found = json.loads(dataflex("doctor", *given, "--json").out)["findings"]
    (line,) = [each for each in found if each["check"] == "model"]
    assert line["state"] == "problem"
    assert "By config.json" in line["found"]
