"""rds: weighted means of last hidden states against plain transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from data_fixtures import CHATML, byte_tokenizer
from score_models import FAMILIES, ROWS, computed, load, prepared, save_model

from dataflex_pipeline.api import Need, Selection
from dataflex_pipeline.config.fields import Config
from dataflex_pipeline.data.texts import row_text
from dataflex_pipeline.embed.causal import CausalEmbedder
from dataflex_pipeline.embed.settings import EmbedderSettings, EmbedModel
from dataflex_pipeline.errors import ConfigError
from dataflex_pipeline.features.embedding_params import EmbeddingParams
from dataflex_pipeline.features.neighbours import Neighbours
from dataflex_pipeline.features.plan import make_feature, method_needs
from dataflex_pipeline.methods import build_method, method_class
from dataflex_pipeline.models.hidden import weighted_states
from dataflex_pipeline.models.room import Room


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("rds")


@pytest.fixture(scope="module")
def models(folder):
    return {family: save_model(folder / family, family) for family in FAMILIES}


@pytest.fixture(scope="module")
def world(folder):
    return prepared(folder / "rows")


def plain(model, rows):
    """Return the unit vectors by the formula, one row at a time. [rows, H]"""
    found = []
    for ids in rows:
        with torch.no_grad():
            states = model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0]
        total = torch.zeros(states.shape[-1]).double()
        for place, state in enumerate(states, 1):
            total += place * state.double()
        found.append((total / total.norm()).numpy())
    return np.stack(found)


def selection(number=2):
    return Selection(number, 3, 0, lambda line: None)


def vectors(table):
    return np.array(table["embedding"].to_pylist())


def need(**params):
    return Need(
        "model_embeddings", params={"model": None, "method": "model", "text": "chat_template"} | params
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tokens", [1, 150, 100_000])
def test_equal_to_the_formula_row_by_row(family, tokens, tmp_path, models, world):
    table, rows = world
    found = computed(tmp_path, table, need(), models[family], score_batch_tokens=tokens)
    expected = plain(load(models[family]), [row["input_ids"] for row in rows])
    assert np.abs(vectors(found) - expected).max() < 1e-5
    assert found["n_tokens"].to_pylist() == [len(row["input_ids"]) for row in rows]


def test_the_adapter_takes_part_and_no_head_is_computed(tmp_path, models, world):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    _, rows = world
    model = AutoModelForCausalLM.from_pretrained(models["llama"])
    with torch.no_grad():
        before = weighted_states(model.eval(), [row["input_ids"] for row in rows], Room(400))
    torch.manual_seed(1)
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    wrapped = get_peft_model(model, lora).eval()
    expected = plain(wrapped, [row["input_ids"] for row in rows])
    wrapped.get_base_model().lm_head.forward = None  # calling it would be an error
    with torch.no_grad():
        found = weighted_states(wrapped, [row["input_ids"] for row in rows], Room(400))
    found /= np.linalg.norm(found, axis=1, keepdims=True)
    assert np.abs(found - expected).max() < 1e-5
    assert np.abs(found - before / np.linalg.norm(before, axis=1, keepdims=True)).max() > 0.05


@pytest.mark.parametrize("family", FAMILIES)
def test_texts_by_the_run_s_model_and_by_another_one(family, tmp_path, models, world):
    table, _ = world
    texts = ["query: " + row_text(row["messages"], "response") for row in ROWS]
    tokenizer = byte_tokenizer(tmp_path / "t", extra=CHATML)
    expected = plain(load(models[family]), [tokenizer(text)["input_ids"][:40] for text in texts])
    given = {"text": "response", "prompt": "query: ", "max_length": 40}
    own = computed(tmp_path, table, need(**given), models[family])
    assert np.abs(vectors(own) - expected).max() < 1e-5
    other = Need("embeddings", params={"model": str(models[family]), "method": "model", **given})
    found = computed(tmp_path, table, other, models["llama"])
    assert np.abs(vectors(found) - expected).max() < 1e-5


def test_another_model_makes_tokens_of_a_text_once(tmp_path, models, world, monkeypatch):
    from transformers import PreTrainedTokenizerBase

    table, _ = world
    asked = Need("embeddings", params={"model": str(models["llama"]), "method": "model", "max_length": 9})
    texts = [row_text(row["messages"], "conversation") for row in ROWS]
    made, call = [], PreTrainedTokenizerBase.__call__

    def counted(tokenizer, given, *args, **more):
        made.extend([given] if isinstance(given, str) else given)
        return call(tokenizer, given, *args, **more)

    expected = EmbedModel(str(models["llama"])).token_counts(texts, False)
    monkeypatch.setattr(PreTrainedTokenizerBase, "__call__", counted)
    found = computed(tmp_path, table, asked, models["llama"])
    assert found["n_tokens"].to_pylist() == expected
    assert sorted(made) == sorted(texts)


def test_tokens_of_no_text_are_those_written_around_one(tmp_path, models):
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_tokenizer(tmp_path / "t")
    around = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 5)])
    tokenizer.backend_tokenizer.post_processor = around
    folder = save_model(tmp_path / "model", "llama")
    tokenizer.save_pretrained(folder)
    settings = EmbedderSettings(str(folder), None, "float32", 4, 8, "cpu", False, 0.9, 64, None)
    texts = ["", "river", " "]
    with CausalEmbedder(settings, pytest.fail) as embedder:
        _, counts = embedder.embed_counted(texts)
    assert counts.tolist() == EmbedModel(str(folder)).token_counts(texts, False)
    assert counts[0] == 1


def test_rds_asks_for_the_model_of_the_round_and_near_and_tsds_can_too():
    made = {
        name: build_method(name, method_class(name), params, "a test")
        for name, params in (
            ("rds", {}),
            ("near", {"embed_method": "model"}),
            ("tsds", {"embed_method": "model"}),
        )
    }
    needs = {name: method_needs(method, selection()) for name, method in made.items()}
    for name in ("rds", "near"):
        assert {key: (each.name, each.split, each.checkpoint) for key, each in needs[name].items()} == {
            "pool": ("model_embeddings", "pool", 1),
            "target": ("model_embeddings", "target", 1),
        }
        assert needs[name]["pool"].params.text == "chat_template"
    assert needs["rds"] == needs["near"]
    assert {each.checkpoint for each in needs["tsds"].values()} == {1}
    inner = Neighbours(needs["tsds"]["neighbours"].params, None).needs(needs["tsds"]["neighbours"])
    assert {(each.name, each.checkpoint) for each in inner.values()} == {("model_embeddings", 1)}
    beside = build_method("rds", method_class("rds"), {"embed_model": "a/b"}, "a test").needs(selection())
    assert [each.name for each in beside.values()] == ["embeddings", "embeddings"]
    assert beside["pool"].params.text == "conversation"
    assert EmbeddingParams().model_dump()["embed_model"] == "Qwen/Qwen3-Embedding-0.6B"
    assert EmbeddingParams().model_dump()["embed_text"] == "conversation"


def test_what_is_no_causal_model_is_refused(tmp_path):
    from transformers import T5Config, T5ForConditionalGeneration

    small = {"vocab_size": 272, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    T5ForConditionalGeneration(T5Config(**small)).save_pretrained(tmp_path)
    byte_tokenizer(tmp_path)
    asked = Need("embeddings", params={"model": str(tmp_path), "method": "model"})
    with pytest.raises(ConfigError, match="t5 is an encoder with a decoder"):
        make_feature(asked, Config()).check(asked, None)
    asked = need(prompt="query: ")
    with pytest.raises(ConfigError, match="is no part of any turn"):
        make_feature(asked, Config()).check(asked, None)


def test_a_planted_world_is_found(tmp_path, models):
    """Rows that are written like a target row, in letters of their own, are nearest to it."""
    rng = np.random.default_rng(0)
    alphabets = ["abcdef", "uvwxyz", "012345"]

    def row(kind):
        asked, said = ("".join(rng.choice(list(alphabets[kind]), 24)) for _ in range(2))
        return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}

    kinds = rng.integers(0, 3, 30)
    pool, _ = prepared(tmp_path / "pool", [row(kind) for kind in kinds])
    target, _ = prepared(tmp_path / "target", [row(0), row(2)])
    for family in FAMILIES:
        found, near = (
            vectors(computed(tmp_path / name, table, need(), models[family]))
            for name, table in ((f"{family}-pool", pool), (f"{family}-target", target))
        )
        cosines = found @ near.T
        assert np.isin(kinds[np.argsort(-cosines[:, 0])[:5]], 0).all(), family
        assert np.isin(kinds[np.argsort(-cosines[:, 1])[:5]], 2).all(), family
