"""Loading models, tokenizers and Adam's states; what is refused, and how."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tiny_training import make_config, make_model

from dataflex_pipeline.errors import ConfigError, CorruptError, RunError, UserError
from dataflex_pipeline.hub import hub_reachable
from dataflex_pipeline.models.base import load_base, load_full, precision, resolve_device
from dataflex_pipeline.models.optimizer_states import adam_states
from dataflex_pipeline.models.source import (
    attention_kernel,
    attention_notice,
    local_folder,
    model_digest,
    tokenizer_digest,
)
from dataflex_pipeline.models.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture
def copy(model, tmp_path):
    """A copy of the model's folder, to be changed."""
    return Path(shutil.copytree(model, tmp_path / "copy"))


# --- devices and precision ---


def test_devices():
    import torch

    assert resolve_device("cpu") == "cpu"
    assert resolve_device("auto") == (
        "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    )
    with pytest.raises(ConfigError, match=r"device: gpu cannot be used.\nIt is not a device"):
        resolve_device("gpu")
    with pytest.raises(ConfigError, match=r"device: cuda:99 cannot be used.\ntorch sees \d+ cuda devices"):
        resolve_device("cuda:99")


def test_bf16_becomes_fp32_on_a_cpu_and_says_so(model):
    assert precision(make_config(model), "cpu").notices == ()
    wanted = precision(make_config(model, bf16=True), "cpu")
    assert (wanted.dtype, wanted.notices) == ("float32", ("bf16: true becomes fp32 on a CPU.",))


# --- where a model comes from ---


@pytest.mark.parametrize("name", ["/no/such/folder", "./nowhere", "../nowhere", "~/nowhere", "a/b/c", " "])
def test_what_looks_like_a_path_is_never_looked_up_on_the_hub(name):
    with pytest.raises(UserError, match=r"does not exist(.|\n)*not looked up on the hub"):
        load_base(make_config(name), "cpu")


def test_hub_names_and_folders_are_told_apart(model, monkeypatch):
    assert local_folder("someone/model") is None
    assert local_folder("gpt2") is None
    assert local_folder(str(model)) == model
    monkeypatch.chdir(model.parent)
    assert local_folder(model.name) == Path(model.name)
    with pytest.raises(UserError, match="is a file"):
        local_folder(str(model / "config.json"))


def test_a_folder_that_is_no_model_says_what_is_missing(copy):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"only as pickle \(pytorch_model.bin\)(.|\n)*can run any code"):
        load_base(make_config(copy), "cpu")
    (copy / "pytorch_model.bin").unlink()
    with pytest.raises(UserError, match=r"no \*.safetensors"):
        load_base(make_config(copy), "cpu")
    (copy / "config.json").unlink()
    with pytest.raises(UserError, match=r"has no config.json"):
        load_base(make_config(copy), "cpu")


def test_unknown_architecture_and_foreign_code_are_explained(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"model_type": "no-such-model"}))
    with pytest.raises(UserError, match=r"could not be loaded: .*no-such-model"):
        load_base(make_config(copy), "cpu")
    code = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    (copy / "config.json").write_text(json.dumps(config | {"model_type": "mine", "auto_map": code}))
    (copy / "code.py").write_text("raise SystemExit('ran foreign code')")
    with pytest.raises(ConfigError, match=r"Python code of its own and trust_remote_code is false"):
        load_base(make_config(copy), "cpu")


def test_weights_that_are_damaged_or_not_whole_are_refused(copy):
    from safetensors.torch import load_file, save_file

    path = copy / "model.safetensors"
    weights = load_file(path)
    norm = weights.pop("model.norm.weight")
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lack 1 parameters: model.norm.weight.\nThey would be random"):
        load_base(make_config(copy), "cpu")
    save_file(weights | {"model.norm.weight": norm[:3].clone()}, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"The weights of the model .* could not be loaded"):
        load_base(make_config(copy), "cpu")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"The weights of the model .* could not be loaded"):
        load_base(make_config(copy), "cpu")


