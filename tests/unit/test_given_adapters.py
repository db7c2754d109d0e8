"""Adapters that were made elsewhere, or are damaged: what is read, what is refused, and in which words."""

from __future__ import annotations

import json
import warnings

import pytest
from gradient_models import Collect, pad, random_rows, reference, trainable
from lora_families import family
from tiny_training import make_config, make_model

from dataflex_pipeline.errors import ConfigError, UserError
from dataflex_pipeline.gradients.capture import GradientCapture
from dataflex_pipeline.models.adapters import wrap_for_training
from dataflex_pipeline.models.base import attach_adapter, load_base, load_for_scoring

Q = "model.layers.0.self_attn.q_proj.lora_A.weight"
FULL = f"base_model.model.{Q}"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture
def adapter(model, tmp_path):
    """A fresh adapter of rank 4 on every layer."""
    config = make_config(model)
    wrap_for_training(config, load_base(config, "cpu"), 5).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def rewrite(folder, change):
    """Change the tensors of an adapter's file."""
    from safetensors.torch import load_file, save_file

    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def configure(folder, **settings):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def refusals(model, folder):
    """What starting from the adapter and scoring with it say; the same words."""
    said = []
    for attempt in (
        lambda c: wrap_for_training(c, load_base(c, "cpu"), 0),
        lambda c: load_for_scoring(c, None, "cpu"),
        lambda c: load_for_scoring(make_config(model), folder, "cpu"),
    ):
        with warnings.catch_warnings(), pytest.raises(UserError) as error:
            warnings.simplefilter("error")
            attempt(make_config(model, adapter_name_or_path=str(folder)))
        said.append(str(error.value))
    assert len(set(said)) == 1
    return error.value


def test_a_file_that_lacks_tensors_is_refused(model, adapter):
    def cut(tensors):
        for name in [name for name in tensors if ".layers.1." in name and ".q_proj." in name]:
            del tensors[name]

    rewrite(adapter, cut)
    error = refusals(model, adapter)
    assert error.what == (
        f"The adapter in {adapter} does not fit: its adapter_model.safetensors lacks 2 tensors "
        "(model.layers.1.self_attn.q_proj.lora_A.weight, model.layers.1.self_attn.q_proj.lora_B.weight)."
    )
    assert error.why == "Those layers would start untrained, without a word."
    assert error.fix.startswith("Give the whole adapter as save_pretrained() wrote it")


def test_an_empty_file_is_refused(model, adapter):
    rewrite(adapter, lambda tensors: tensors.clear())
    assert "lacks 28 tensors (" in refusals(model, adapter).what
    assert " and 25 more)" in refusals(model, adapter).what


@pytest.mark.parametrize("prefix", ["", "base_model.model.model.", "module.base_model.model."])
def test_a_file_with_other_names_is_refused(model, adapter, prefix):
    def rename(tensors):
        for name in list(tensors):
            tensors[prefix + name.removeprefix("base_model.model.")] = tensors.pop(name)

    rewrite(adapter, rename)
    error = refusals(model, adapter)
    assert "lacks 28 tensors (" in error.what
    assert ", and has 28 tensors (" in error.what
    assert error.what.endswith(" instead.")


def test_a_tensor_too_many_is_refused(model, adapter):
    import torch

    rewrite(
        adapter, lambda tensors: tensors.update({FULL.replace("layers.0", "layers.7"): torch.ones(4, 32)})
    )
    error = refusals(model, adapter)
    assert (
        "has 1 tensor (model.layers.7.self_attn.q_proj.lora_A.weight), for which this model has" in error.what
    )
    assert error.why == "What they hold would be dropped, without a word."


def test_a_configuration_that_names_fewer_layers_than_the_file_has_is_refused(model, adapter):
    configure(adapter, target_modules=["q_proj"])
    assert "has 24 tensors (" in refusals(model, adapter).what


def test_a_tensor_of_another_shape_is_refused(model, adapter):
    rewrite(adapter, lambda tensors: tensors.update({FULL: tensors[FULL][:, :8].clone()}))
    error = refusals(model, adapter)
    assert f"{Q} is 4 x 8 in the file and 4 x 32 on this model." in error.what
    assert error.why.startswith("It was made for another base model, or with another rank than")


def test_another_rank_than_the_configuration_says_is_refused(model, adapter):
    configure(adapter, r=8)
    assert "lora_A.weight is 4 x " in refusals(model, adapter).what


