"""Rounds under DeepSpeed: what they train, Adam's states gathered by name, and scoring from there."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from cli_runs import dataflex
from crash.launches import environment, run
from test_scale import RUN, farthest, settings, weights

from dataflex_pipeline.errors import CorruptError, RunError
from dataflex_pipeline.models.optimizer_states import AdamState, adam_states, write_adam_states
from dataflex_pipeline.training.sharded import Sharding, check_sharding

GUIDES = Path(__file__).resolve().parents[1] / "guides"
CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "deepspeed"
needs_deepspeed = pytest.mark.skipif(
    not all(shutil.which(name, path=environment()["PATH"]) for name in ("g++", "ninja")),
    reason="DeepSpeed builds its communication on the spot: a C++ compiler or ninja is missing",
)


def state(seed: int, shape: tuple[int, ...]) -> AdamState:
    stream = torch.Generator().manual_seed(seed)
    first, second = (torch.rand(shape, generator=stream) for _ in range(2))
    return AdamState(first, second, 7, 3e-4, (0.9, 0.95), 1e-7, 0.01)


def test_gathered_states_are_read_as_they_were_written(tmp_path, monkeypatch):
    monkeypatch.setattr("dataflex_pipeline.models.optimizer_states.PIECE_BYTES", 90)
    wanted = {f"layer.{i}.weight": state(i, (3, 4)) for i in range(3)} | {"bias": state(9, (2,))}
    write_adam_states(tmp_path, wanted.items())
    assert len(list(tmp_path.glob("adam_states-*.safetensors"))) == 4  # 96 bytes each, and what is left
    found = adam_states(tmp_path)
    assert found.keys() == wanted.keys()
    for name, expected in wanted.items():
        assert torch.equal(found[name].exp_avg, expected.exp_avg)
        assert torch.equal(found[name].exp_avg_sq, expected.exp_avg_sq)
        for number in ("step", "learning_rate", "betas", "eps", "weight_decay"):
            assert getattr(found[name], number) == getattr(expected, number)


@pytest.mark.parametrize("content", [b"", b"rubbish" * 9])
def test_a_damaged_file_of_states_is_told(tmp_path, content):
    (tmp_path / "adam_states-00000.safetensors").write_bytes(content)
    with pytest.raises(CorruptError, match="adam_states-00000"):
        adam_states(tmp_path)


STAGE_3_TWICE = """
import gc, weakref
import deepspeed, torch
from dataflex_pipeline.training.sharded import release

def trained():
    model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Linear(4, 1))
    settings = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 3}}
    settings |= {"zero_allow_untested_optimizer": True}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    engine.backward(engine(torch.randn(4, 8)).square().mean())
    engine.step()
    return engine, weakref.ref(model), weakref.ref(next(model.parameters()))

for _ in range(2):
    engine, model, parameter = trained()
    release(engine)
    del engine
    gc.collect()
    assert model() is None, gc.get_referrers(model())
    assert parameter() is None