def test_weights_without_a_place_are_said_of_a_base_and_refused_of_a_checkpoint(copy):
    import torch
    from safetensors.torch import load_file, save_file

    path, said = copy / "model.safetensors", []
    save_file(load_file(path) | {"value_head.weight": torch.ones(3)}, path, metadata={"format": "pt"})
    load_base(make_config(copy), "cpu", say=said.append)
    assert said == [
        f"1 weights of '{copy}' have no place in a LlamaForCausalLM and are not used: value_head.weight."
    ]
    with pytest.raises(CorruptError, match=r"has no place for: value_head.weight.\nWhat was trained in them"):
        load_full(make_config(copy, finetuning_type="full"), copy, "cpu")


# --- attention kernels ---


@pytest.fixture(scope="module")
def soft_capped(tmp_path_factory):
    """A Gemma 2 whose attention scores are capped at 1."""
    import torch
    from transformers import Gemma2Config, Gemma2ForCausalLM

    folder = make_model(tmp_path_factory.mktemp("models") / "gemma2")
    torch.manual_seed(0)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "num_hidden_layers": 2}
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "initializer_range": 0.5}
    config = Gemma2Config(**heads, **sizes, attn_logit_softcapping=1.0, query_pre_attn_scalar=1)
    Gemma2ForCausalLM(config).save_pretrained(folder)
    return folder


def test_a_soft_cap_of_attention_scores_is_kept(soft_capped, model):
    import torch
    from transformers import AutoModelForCausalLM, Gemma2ForCausalLM

    # transformers 5.24 refuses sdpa for this family itself.
    kernels = ("eager", "sdpa") if Gemma2ForCausalLM._supports_sdpa else ("eager",)
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        plain = {
            kernel: AutoModelForCausalLM.from_pretrained(soft_capped, attn_implementation=kernel)(ids).logits
            for kernel in kernels
        }
        if "sdpa" in plain:
            assert (plain["eager"] - plain["sdpa"]).abs().max() > 0.1  # sdpa is another model
        found = load_base(make_config(soft_capped), "cpu")(ids).logits
    assert torch.equal(found, plain["eager"])
    assert attention_kernel(make_config(soft_capped)) == "eager"
    assert attention_kernel(make_config(model)) is None
    assert attention_kernel(make_config(soft_capped, attn_implementation="sdpa")) == "sdpa"
    assert attention_kernel(make_config(model, attn_implementation="eager")) == "eager"


def test_what_is_said_about_a_soft_cap(soft_capped, model, tmp_path):
    taken = "The model soft-caps its attention scores, which sdpa leaves out: it is run with eager attention."
    assert attention_notice(make_config(soft_capped)) == taken
    left = attention_notice(make_config(soft_capped, attn_implementation="sdpa"))
    assert left.startswith("attn_implementation: sdpa leaves out the soft-capping of this model's attention")
    assert attention_notice(make_config(soft_capped, attn_implementation="eager")) is None
    assert attention_notice(make_config(model)) is None

    # the family's default is not written into config.json, and no cap is written as null
    folder = Path(shutil.copytree(soft_capped, tmp_path / "other"))
    content = json.loads((folder / "config.json").read_text())
    content.pop("attn_logit_softcapping")
    (folder / "config.json").write_text(json.dumps(content))
    assert attention_kernel(make_config(folder)) == "eager"
    (folder / "config.json").write_text(json.dumps(content | {"attn_logit_softcapping": None}))
    assert attention_kernel(make_config(folder)) is None


@pytest.mark.parametrize("kernel", ["flash_attention_2", "no_such_kernel"])
def test_an_attention_kernel_that_cannot_be_had_is_named(model, kernel):
    with pytest.raises(ConfigError) as refused:
        load_base(make_config(model, attn_implementation=kernel), "cpu")
    what, why, fix = str(refused.value).split("\n")
    assert what.startswith(f"The model '{model}' cannot be loaded with the attention kernel asked for: ")
    assert why == "Not every model has every kernel, and some kernels are packages of their own."
    assert fix == "Set attn_implementation to eager, which every model has, or leave it out."


def test_an_unreachable_hub_is_told_at_once(monkeypatch):
    import socket
    import time

    def unknown(*_):
        raise socket.gaierror("Name or service not known")

    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    hub_reachable.cache_clear()
    started = time.monotonic()
    for attempt in (load_tokenizer, model_digest, lambda config: load_base(config, "cpu")):
        with pytest.raises(UserError, match="'someone/no-such-model' could not be loaded"):
            attempt(make_config("someone/no-such-model"))
    assert time.monotonic() - started < 5
    hub_reachable.cache_clear()


