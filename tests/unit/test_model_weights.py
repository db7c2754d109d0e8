"""The size of a model by the heads of its files, and the refusal of one that is larger than the memory."""

from __future__ import annotations

import json

import numpy as np
import pytest
from cli_runs import data, dataflex
from safetensors.numpy import save_file

from dataflex_pipeline import host_memory
from dataflex_pipeline.config.fields import Config
from dataflex_pipeline.errors import UserError
from dataflex_pipeline.models import memory
from dataflex_pipeline.models.weights import (
    StoredWeights,
    check_model_here,
    check_training_fits,
    check_weights_fit,
    stored_weights,
)

GIB = 1 << 30


@pytest.fixture
def folder(tmp_path):
    tensors = {"a": np.zeros((3, 4), np.float32), "b": np.zeros((5,), np.float16)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


@pytest.fixture
def free(monkeypatch):
    """Say how many bytes are free."""

    def limit(count):
        monkeypatch.setattr(host_memory, "available_bytes", lambda *given: count)

    return limit


def test_what_is_in_the_files(folder):
    assert stored_weights(str(folder)) == StoredWeights(17, 12 * 4 + 5 * 2)


def test_of_several_files_those_of_the_index_count(folder):
    (folder / "model.safetensors").rename(folder / "part-1.safetensors")
    save_file({"c": np.zeros(7, np.float32)}, folder / "part-2.safetensors")
    save_file({"all": np.zeros(99, np.float32)}, folder / "consolidated.safetensors")
    weight_map = {"a": "part-1.safetensors", "b": "part-1.safetensors", "c": "part-2.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert stored_weights(str(folder)) == StoredWeights(24, 58 + 28)


def test_a_hub_model_that_is_not_here_has_no_size():
    assert stored_weights("nobody/nothing-of-this-name") is None


def test_weights_larger_than_the_memory_are_refused(folder, free):
    config = Config(model_name_or_path=str(folder), device="cpu")
    free(17 * 4)
    check_weights_fit(config, "cpu", "float32")
    free(17 * 4 - 1)
    with pytest.raises(UserError, match=r"takes 0.0 GiB \(17 parameters in float32\), and 0.0 GiB are free"):
        check_weights_fit(config, "cpu", "float32")
    free(17 * 8 - 1)
    with pytest.raises(UserError, match="in 2 processes") as told:
        check_weights_fit(config, "cpu", "float32", 2)
    assert "fewer processes per machine" in told.value.fix


def test_training_all_weights_takes_sixteen_bytes_of_each(folder, free):
    free(17 * 16 - 1)
    check_training_fits(Config(model_name_or_path=str(folder)), "cpu")
    full = Config(model_name_or_path=str(folder), finetuning_type="full")
    with pytest.raises(UserError, match="17 trained parameters") as told:
        check_training_fits(full, "cpu")
    assert "finetuning_type: lora" in told.value.fix


def test_without_weights_the_configuration_tells_their_size(tmp_path, monkeypatch):
    """Llama 2 has 6,738,415,616 parameters, as published."""
    sizes = {"hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32}
    content = sizes | {"model_type": "llama", "num_attention_heads": 32, "vocab_size": 32_000}
    (tmp_path / "config.json").write_text(json.dumps(content))
    config = Config(model_name_or_path=str(tmp_path), device="cpu")
    monkeypatch.setattr(memory, "free_bytes", lambda device: 18 * GIB)
    with pytest.raises(UserError, match=r"no \*.safetensors file") as told:
        check_model_here(config)
    size = "6,738,415,616 parameters, 25.1 GiB in float32, and 18.0 GiB are free on cpu"
    assert f"By config.json there are {size}." in told.value.why
    assert "Copy the weights" in told.value.fix


def test_a_model_that_is_there_and_fits_is_let_through(tiny_demo, free):
    config = Config(model_name_or_path=str(tiny_demo.model), device="cpu")
    check_model_here(config)
    free(1000)
    with pytest.raises(UserError, match="are free on cpu"):
        check_model_here(config)


def test_it_is_refused_before_anything_runs(tiny_demo, tmp_path, monkeypatch, free):
    monkeypatch.chdir(tmp_path)
    free(1000)
    ran = dataflex("round", "1", *data(tiny_demo), "--run", "r", "--method", "loss")
    assert ran.code == 2
    assert "The model" in ran.err
    assert "are free on cpu" in ran.err
    assert "Traceback" not in ran.err
    assert not list((tmp_path / "runs").rglob("*.parquet"))
