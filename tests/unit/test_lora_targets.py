"""Which layers LoRA goes on, family by family: every linear layer but the head that an adapter is seen on."""

from __future__ import annotations

import json
import warnings

import pytest
from lora_families import FAMILIES, family
from tiny_training import make_config

from dataflex_pipeline.errors import ConfigError, UserError
from dataflex_pipeline.models.adapters import wrap_for_training
from dataflex_pipeline.models.attached import adapted_layers, put_on
from dataflex_pipeline.models.base import attach_adapter
from dataflex_pipeline.models.targets import Targets, find_targets

OWN = "which are no linear layers but tensors of the model's own"
PAST = "whose weights the model reads past the layer, where an adapter is not seen"
MLP_EXPERTS = "mlp.experts.down_proj, mlp.experts.gate_up_proj, mlp.gate, " + OWN
SPARSE_EXPERTS = (
    "block_sparse_moe.experts.down_proj, block_sparse_moe.experts.gate_up_proj, block_sparse_moe.router"
)
LEFT_OUT = {
    "mixtral": MLP_EXPERTS,
    "qwen3_moe": MLP_EXPERTS,
    "olmoe": MLP_EXPERTS,
    "deepseek_v3": MLP_EXPERTS,
    "gpt_oss": "mlp.experts.down_proj, mlp.experts.gate_up_proj, mlp.router, " + OWN,
    "granitemoe": f"{SPARSE_EXPERTS}, {OWN}",
    "granitemoehybrid": f"{SPARSE_EXPERTS}, mamba.conv1d, {OWN}; nor on mamba.out_proj, {PAST}",
    "llama4_text": "feed_forward.experts.down_proj, feed_forward.experts.gate_up_proj, feed_forward.router, "
    + OWN,
    "jamba": "feed_forward.experts.down_proj, feed_forward.experts.gate_up_proj, mamba.A_log, mamba.conv1d, "
    f"{OWN}; nor on mamba.dt_proj, {PAST}",
    "qwen3_next": "linear_attn.conv1d, " + MLP_EXPERTS,
    "mamba": f"mixer.A_log, mixer.conv1d, {OWN}; nor on mixer.dt_proj, mixer.out_proj, mixer.x_proj, {PAST}",
    "mamba2": f"mixer.conv1d, {OWN}; nor on mixer.out_proj, {PAST}",
    "falcon_h1": f"mamba.conv1d, {OWN}; nor on mamba.out_proj, {PAST}",
    "gemma3n_text": f"altup.correction_coefs, {PAST}",
}
"""What is said to be left out; nothing is of the other families."""
NOT_SEEN = {
    "granitemoehybrid": ("mamba.out_proj",),
    "llama4_text": ("feed_forward.router",),
    "jamba": ("mamba.dt_proj",),
    "mamba": ("dt_proj", "out_proj", "x_proj"),
    "mamba2": ("out_proj",),
    "falcon_h1": ("mamba.out_proj",),
    "gemma3n_text": ("correction_coefs",),
}
"""Instances of torch's Linear that are not adapted."""
IDS = list(range(3, 20))


def expected(name, model):
    """Every Linear and Conv1D but the head, minus those named above."""
    import torch
    from transformers.pytorch_utils import Conv1D

    linear = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear | Conv1D)}
    head = {n for n, m in model.named_modules() if m is model.get_output_embeddings()}
    return {n for n in linear - head if not n.endswith(NOT_SEEN.get(name, ("//",)))}


def wrapped(name, **settings):
    """A family's model with LoRA on it, B not zero; what was said, and warned of."""
    import torch

    said: list[str] = []
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        model = wrap_for_training(make_config(f"/models/{name}", **settings), family(name), 5, said.append)
    assert [str(w.message) for w in warned if "peft" in w.filename] == []
    for parameter, value in model.named_parameters():
        if "lora_B" in parameter:
            torch.nn.init.normal_(value, std=0.1)
    return model, said


def logits(model):
    import torch

    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([IDS]), use_cache=False).logits