"""


def alone(script: str, *args: str) -> None:
    """Run Python in a process of its own, as the only rank of a launch."""
    rank = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    answer = subprocess.run(
        [sys.executable, "-c", script, *args],
        env={**environment(), **rank, "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert answer.returncode == 0, answer.stderr


@pytest.mark.slow
@needs_deepspeed
def test_a_model_trained_under_stage_3_can_be_freed():
    alone(STAGE_3_TWICE)


STAGE_0_IN_BF16 = """
import copy, sys
from pathlib import Path
from types import SimpleNamespace
import deepspeed, torch
from dataflex_pipeline.training.sharded import save_adam_states

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Linear(4, 1))
model[0].bias.requires_grad_(False)
named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
settings = {"train_micro_batch_size_per_gpu": 4, "bf16": {"enabled": True}, "zero_optimization": {"stage": 0}}
optimizer = torch.optim.AdamW(named, lr=1e-3)
engine, wrapped, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
plain, rows = copy.deepcopy(model), torch.randn(4, 8, dtype=torch.bfloat16)
plain(rows).square().mean().backward()
engine.backward(engine(rows).square().mean())
engine.step()
trainer = SimpleNamespace(
    optimizer=SimpleNamespace(optimizer=wrapped, param_groups=wrapped.param_groups),
    model=model,
    state=SimpleNamespace(global_step=1),
    args=SimpleNamespace(should_save=True),
)
folder = Path(sys.argv[1])
save_adam_states(trainer, folder)
gradients = {name: p.grad.float() for name, p in plain.named_parameters() if p.grad is not None}
torch.save(gradients, folder / "grads")
"""


@pytest.mark.slow
@needs_deepspeed
def test_stage_0_in_bf16_gives_the_states_of_the_fp32_copies(tmp_path):
    """As on a GPU: DeepSpeed then steps on copies of the weights. After one step m = (1 - b1) g."""
    alone(STAGE_0_IN_BF16, str(tmp_path))
    gradients, states = torch.load(tmp_path / "grads", weights_only=True), adam_states(tmp_path)
    assert gradients.keys() == states.keys() == {"0.weight", "1.weight", "1.bias"}
    for name, gradient in gradients.items():
        assert states[name].exp_avg.dtype == torch.float32
        torch.testing.assert_close(states[name].exp_avg, 0.1 * gradient, rtol=1e-5, atol=0)
        torch.testing.assert_close(states[name].exp_avg_sq, 0.001 * gradient.square(), rtol=1e-5, atol=0)


PLAIN = ("optimizer.pt", "adapter_model.safetensors")
ZERO_0 = ("latest", "global_step2/mp_rank_00_model_states.pt")
ZERO_2 = (*ZERO_0, *(f"global_step2/zero_pp_rank_{i}_mp_rank_00_optim_states.pt" for i in range(2)))
ZERO_3 = ("latest", *(f"global_step2/bf16_zero_pp_rank_{i}_mp_rank_00_optim_states.pt" for i in range(2)))
ZERO_3 = (*ZERO_3, *(f"global_step2/zero_pp_rank_{i}_mp_rank_00_model_states.pt" for i in range(2)))


def test_the_sharding_is_read_off_the_files():
    assert Sharding.of(PLAIN) is None
    assert Sharding.of(ZERO_0) == Sharding(0, False)
    assert Sharding.of(ZERO_2) == Sharding(2, False)
    assert Sharding.of(ZERO_3) == Sharding(2, True)


@pytest.mark.parametrize(
    ("names", "stage", "world"),
    [(PLAIN, None, 1), (PLAIN, None, 4), (ZERO_0, 0, 4), (ZERO_2, 2, 2), (ZERO_2, 1, 2), (ZERO_3, 3, 2)],
)
def test_what_fits_may_go_on(names, stage, world):
    check_sharding(names, Path("checkpoint"), stage, world)


@pytest.mark.parametrize(
    ("names", "stage", "world", "said"),
    [
        (PLAIN, 2, 1, "was made without DeepSpeed"),
        (ZERO_2, None, 2, "by DeepSpeed, ZeRO stage 1 or 2"),
        (ZERO_2, 3, 2, "under ZeRO stage 1 or 2, and deepspeed says stage 3"),
        (ZERO_3, 2, 2, "under ZeRO stage 3, and deepspeed says stage 2"),
        (ZERO_2, 2, 4, "by 2 processes under ZeRO, and 4 were started"),
        (ZERO_0, 2, 2, "under ZeRO stage 0"),
    ],
)
def test_what_does_not_fit_says_what_to_do(names, stage, world, said):
    with pytest.raises(RunError, match=said) as found:
        check_sharding(names, Path("checkpoint"), stage, world)
    assert "another run name" in found.value.fix


def scores_of(folder: Path, number: int) -> np.ndarray:
    return pq.read_table(folder / f"round-{number:02d}" / "scores" / "less.parquet")["score"].to_numpy()


@needs_deepspeed
def test_zero_2_rounds_and_less_are_those_of_one_process(one_thread, tiny_demo, tmp_path, monkeypatch):
    common = (*RUN, "--method", "less", *settings(tiny_demo))
    alone, sharded = tmp_path / "alone", tmp_path / "sharded"
    run(alone, 1, ("round", "1", *common, "gradient_accumulation_steps=2"))
    zero = f"deepspeed={CONFIGS / 'ds_z2.json'}"
    run(sharded, 2, ("round", "1", *common, "gradient_accumulation_steps=1", zero))
    ours, theirs = sharded / "runs" / "r", alone / "runs" / "r"
    for number in (0, 1):
        assert farthest(weights(ours, number), weights(theirs, number)) < 1e-5
    scale = np.abs(scores_of(theirs, 1)).max()
    assert np.abs(scores_of(ours, 1) - scores_of(theirs, 1)).max() < 1e-3 * scale
    index = "round-01/index.parquet"
    assert pq.read_table(ours / index)["row"].equals(pq.read_table(theirs / index)["row"])
    same_states(adam_states(ours / "round-01/checkpoint"), adam_states(theirs / "round-01/checkpoint"))
    # Its optimizer can only be loaded by DeepSpeed.
    monkeypatch.chdir(sharded)
    ran = dataflex("round", "2", *RUN, "deepspeed=null")
    assert ran.code == 2
    assert "was made by DeepSpeed, ZeRO stage 1 or 2" in ran.err
    assert "Set deepspeed to the file" in ran.err


def same_states(ours: dict[str, AdamState], theirs: dict[str, AdamState]) -> None:
    assert ours.keys() == theirs.keys()
    for name, state in theirs.items():
        assert ours[name].step == state.step
        assert ours[name].betas == state.betas
        assert ours[name].learning_rate == pytest.approx(state.learning_rate)
        assert torch.allclose(ours[name].exp_avg, state.exp_avg, rtol=1e-4, atol=1e-8)
        assert torch.allclose(ours[name].exp_avg_sq, state.exp_avg_sq, rtol=1e-4, atol=1e-12)


@pytest.mark.slow
@needs_deepspeed
def test_the_guides_file_of_less_runs_as_it_is_under_torchrun(one_thread, tiny_demo, tmp_path):
    """ZeRO-3 as the guide has it: only the model and the data are replaced, and fewer steps are trained."""
    given = (f"dataset={tiny_demo.pool}", f"eval_dataset={tiny_demo.target}")
    given += (f"model_name_or_path={tiny_demo.model}", "warmup_step=2", "update_step=2", "update_times=1")
    config = str(GUIDES / "less.yaml")
    folders = []
    for name, processes, more in (
        ("sharded", 2, ()),
        ("alone", 1, ("deepspeed=null", "gradient_accumulation_steps=2")),
    ):
        work = tmp_path / name / "work"
        text = run(work, processes, ("round", "--config", config, *given, *more))
        folders.append(work.parent / "dataflex_saves" / "Llama-3.1-8B" / "less")
        assert ("ds_z3.json is taken" in text) == (name == "sharded"), text
    ours, theirs = folders
    for number in (0, 1):
        assert farthest(weights(ours, number), weights(theirs, number)) < 1e-5
    assert np.abs(scores_of(ours, 1) - scores_of(theirs, 1)).max() < 1e-3 * np.abs(scores_of(theirs, 1)).max()
    files = json.loads((ours / "round-01" / "checkpoint" / "COMPLETE.json").read_text())["files"]
    assert any(name.startswith("adam_states-") for name in files)
    assert not any(name.endswith(".py") for name in files)
    assert (ours / "adapter_model.safetensors").is_file()  # at the top of output_dir, where peers look
