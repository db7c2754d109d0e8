"""Training on accelerators and under launchers: defaults, and what is refused by name."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from seen_accelerators import see
from tiny_training import make_config, make_model

from dataflex_pipeline.config.fields import Config
from dataflex_pipeline.config.shipped import shipped_configs
from dataflex_pipeline.errors import ConfigError
from dataflex_pipeline.launch.accelerate import refuse_accelerate
from dataflex_pipeline.models.adapters import load_for_training
from dataflex_pipeline.training.arguments import _data, _deepspeed, _optimizer, recomputes
from dataflex_pipeline.training.unused import all_take_part, settle_unused


@pytest.mark.parametrize(
    ("setting", "device", "on"),
    [("auto", "cpu", False), ("auto", "cuda", True), ("auto", "npu:1", True), (False, "cuda", False)],
)
def test_activations_are_recomputed_on_accelerators(tmp_path, setting, device, on):
    assert recomputes(make_config(tmp_path, gradient_checkpointing=setting), device) is on


@pytest.mark.parametrize(
    ("kind", "device", "deepspeed", "optimizer"),
    [
        ("full", "cuda", None, "adamw_torch_fused"),
        ("full", "cuda", "ds.json", "adamw_torch"),
        ("full", "cpu", None, "adamw_torch"),
        ("lora", "cuda", None, "adamw_torch"),
    ],
)
def test_all_weights_take_the_fused_optimizer(tmp_path, kind, device, deepspeed, optimizer):
    config = make_config(tmp_path, finetuning_type=kind, deepspeed=deepspeed)
    assert _optimizer(config, device)["optim"] == optimizer
    assert _data(config, device)["dataloader_pin_memory"] is (device == "cuda")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ACCELERATE_USE_FSDP", "true"),
        ("ACCELERATE_USE_MEGATRON_LM", "1"),
        ("ACCELERATE_MIXED_PRECISION", "fp16"),
        ("ACCELERATE_MIXED_PRECISION", "fp8"),
        ("ACCELERATE_DYNAMO_BACKEND", "inductor"),
    ],
)
def test_what_accelerate_is_asked_for_is_refused_by_name(monkeypatch, name, value):
    refuse_accelerate(mixed=False)
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"The environment variable {name} is {value}"):
        refuse_accelerate()


def test_bf16_by_accelerate_has_to_be_that_of_the_run(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    refuse_accelerate()
    refuse_accelerate(mixed=True)
    with pytest.raises(ConfigError, match="set bf16: true or false"):
        refuse_accelerate(mixed=False)


@pytest.mark.parametrize("name", ["z2", "z2_offload", "z3", "z3_offload"])
def test_shipped_files_add_up_in_fp32_while_they_compute(name):
    content = json.loads((shipped_configs() / f"deepspeed/ds_{name}.json").read_text())
    assert content["data_types"] == {"grad_accum_dtype": "fp32"}
    assert content["communication_data_type"] == "fp32"
    assert content["zero_optimization"]["overlap_comm"] is True
    path = str(shipped_configs() / f"deepspeed/ds_{name}.json")
    config = Config(deepspeed=path)
    assert _deepspeed(config, "cuda") == path
    content["zero_optimization"]["overlap_comm"] = False  # a CPU has no streams
    assert _deepspeed(config, "cpu") == content


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    folder = make_model(tmp_path_factory.mktemp("unused") / "model")
    return load_for_training(make_config(folder), None, "cpu", 0)


def test_ddp_does_not_look_for_unused_parameters_where_all_are_used(monkeypatch, adapted):
    asked = SimpleNamespace(ddp_find_unused_parameters=None, deepspeed=None)
    settle_unused(asked, adapted, lora=True)
    assert asked.ddp_find_unused_parameters is None  # one process
    monkeypatch.setenv("WORLD_SIZE", "2")
    settle_unused(asked, adapted, lora=False)
    assert asked.ddp_find_unused_parameters is None
    adapted.train()
    before = torch.get_rng_state()
    settle_unused(asked, adapted, lora=True)
    assert asked.ddp_find_unused_parameters is False
    assert adapted.training
    assert torch.equal(before, torch.get_rng_state())


def test_a_layer_that_is_read_past_or_routed_to_may_be_unused(monkeypatch, adapted):
    assert all_take_part(adapted)
    layer = adapted.get_base_model().model.layers[0].mlp
    monkeypatch.setattr(layer, "forward", lambda x: x * 0)
    assert not all_take_part(adapted)
    monkeypatch.undo()
    monkeypatch.setattr(type(adapted.config), "output_router_logits", False, raising=False)
    assert not all_take_part(adapted)


def test_the_first_visible_one_is_what_trains(monkeypatch, tmp_path):
    from dataflex_pipeline.training.arguments import training_device

    see(monkeypatch, "npu", 4)
    assert training_device(make_config(tmp_path, device="auto")) == "npu"
    with pytest.raises(ConfigError, match="Set device: npu"):
        training_device(make_config(tmp_path, device="npu:2"))
