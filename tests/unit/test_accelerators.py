"""Accelerators other than those of the machine that the tests run on: which is taken, and what is said."""

from __future__ import annotations

import pytest
from seen_accelerators import see
from tiny_training import Listener, make_config

from dataflex_pipeline import accelerators, launch
from dataflex_pipeline.config.load import load_config
from dataflex_pipeline.errors import ConfigError
from dataflex_pipeline.models.base import precision, resolve_device
from dataflex_pipeline.pipeline.device import device_notices, settle_bf16
from dataflex_pipeline.store.run import RunFolder


@pytest.mark.parametrize("kind", ["cuda", "xpu", "npu", "mps"])
def test_auto_is_whatever_accelerator_torch_finds(monkeypatch, kind):
    see(monkeypatch, kind, 2)
    assert resolve_device("auto") == kind
    assert resolve_device(f"{kind}:1") == f"{kind}:1"
    with pytest.raises(ConfigError, match=f"torch sees 2 {kind} devices"):
        resolve_device(f"{kind}:2")
    other = "cuda" if kind != "cuda" else "npu"
    with pytest.raises(ConfigError, match=f"torch sees 0 {other} devices"):
        resolve_device(other)


@pytest.mark.parametrize(
    ("bf16", "has", "wanted", "said"),
    [
        ("auto", True, "bfloat16", ""),
        ("auto", False, "float32", ""),
        ("auto", None, "float32", ""),
        (True, None, "bfloat16", ""),
        (False, True, "float32", "8 times as long"),
        (False, False, "float32", ""),
    ],
)
def test_bf16_on_an_accelerator(monkeypatch, tmp_path, bf16, has, wanted, said):
    see(monkeypatch, "npu", bf16=has)
    found = precision(make_config(tmp_path, bf16=bf16), "npu:0")
    assert found.dtype == wanted
    assert said in " ".join(found.notices)
    assert bool(said) == bool(found.notices)


def test_bf16_where_there_is_none_is_refused(monkeypatch, tmp_path):
    see(monkeypatch, "cuda", bf16=False)
    with pytest.raises(ConfigError, match="does not compute in bfloat16"):
        precision(make_config(tmp_path, bf16=True), "cuda")


def test_auto_is_settled_once_for_a_run(monkeypatch, tmp_path):
    run = RunFolder(tmp_path / "run")
    loaded = load_config(None, ["model_name_or_path=a/b", "dataset=x.jsonl"])
    assert loaded.config.bf16 == "auto"
    assert settle_bf16(load_config(None, ["device=cpu"]), run).config.bf16 is False
    see(monkeypatch, "cuda")
    begun = settle_bf16(loaded, run)
    assert begun.config.bf16 is True
    run.write({"bf16": begun.config.bf16}, {})
    see(monkeypatch, None)  # goes on where there is none
    assert settle_bf16(loaded, run).config.bf16 is True


@pytest.mark.parametrize("program", ["nvidia-smi", "npu-smi"])
def test_a_driver_without_its_torch_is_said(monkeypatch, tmp_path, program):
    see(monkeypatch, None)
    monkeypatch.setattr(accelerators.shutil, "which", lambda name: name == program)
    (line,) = device_notices(make_config(tmp_path, device="auto"))
    assert program in line
    assert "everything runs on the CPU" in line
    assert device_notices(make_config(tmp_path, device="cpu")) == []


def test_idle_accelerators_are_said_with_the_way_to_use_them(monkeypatch, tmp_path):
    see(monkeypatch, "cuda", 8)
    (line,) = device_notices(make_config(tmp_path, device="auto"))
    assert "7 of 8 cuda devices stay idle" in line
    assert "torchrun --standalone --nproc_per_node 8 -m -- dataflex_pipeline" in line
    assert device_notices(make_config(tmp_path, device="cuda:3")) == []
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert device_notices(make_config(tmp_path, device="auto")) == []


@pytest.fixture
def process(monkeypatch):
    """Be process 3 of 4 of a machine, started by torchrun or by srun."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "3")

    def started_by(launcher):
        monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
        if launcher == "torchrun":
            monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")

    return started_by


@pytest.mark.parametrize("kind", ["cuda", "npu"])
@pytest.mark.parametrize(("launcher", "visible", "own"), [("torchrun", 4, 3), ("srun", 4, 3), ("srun", 1, 0)])
def test_each_process_claims_its_own(monkeypatch, process, kind, launcher, visible, own):
    process(launcher)
    claimed = see(monkeypatch, kind, visible)
    launch.claim_device("auto")
    launch.claim_device(kind)
    assert claimed == [own, own]
    launch.claim_device("cpu")
    assert len(claimed) == 2
    with pytest.raises(ConfigError, match=f"Set device: {kind}"):
        launch.claim_device(f"{kind}:1")


@pytest.mark.parametrize(("launcher", "visible"), [("torchrun", 1), ("srun", 2)])
def test_fewer_than_processes_are_refused(monkeypatch, process, launcher, visible):
    process(launcher)
    see(monkeypatch, "cuda", visible)
    with pytest.raises(ConfigError, match=f"there are {visible}"):
        launch.claim_device("auto")


def test_what_torch_cannot_see_costs_no_import(monkeypatch):
    monkeypatch.delitem(accelerators.sys.modules, "torch", raising=False)
    monkeypatch.setattr(accelerators, "NODES", ())
    monkeypatch.setattr(accelerators, "driver", lambda: None)
    monkeypatch.setattr(accelerators.sys, "platform", "linux")
    assert not accelerators.is_likely()
    accelerators.release()
    assert "torch" not in accelerators.sys.modules


def test_a_note_of_the_device_is_said_once(monkeypatch, tmp_path):
    from dataflex_pipeline.pipeline.device import say_device
    from dataflex_pipeline.pipeline.open_run import OpenRun

    see(monkeypatch, "cuda", 2)
    listener = Listener()
    loaded = load_config(None, ["device=auto", "bf16=true"])
    run = OpenRun(loaded, RunFolder(tmp_path / "run"), progress=listener)
    say_device(run)
    say_device(run)
    assert [line[:5] for line in listener.lines] == ["note:"]