@pytest.mark.parametrize("name", FAMILIES)
def test_all_is_every_linear_layer_that_can_be_adapted_and_the_rest_is_said(name, tmp_path):
    import torch
    from peft import PeftModel

    model, said = wrapped(name)
    layers = expected(name, family(name))
    assert adapted_layers(model) == layers
    if name in LEFT_OUT:
        (line,) = said
        assert line.startswith(f"LoRA goes on {len(layers)} linear layers (")
        left_out = LEFT_OUT[name]
        if name == "jamba" and not isinstance(
            family(name).get_submodule("model.layers.1.feed_forward.router"), torch.nn.Linear
        ):  # from transformers 5.24 on
            left_out = left_out.replace("gate_up_proj, ", "gate_up_proj, feed_forward.router, ")
        assert line.endswith(f"); it does not go on {left_out}.")
    else:
        assert said == []
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    ends = ("lora_A.default.weight", "lora_B.default.weight")
    assert trained == {f"base_model.model.{layer}.{end}" for layer in layers for end in ends}

    ids = torch.tensor([IDS])
    model.train()(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and not p.grad.abs().sum() > 0]
    assert without == []

    model.save_pretrained(tmp_path / "first")
    again = attach_adapter(family(name), tmp_path / "first", said.append)
    again.save_pretrained(tmp_path / "second")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()
    assert {n for n, p in again.named_parameters() if p.requires_grad} == trained
    found = logits(model)
    assert torch.equal(logits(again), found)
    assert not torch.allclose(found, logits(family(name)), atol=1e-4)
    alone = PeftModel.from_pretrained(family(name), str(tmp_path / "first"))
    torch.testing.assert_close(logits(alone), found, rtol=0, atol=1e-6)  # peft by itself reads the same
    assert len(said) == (name in LEFT_OUT)


@pytest.mark.parametrize(
    ("name", "modules", "parameters"),
    [
        ("llama", "down_proj gate_proj k_proj o_proj q_proj up_proj v_proj", None),
        ("gpt2", "c_attn c_fc c_proj", None),
        ("qwen3_moe", "k_proj o_proj q_proj v_proj", "down_proj gate_proj up_proj"),
    ],
)
def test_saved_configurations_name_layers_sorted(name, modules, parameters, tmp_path):
    model, _ = wrapped(name)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["target_modules"] == modules.split()
    dense = None if parameters is None else [f"model.layers.0.mlp.{p}.weight" for p in parameters.split()]
    assert saved["target_parameters"] == dense


def test_a_short_name_that_would_hit_something_else_becomes_full_names():
    names = find_targets("all", family("gemma3n_text")).names
    assert "model.altup_projections.0" in names
    assert "model.layers.0.self_attn.q_proj" in names
    assert not {"0", "1", "2", "q_proj"} & set(names)
    some = find_targets("0", family("gemma3n_text"))  # altup_projections.0, not the whole of layers.0
    assert some.layers == {"model.altup_projections.0", "model.altup_unembed_projections.0"}
    assert set(some.names) == some.layers


def test_named_layers_of_a_mixture_are_the_layers_of_that_name():
    model, said = wrapped("deepseek_v3", lora_target="gate_proj", lora_dropout=0.1)
    assert adapted_layers(model) == {
        "model.layers.0.mlp.gate_proj",
        "model.layers.1.mlp.shared_experts.gate_proj",
    }
    assert said == []  # what was named is what was meant


@pytest.mark.parametrize(
    ("name", "target", "layer"),
    [
        ("falcon_h1", "q_proj,out_proj", "model.layers.0.mamba.out_proj"),
        ("mamba", "dt_proj", "backbone.layers.0.mixer.dt_proj"),
        ("jamba", "dt_proj", "model.layers.0.mamba.dt_proj"),
    ],
)
def test_naming_a_layer_that_is_read_past_is_refused(name, target, layer):
    with pytest.raises(ConfigError) as error:
        find_targets(target, family(name))
    assert (
        error.value.what == f"lora_target names '{target.split(',')[-1]}', and that is {layer} among others."
    )
    assert error.value.why == (
        "The model reads that layer's weight past the layer, so an adapter there would be ignored and never "
        "trained."
    )


def test_routers_and_experts_cannot_be_named():
    for target in ("router", "experts"):
        with pytest.raises(ConfigError, match=f"names '{target}', and the model has no linear layer of that"):
            find_targets(target, family("llama4_text"))


def test_a_model_without_layers_to_adapt_is_refused():
    import torch

    model = family("llama")
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings():
            model.set_submodule(name, torch.nn.Identity())
    with pytest.raises(
        ConfigError, match=r"\(LlamaForCausalLM\) has no linear layer that an adapter could go"
    ):
        find_targets("all", model)


def test_other_layers_than_meant_are_an_error():
    from peft import LoraConfig

    model = family("llama")
    meant = Targets(("q_proj",), frozenset({"model.layers.0.self_attn.q_proj"}))
    with pytest.raises(
        UserError, match=r"on 1 layers and peft put it on 2: model.layers.1.self_attn.q_proj is"
    ):
        put_on(model, LoraConfig(target_modules=["q_proj"]), meant, print)
