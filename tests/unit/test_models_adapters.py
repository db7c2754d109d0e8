"""Adapters and full weights: what is made trainable, what is loaded, what is refused."""

from __future__ import annotations

import pytest
from tiny_training import make_config, make_model

from dataflex_pipeline.errors import ConfigError, CorruptError
from dataflex_pipeline.models.adapters import wrap_for_training
from dataflex_pipeline.models.base import load_base, load_for_scoring
from dataflex_pipeline.models.targets import find_targets

BODY = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("models") / "model")


def test_all_means_every_linear_layer_but_the_head(model):
    base = load_base(make_config(model), "cpu")
    assert find_targets("all", base).names == tuple(BODY)
    assert find_targets("v_proj, q_proj", base).names == ("q_proj", "v_proj")
    assert find_targets("self_attn.q_proj", base).names == ("self_attn.q_proj",)


def test_bad_targets_are_refused(model):
    base = load_base(make_config(model), "cpu")
    with pytest.raises(ConfigError, match=r"names 'q_prj'.* Did you mean 'q_proj'\?\nIts linear layers are"):
        find_targets("q_prj", base)
    with pytest.raises(
        ConfigError, match=r"lm_head', the model's output head.\nThe training loss multiplies"
    ):
        find_targets("q_proj,lm_head", base)


def test_fresh_adapter_changes_nothing_and_only_it_is_trained(model):
    import torch

    config = make_config(model, lora_dropout=0.3)
    ids = torch.arange(3, 20)[None]
    wrapped = wrap_for_training(config, load_base(config, "cpu"), 5)
    with torch.no_grad():
        assert torch.equal(
            wrapped.eval()(input_ids=ids).logits, load_base(config, "cpu").eval()(input_ids=ids).logits
        )
    trained = {name for name, p in wrapped.named_parameters() if p.requires_grad}
    # two matrices on each of the seven layers of both blocks
    assert len(trained) == 2 * len(BODY) * 2
    assert all("lora_" in name for name in trained)
    assert wrapped.peft_config["default"].lora_alpha == 2 * config.lora_rank


def test_adapter_initialisation_follows_its_seed_alone(model):
    import torch

    config = make_config(model)
    drawn = []
    for seed, noise in ((5, 1), (5, 2), (6, 1)):
        base = load_base(config, "cpu")
        torch.manual_seed(noise)
        drawn.append(dict(wrap_for_training(config, base, seed).named_parameters()))
    name = next(name for name in drawn[0] if "lora_A" in name)
    assert torch.equal(drawn[0][name], drawn[1][name])
    assert not torch.equal(drawn[0][name], drawn[2][name])


def test_starting_from_an_adapter_and_scoring_with_it(model, tmp_path):
    import torch

    config = make_config(model, lora_dropout=0.5)
    first = wrap_for_training(config, load_base(config, "cpu"), 5)
    with torch.no_grad():
        for name, parameter in first.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    first.save_pretrained(tmp_path / "adapter")
    started = make_config(model, adapter_name_or_path=str(tmp_path / "adapter"))
    again = wrap_for_training(started, load_base(started, "cpu"), 0)
    scored = load_for_scoring(config, tmp_path / "adapter", "cpu")
    before_warmup = load_for_scoring(started, None, "cpu")
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        logits = [m.eval()(input_ids=ids).logits for m in (first, again, scored, before_warmup)]
        plain = load_for_scoring(config, None, "cpu")(input_ids=ids).logits
    assert all(torch.equal(logits[0], other) for other in logits[1:])
    assert not torch.allclose(logits[0], plain)
    trained = {name for name, p in first.named_parameters() if p.requires_grad}
    for loaded in (again, scored):
        assert {name for name, p in loaded.named_parameters() if p.requires_grad} == trained
    assert not scored.training


def test_an_adapter_goes_where_its_base_is(model, tmp_path, monkeypatch):
    config = make_config(model)
    wrap_for_training(config, load_base(config, "cpu"), 5).save_pretrained(tmp_path / "adapter")
    monkeypatch.setattr("peft.peft_model.infer_device", lambda: "cuda")  # as where there is a GPU
    scored = load_for_scoring(config, tmp_path / "adapter", "cpu")
    assert {parameter.device.type for parameter in scored.parameters()} == {"cpu"}


def test_unusable_adapters_are_refused(model, tmp_path):
    def attempt(name, **settings):
        config = make_config(model, adapter_name_or_path=str(name), **settings)
        wrap_for_training(config, load_base(config, "cpu"), 0)

    with pytest.raises(ConfigError, match="not a folder"):
        attempt(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"has no adapter_config.json"):
        attempt(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(ConfigError, match=r"no adapter_model.safetensors \(pickled weights are not read\)"):
        attempt(tmp_path)
    with pytest.raises(ConfigError, match="together with finetuning_type: full"):
        attempt(tmp_path, finetuning_type="full")


def test_an_adapter_on_the_head_is_refused(model, tmp_path):
    from peft import LoraConfig, get_peft_model

    config = make_config(model)
    head = get_peft_model(load_base(config, "cpu"), LoraConfig(target_modules=["lm_head"]))
    head.save_pretrained(tmp_path / "head", save_embedding_layers=False)
    started = make_config(model, adapter_name_or_path=str(tmp_path / "head"))
    with pytest.raises(ConfigError, match=r"changes the model's output head"):
        wrap_for_training(started, load_base(started, "cpu"), 0)


def test_full_weights_in_shards_load_for_scoring(model, tmp_path):
    import torch

    config = make_config(model, finetuning_type="full")
    base = load_base(config, "cpu")
    base.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 1
    scored = load_for_scoring(config, tmp_path / "shards", "cpu")
    for (name, a), b in zip(base.named_parameters(), scored.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_checkpoint_of_the_other_kind_is_refused(model, tmp_path):
    with pytest.raises(CorruptError, match=r"no adapter_model.safetensors with its adapter_config.json"):
        load_for_scoring(make_config(model), tmp_path, "cpu")
    with pytest.raises(CorruptError, match=r"no model.safetensors with its config.json"):
        load_for_scoring(make_config(model, finetuning_type="full"), tmp_path, "cpu")
