"""Quantized base models: gradients of the adapter are autograd's, and what cannot be is refused by name."""

from __future__ import annotations

import importlib.util
import json
import shutil

import pytest
import torch
from gradient_models import VOCABULARY, Collect, lora, pad, random_rows, reference, trainable
from seen_accelerators import see
from tiny_training import make_config, make_model, save_tokenizer
from torch import nn

from dataflex_pipeline.errors import ConfigError, UserError
from dataflex_pipeline.gradients.capture import GradientCapture
from dataflex_pipeline.models import quantized
from dataflex_pipeline.models.adapters import load_for_training
from dataflex_pipeline.models.base import load_base, placement
from dataflex_pipeline.models.source import number_ingredients

needs_package = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


class EightBits(nn.Linear):
    """A stand-in: a weight of whole numbers with a scale per output, unpacked in the forward pass."""

    def __init__(self, layer):
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.scale = layer.weight.detach().abs().amax(1, keepdim=True) / 127
        whole = (layer.weight.detach() / self.scale).round().to(torch.int8)
        self.weight, self.bias = nn.Parameter(whole, requires_grad=False), None

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale)


EightBits.__module__ = "bitsandbytes.stand_in"


def assert_autograd(model):
    rows = random_rows()
    given = Collect()
    with GradientCapture(model, given, lambda line: None) as capture:
        losses = capture.run(*pad(rows))
    expected_losses, expected = reference(model, rows)
    assert losses.tolist() == pytest.approx(expected_losses, abs=1e-5)
    for row, gradients in enumerate(expected):
        assert gradients.keys() == set(trainable(model))
        for name, gradient in gradients.items():
            error = float((given.rows[row, name] - gradient).norm())
            assert error <= 2e-5 * float(gradient.norm()) + 1e-7, name


def test_gradients_through_layers_of_whole_numbers():
    from gradient_models import llama

    from dataflex_pipeline.models.targets import is_linear

    model = llama()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            model.set_submodule(name, EightBits(module))
    assert is_linear(model.get_submodule("model.layers.0.mlp.up_proj"))
    assert_autograd(lora(model))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model whose layers are of 64 and 128: bitsandbytes packs 64 weights at a time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=64, **sizes)
    place = tmp_path_factory.mktemp("quantized") / "model"
    LlamaForCausalLM(config).save_pretrained(place)
    return save_tokenizer(place)


@needs_package
@pytest.mark.parametrize("bits", [4, 8])
def test_gradients_on_bitsandbytes(folder, bits):
    config = make_config(folder, quantization_bit=bits)
    model = load_for_training(config, None, "cpu", 0).eval()
    layer = model.get_base_model().model.layers[0].mlp.up_proj.base_layer
    assert layer.weight.dtype is (torch.uint8 if bits == 4 else torch.int8)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    if bits == 4:
        assert_autograd(model)
    else:  # rounds its inputs by the largest of all rows, so that rows are not those of a batch of one
        rows = random_rows(1)
        given = Collect()
        with GradientCapture(model, given, lambda line: None) as capture:
            capture.run(*pad(rows))
        for name, gradient in reference(model, rows)[1][0].items():
            assert torch.allclose(given.rows[0, name], gradient, rtol=1e-3, atol=1e-5), name


def test_what_is_quantized_counts(folder):
    plain = number_ingredients(make_config(folder))
    assert number_ingredients(make_config(folder, quantization_bit=4)) == plain | {"quantization_bit": 4}
    assert number_ingredients(make_config(folder, tf32=True)) == plain | {"tf32": True}
    assert number_ingredients(make_config(folder, tf32=False)) == plain


def test_refusals(monkeypatch, folder, tmp_path):
    there = importlib.util.find_spec("torch")
    monkeypatch.setattr(quantized.importlib.util, "find_spec", lambda name: None)
    config = make_config(folder, quantization_bit=4)
    with pytest.raises(ConfigError, match=r"bitsandbytes is not installed[\s\S]*\[quant\]"):
        load_base(config, "cpu")
    monkeypatch.setattr(quantized.importlib.util, "find_spec", lambda name: there)
    with pytest.raises(ConfigError, match="finetuning_type: full was set"):
        load_base(config.model_copy(update={"finetuning_type": "full"}), "cpu")
    zero = tmp_path / "z3.json"
    zero.write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    with pytest.raises(ConfigError, match="ZeRO-3"):
        load_base(config.model_copy(update={"deepspeed": str(zero)}), "cpu")
    with pytest.raises(ConfigError, match="the device is mps"):
        quantized.quantization(config, "mps", "float32")


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8"])
def test_files_quantized_by_another_package_are_refused_by_name(folder, tmp_path, method):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    content = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(content | {"quantization_config": {"quant_method": method}}))
    with pytest.raises(ConfigError, match=f"is quantized by {method}"):
        load_base(make_config(copy), "cpu")


@needs_package
def test_files_quantized_by_bitsandbytes_are_taken(folder, tmp_path):
    copy = tmp_path / "copy"
    load_base(make_config(folder, quantization_bit=4), "cpu").save_pretrained(copy)
    again = load_base(make_config(copy), "cpu")
    assert again.model.layers[0].mlp.up_proj.weight.dtype is torch.uint8
    with pytest.raises(ConfigError, match="is quantized already"):
        load_base(make_config(copy, quantization_bit=4), "cpu")


def test_weights_go_straight_to_an_accelerator(monkeypatch, tmp_path):
    assert placement("cpu") == {}
    see(monkeypatch, "cuda", 2)
    assert placement("cuda") == {"device_map": {"": "cuda:0"}}
    assert placement("cuda:1") == {"device_map": {"": "cuda:1"}}
    monkeypatch.setattr("transformers.integrations.deepspeed.is_deepspeed_zero3_enabled", lambda: True)
    assert placement("cuda") == {}
    monkeypatch.undo()
    place = make_model(tmp_path / "model")
    plain = load_base(make_config(place), "cpu")
    monkeypatch.setattr(
        "dataflex_pipeline.models.base.placement", lambda *_, **__: {"device_map": {"": "cpu"}}
    )
    direct = load_base(make_config(place), "cpu")
    assert not any(hasattr(module, "_hf_hook") for module in direct.modules())
    ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(plain(ids).logits, direct(ids).logits)


def test_what_takes_a_quarter_fits_where_all_would_not(folder, monkeypatch):
    from dataflex_pipeline.models.weights import check_weights_fit, stored_weights

    parameters = stored_weights(str(folder)).parameters
    monkeypatch.setattr("dataflex_pipeline.host_memory.available_bytes", lambda: parameters)
    check_weights_fit(make_config(folder, quantization_bit=4), "cpu", "float32")
    with pytest.raises(UserError, match=r"quantization_bit: 4"):
        check_weights_fit(make_config(folder), "cpu", "float32")