def test_weights_of_the_base_model_in_the_file_are_refused_unless_they_are_its_own(model, adapter):
    name = "base_model.model.model.embed_tokens.weight"
    base = load_base(make_config(model), "cpu").get_input_embeddings().weight.detach()
    rewrite(adapter, lambda tensors: tensors.update({name: base.clone()}))
    attach_adapter(load_base(make_config(model), "cpu"), adapter)
    rewrite(adapter, lambda tensors: tensors.update({name: base + 1}))
    assert "has 1 tensor (model.embed_tokens.weight), for which" in refusals(model, adapter).what


def test_numbers_that_are_not_finite_are_refused(model, adapter):
    rewrite(adapter, lambda tensors: tensors[FULL].fill_(float("nan")))
    assert "does not fit: 1 tensor (" in refusals(model, adapter).what
    assert "hold NaN or infinity" in refusals(model, adapter).what


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"peft_type": "PROMPT_TUNING"}, "it is of the kind PROMPT_TUNING"),
        ({"peft_type": "IA3"}, "it is of the kind IA3"),
        ({"peft_type": "LOHA"}, "it is of the kind LOHA"),
        ({"peft_type": None}, "its adapter_config.json names no peft_type"),
        ({"modules_to_save": ["lm_head"]}, "its adapter_config.json sets modules_to_save"),
        ({"trainable_token_indices": [3]}, "its adapter_config.json sets trainable_token_indices"),
        ({"lora_alpha": 0}, "its lora_alpha is 0"),
        ({"lora_bias": True}, "its adapter_config.json sets lora_bias"),
        ({"layer_replication": [[0, 2]]}, "its adapter_config.json sets layer_replication"),
        ({"alora_invocation_tokens": [1]}, "its adapter_config.json sets alora_invocation_tokens"),
        ({"a_key_of_tomorrow": 1}, "its adapter_config.json sets a_key_of_tomorrow"),
        ({"init_lora_weights": "pissa_niter_16"}, "sets init_lora_weights: pissa_niter_16"),
    ],
)
def test_what_is_not_followed_here_is_refused_by_name(model, adapter, settings, words):
    configure(adapter, **settings)
    error = refusals(model, adapter)
    assert error.what == f"The adapter in {adapter} cannot be used: {words}." or words in error.what
    assert error.fix.startswith("Merge it into its base model and use the result as the model")


def test_a_configuration_that_is_cut_off_is_refused(model, adapter):
    path = adapter / "adapter_config.json"
    path.write_text(path.read_text()[:100])
    assert "its adapter_config.json is no JSON" in refusals(model, adapter).what


def test_a_weight_file_that_is_cut_off_is_refused(model, adapter):
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "cannot be used: Error while deserializing" in refusals(model, adapter).what


def test_an_adapter_of_another_base_is_said_and_inference_mode_is_not_minded(model, adapter):
    import torch

    said: list[str] = []
    configure(adapter, base_model_name_or_path="org/some-model-7b", inference_mode=True)
    config = make_config(model, adapter_name_or_path=str(adapter))
    started = wrap_for_training(config, load_base(config, "cpu"), 0, said.append)
    assert said == [
        f"the adapter in {adapter} says that it was made for org/some-model-7b, and the model here is {model}"
    ]
    assert sum(p.requires_grad for p in started.parameters()) == 28
    first = next(
        p for n, p in started.named_parameters() if n.endswith("0.self_attn.q_proj.lora_A.default.weight")
    )
    assert not torch.equal(first, torch.zeros_like(first))
    configure(adapter, base_model_name_or_path=f"/elsewhere/{model.name}")  # a folder that was moved
    wrap_for_training(config, load_base(config, "cpu"), 0, said.append)
    assert len(said) == 1


def test_an_adapter_where_it_has_no_effect_is_said(tmp_path):
    from peft import LoraConfig, get_peft_model

    jamba = get_peft_model(family("jamba"), LoraConfig(r=4, target_modules=["dt_proj", "q_proj"]))
    jamba.save_pretrained(tmp_path)
    said: list[str] = []
    wrap_for_training(
        make_config(tmp_path, adapter_name_or_path=str(tmp_path)), family("jamba"), 0, said.append
    )
    assert said == [
        f"the adapter in {tmp_path} is on 1 layers (model.layers.0.mamba.dt_proj, ...) whose weights the "
        "model reads past the layer: there it has no effect and is not trained"
    ]