def test_digests_follow_the_content_not_the_place(model, copy):
    one, two = make_config(model), make_config(copy)
    assert model_digest(one) == model_digest(two)
    assert tokenizer_digest(one) == tokenizer_digest(two)
    tokenizer = copy / "tokenizer_config.json"
    tokenizer.write_text(tokenizer.read_text() + " ")
    assert tokenizer_digest(one) != tokenizer_digest(two)
    assert model_digest(one) == model_digest(two)
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert model_digest(one) != model_digest(two)


def test_code_that_may_run_counts_and_no_other(copy):
    trusted, plain = make_config(copy, trust_remote_code=True), make_config(copy)
    before = [model_digest(plain), tokenizer_digest(plain), model_digest(trusted), tokenizer_digest(trusted)]
    assert before[:2] == before[2:]
    (copy / "modeling_own.py").write_text("x = 1\n")
    after = [model_digest(plain), tokenizer_digest(plain), model_digest(trusted), tokenizer_digest(trusted)]
    assert after[:2] == before[:2]
    assert after[2] != before[2]
    assert after[3] != before[3]


# --- tokenizer ---


def test_missing_pad_token_is_replaced_and_said(copy):
    said: list[str] = []
    assert load_tokenizer(make_config(copy), said.append).pad_token == "<pad>"
    assert said == []
    path = copy / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    del settings["pad_token"]
    path.write_text(json.dumps(settings))
    assert load_tokenizer(make_config(copy), said.append).pad_token == "</s>"
    assert said == ["The tokenizer has no pad token; '</s>' fills up batches (it is masked out everywhere)."]
    del settings["eos_token"]
    path.write_text(json.dumps(settings))
    with pytest.raises(UserError, match="no pad, eos or unk token"):
        load_tokenizer(make_config(copy))


def test_missing_tokenizer_is_one_clear_error(copy):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copy / name).unlink()
    with pytest.raises(UserError, match=r"The tokenizer of the model .* could not be loaded"):
        load_tokenizer(make_config(copy))


# --- Adam's states ---


def test_adam_states_are_the_live_optimizers(tmp_path):
    import torch

    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    names = [name for name, _ in net.named_parameters()]
    groups = [
        {"params": list(net[0].parameters()), "weight_decay": 0.1, "param_names": names[:2]},
        {"params": list(net[1].parameters()), "weight_decay": 0.0, "param_names": names[2:]},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.01, betas=(0.8, 0.9), eps=1e-6)
    for _ in range(3):
        net(torch.randn(5, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    found = adam_states(tmp_path)
    assert list(found) == names
    for name, parameter in net.named_parameters():
        live, state = optimizer.state[parameter], found[name]
        assert torch.equal(state.exp_avg, live["exp_avg"])
        assert torch.equal(state.exp_avg_sq, live["exp_avg_sq"])
        assert (state.step, state.betas, state.eps, state.learning_rate) == (3, (0.8, 0.9), 1e-6, 0.01)
        assert state.weight_decay == (0.1 if name.startswith("0") else 0.0)


class Evil:
    """What a hostile pickle would hold."""

    def __reduce__(self):
        return (print, ("code from a pickle ran",))


def test_optimizer_files_that_cannot_be_used_are_refused(tmp_path, capsys):
    import torch

    with pytest.raises(RunError, match=r"has no optimizer.pt"):
        adam_states(tmp_path)
    path = tmp_path / "optimizer.pt"
    path.write_bytes(b"cut")
    with pytest.raises(CorruptError, match="cannot be read"):
        adam_states(tmp_path)
    torch.save({"state": Evil(), "param_groups": []}, path)
    with pytest.raises(CorruptError, match="cannot be read"):
        adam_states(tmp_path)
    assert "pickle ran" not in capsys.readouterr().out
    net = torch.nn.Linear(2, 2)
    torch.save(torch.optim.AdamW(net.parameters()).state_dict(), path)
    with pytest.raises(CorruptError, match="carry no parameter names"):
        adam_states(tmp_path)
    torch.save([1], path)
    with pytest.raises(CorruptError, match="does not hold the state of an optimizer"):
        adam_states(tmp_path)
