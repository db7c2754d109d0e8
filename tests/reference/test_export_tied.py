"""Exports of adapters on tied embeddings: the reloaded logits are those of base and adapter under peft."""

import copy
import json
import shutil
import warnings

import pytest
import torch
from cli_runs import done
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GemmaConfig, GPT2Config, LlamaConfig

from dataflex_pipeline.errors import DataflexError
from dataflex_pipeline.export import merged as merging

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
FAMILIES = {
    "llama": (LlamaConfig, {**SMALL, "tie_word_embeddings": True}, "embed_tokens", "q_proj"),
    "gpt2": (GPT2Config, {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}, "wte", "c_attn"),
    "gemma": (GemmaConfig, {**SMALL, "num_key_value_heads": 2, "head_dim": 16}, "embed_tokens", "q_proj"),
}
"""Configuration, name of the embedding, name of an attention projection; the head is lm_head in each."""
KINDS = {
    "lora-on-embedding": (lambda e, q: {"target_modules": [q, e]}, False),
    "lora-on-head": (lambda e, q: {"target_modules": [q, "lm_head"]}, False),
    "lora-on-both": (lambda e, q: {"target_modules": [q, e, "lm_head"]}, False),
    "both-saved": (lambda e, q: {"target_modules": [q], "modules_to_save": ["lm_head", e]}, False),
    "embedding-saved": (lambda e, q: {"target_modules": [q], "modules_to_save": [e]}, False),
    "head-saved": (lambda e, q: {"target_modules": [q], "modules_to_save": ["lm_head"]}, False),
    "lora-and-saved": (lambda e, q: {"target_modules": [q, e], "modules_to_save": ["lm_head"]}, False),
    "dora-on-embedding": (lambda e, q: {"target_modules": [q, e], "use_dora": True}, False),
    "dora": (lambda e, q: {"target_modules": [q], "use_dora": True}, True),
    "rslora": (lambda e, q: {"target_modules": [q], "use_rslora": True}, True),
    "tokens": (lambda e, q: {"target_modules": [q], "trainable_token_indices": [11, 12]}, True),
}
"""What the adapter is, and whether embedding and head are still one weight with it."""
IDS = torch.arange(2, 40)[None]


def logits(model):
    """Return them in float64: of the rounding only that of the merged weights is left."""
    with torch.inference_mode():
        return copy.deepcopy(model).double().eval()(input_ids=IDS).logits


@pytest.fixture(scope="module")
def bases(tiny_demo, tmp_path_factory):
    """Tied models, random, with the demo's tokenizer."""
    folder = tmp_path_factory.mktemp("tied")
    size = len(AutoTokenizer.from_pretrained(tiny_demo.model))
    for name, (config, settings, _, _) in FAMILIES.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config(vocab_size=size, initializer_range=0.2, **settings))
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
        model.save_pretrained(folder / name)
        AutoTokenizer.from_pretrained(tiny_demo.model).save_pretrained(folder / name)
    return folder


def adapter(base, folder, **settings):
    """Save an adapter with noise in every weight that it trains; return the logits of base and adapter."""
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **settings),
    )
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    return logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_reloaded_export_is_base_and_adapter(bases, tmp_path, monkeypatch, family, kind):
    monkeypatch.chdir(tmp_path)
    settings, still_tied = KINDS[kind]
    _, _, embedding, projection = FAMILIES[family]
    expected = adapter(bases / family, tmp_path / "adapter", **settings(embedding, projection))
    plain = logits(AutoModelForCausalLM.from_pretrained(bases / family))
    assert float((expected - plain).abs().max()) > 1

    with warnings.catch_warnings(record=True) as raw:
        warnings.simplefilter("always")
        text = done(
            "export", f"model_name_or_path={bases / family}", "adapter_name_or_path=adapter", "export_dir=out"
        )

    assert [str(each.message) for each in raw if issubclass(each.category, UserWarning)] == []
    model, loading = AutoModelForCausalLM.from_pretrained("out", output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    # DoRA's norms of a whole embedding are sums in float32: 1.4e-5 of rounding was seen with one processor.
    assert float((logits(model) - expected).abs().max()) <= (2e-5 if kind == "dora-on-embedding" else 1e-5)
    assert model.config.tie_word_embeddings is still_tied
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is still_tied
    said = (
        "embedding and head are one weight in the base, and the adapter changes them differently: they are "
        "exported as two (tie_word_embeddings: false)"
    )
    assert (said in " ".join(text.split())) is not still_tied


def test_what_would_not_be_base_and_adapter_is_not_exported(bases, tmp_path, monkeypatch):
    """As merging into the one tied weight would not be."""
    expected = adapter(bases / "llama", tmp_path / "adapter", target_modules=["q_proj", "embed_tokens"])
    monkeypatch.setattr(merging, "_double_tied_head", lambda adapted: False)
    model = AutoModelForCausalLM.from_pretrained(bases / "llama")
    with pytest.raises(DataflexError, match="cannot be merged: the logits of the merged model differ"):
        merging._merge(model, tmp_path / "adapter", print)
    assert expected.isfinite().all()


def test_a_run_that_starts_from_an_adapter_on_the_embedding_is_exported_as_what_it_trained(
    bases, tiny_demo, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    adapter(bases / "llama", tmp_path / "adapter", target_modules=["q_proj", "embed_tokens"])
    shutil.copytree(bases / "llama", tmp_path / "base")
    settings = (
        f"dataset={tiny_demo.pool}",
        "model_name_or_path=./base",
        "adapter_name_or_path=adapter",
        "warmup_step=1",
        "update_step=1",
        "update_times=1",
        "per_device_train_batch_size=2",
        "--run",
        "a",
    )
    done("warmup", *settings)
    done("export", "a", "--what", "model", "export_dir=out")
    trained = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained("base"), "runs/a/round-00/checkpoint"
    )
    assert float((logits(AutoModelForCausalLM.from_pretrained("out")) - logits(trained)).abs().max()) <= 1e-5