def test_a_head_with_an_adapter_is_still_refused(model, tmp_path):
    from peft import LoraConfig, get_peft_model

    head = get_peft_model(load_base(make_config(model), "cpu"), LoraConfig(target_modules=["lm_head"]))
    head.save_pretrained(tmp_path, save_embedding_layers=False)
    config = make_config(model, adapter_name_or_path=str(tmp_path))
    with pytest.raises(ConfigError, match="changes the model's output head"):
        wrap_for_training(config, load_base(config, "cpu"), 0)


@pytest.mark.parametrize(
    ("name", "settings", "slow"),
    [
        ("llama", {"use_rslora": True}, False),
        ("llama", {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 7}}, False),
        ("llama", {"target_modules": "all-linear", "exclude_modules": ["up_proj"]}, False),
        ("llama", {"layers_to_transform": [1]}, False),
        ("llama", {"use_dora": True}, True),
        ("llama", {"target_modules": ["embed_tokens"]}, True),
        ("gpt_neox", {"target_modules": ["query_key_value", "dense"], "bias": "all"}, False),
        ("gpt_neox", {"target_modules": ["query_key_value"], "bias": "lora_only"}, False),
        ("mixtral", {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]}, True),
        ("deepseek_v3", {"target_modules": ["gate_proj", "up_proj", "down_proj"]}, True),
        ("mixtral", {"target_modules": ["q_proj"], "target_parameters": ["mlp.gate.weight"]}, True),
    ],
)
def test_what_is_followed_gives_the_same_logits_gradients_and_merge(name, settings, slow, tmp_path):
    import torch
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's own, while the foreign adapter is made
        made = get_peft_model(
            family(name), LoraConfig(**{"r": 4, "target_modules": ["q_proj", "down_proj"]} | settings)
        ).eval()
        torch.manual_seed(1)
        for parameter in trainable(made).values():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
        made.save_pretrained(tmp_path)
    read = attach_adapter(family(name), tmp_path).eval()
    assert trainable(read).keys() == trainable(made).keys()
    rows = random_rows(3)
    batch = pad(rows)
    with torch.no_grad():
        logits = made(input_ids=batch[0]).logits
        assert torch.equal(read(input_ids=batch[0]).logits, logits)
    collect, said = Collect(), []
    with GradientCapture(read, collect, said.append) as capture:
        losses = capture.run(*batch)
    assert bool(said) is slow
    expected_losses, gradients = reference(made, rows)
    torch.testing.assert_close(losses, torch.tensor(expected_losses), rtol=1e-5, atol=1e-6)
    for row, expected in enumerate(gradients):
        for parameter, gradient in expected.items():
            torch.testing.assert_close(collect.rows[row, parameter], gradient, rtol=1e-4, atol=1e-6)
    merged = read.merge_and_unload(safe_merge=True)
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=batch[0]).logits, logits, rtol=0, atol=1e-5)


def test_experts_of_an_adapter_made_with_transformers_4_are_joined_and_its_leftovers_refused(tmp_path):
    """peft joins adapters on single experts; what it cannot place is not dropped."""
    import torch
    from peft import LoraConfig
    from safetensors.torch import save_file

    torch.manual_seed(0)
    sizes = {"w1": (32, 64), "w3": (32, 64), "w2": (64, 32)}  # in, out
    tensors = {}
    for layer in range(2):
        for expert in range(4):
            for name, (wide, out) in sizes.items():
                start = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}"
                tensors[f"{start}.lora_A.weight"] = torch.randn(2, wide)
                tensors[f"{start}.lora_B.weight"] = torch.randn(out, 2)
    LoraConfig(r=2, lora_alpha=2, target_modules=["w1", "w2", "w3"]).save_pretrained(tmp_path)
    save_file(tensors, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    read = attach_adapter(family("mixtral"), tmp_path).merge_and_unload()
    start = "base_model.model.model.layers.1.block_sparse_moe.experts.3"
    delta = tensors[f"{start}.w2.lora_B.weight"] @ tensors[f"{start}.w2.lora_A.weight"]
    name = "model.layers.1.mlp.experts.down_proj"
    changed = read.get_parameter(name)[3] - family("mixtral").get_parameter(name)[3]
    torch.testing.assert_close(changed, delta, rtol=1e-4, atol=1e-4)

    tensors["base_model.model.model.layers.1.mlp.shared.lora_A.weight"] = torch.randn(2, 32)
    save_file(tensors, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="has 1 tensor"):
        attach_adapter(family("mixtral"), tmp_path)
