"""A training step that will not fit is refused before it is taken; auto recomputes activations first."""

from __future__ import annotations

import numpy as np
import pytest
from cli_runs import data, dataflex
from safetensors.numpy import load_file

from dataflex_pipeline.training import first_step

SETTINGS = ("warmup_step=2", "update_step=1", "update_times=1", "lora_dropout=0.2", "eval_strategy=no")


@pytest.fixture
def warmed_up(tiny_demo, tmp_path, monkeypatch):
    """Run warm-ups with so much memory free; return what steps were found to take, too."""
    monkeypatch.chdir(tmp_path)
    seen: list[float] = []
    whole = first_step._step_bytes

    def noting(*given):
        seen.append(whole(*given))
        return seen[-1]

    monkeypatch.setattr(first_step, "_step_bytes", noting)

    def run(name, free, *more):
        monkeypatch.setattr(first_step, "free_bytes", lambda device: free)
        ran = dataflex("warmup", *data(tiny_demo), *SETTINGS, "--run", name, *more)
        path = tmp_path / "runs" / name / "round-00" / "checkpoint" / "adapter_model.safetensors"
        return ran, load_file(path) if path.exists() else None, seen

    return run


def farthest(one, other):
    return max(float(np.abs(one[name] - other[name]).max()) for name in one)


def test_a_step_is_measured_and_changes_nothing(warmed_up):
    """Dropout draws the same numbers after it."""
    _, plain, _ = warmed_up("plain", None)
    ran, measured, seen = warmed_up("measured", 1 << 50)
    assert len(seen) == 1
    assert farthest(plain, measured) == 0
    assert "gradient_checkpointing" not in ran.out


def test_where_it_does_not_fit_activations_are_recomputed_or_it_is_refused(warmed_up):
    _, plain, seen = warmed_up("plain", 1 << 50)
    warmed_up("closely", int(4 * seen[0]))
    needed = seen[-1]
    ran, recomputed, _ = warmed_up("recomputed", int(needed / 0.6))
    assert "gradient_checkpointing: auto is on: a step takes about" in ran.out
    assert seen[-1] < needed
    assert farthest(plain, recomputed) < 1e-5

    ran, nothing, _ = warmed_up("refused", int(needed / 2), "gradient_checkpointing=false")
    assert (ran.code, nothing) == (2, None)
    assert "A training step would take about" in ran.err
    assert "(per_device_train_batch_size)" in ran.err
    assert "Set gradient_checkpointing: true, or lower per_device_train_batch_size and raise" in ran.err
    assert "Traceback" not in ran.err


def test_an_evaluation_that_does_not_fit_is_refused(warmed_up, monkeypatch):
    monkeypatch.setattr(first_step, "_step_bytes", lambda *given: 0.0)
    ran, nothing, _ = warmed_up("r", 1 << 20, "eval_strategy=epoch", "per_device_eval_batch_size=64")
    assert (ran.code, nothing) == (2, None)
    assert "An evaluation would take about" in ran.err
    assert "per_device_eval_batch_size" in ran.err
