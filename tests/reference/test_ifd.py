"""ifd and perplexity against plain transformers, row by row, with the run's model and with another one."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pytest
import torch
from data_fixtures import CHATML, Lines, byte_tokenizer
from score_models import FAMILIES, ROWS, computed, configuration, load, prepared, save_model

from dataflex_pipeline.api import Block, Need, Selection
from dataflex_pipeline.config.fields import Config
from dataflex_pipeline.data.chat.beginning import beginning_ids
from dataflex_pipeline.data.chat.labelled import ChatFormat
from dataflex_pipeline.data.chat.templates import TEMPLATES, named_template
from dataflex_pipeline.errors import ConfigError
from dataflex_pipeline.features.plan import make_feature
from dataflex_pipeline.features.responses import responses_alone
from dataflex_pipeline.methods import build_method, method_class
from dataflex_pipeline.models.batches import Sequences
from dataflex_pipeline.pipeline.score import score_block
from dataflex_pipeline.schemas import SCORES
from dataflex_pipeline.testing.tables import MemoryTable

HEADER = "<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n"
"""What ChatML writes before the answer to no question."""
NUMBERED = (
    "{% for m in messages %}[{{ loop.index }} {{ m.role }}] {{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}[{{ messages | length + 1 }} assistant] {% endif %}"
)
"""A template of a model's own, quite another one."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ifd")


@pytest.fixture(scope="module")
def models(folder):
    return {family: save_model(folder / family, family) for family in FAMILIES}


@pytest.fixture(scope="module")
def world(folder):
    return prepared(folder / "rows")


def nll(model, ids, labels):
    """Return the summed negative log-likelihood of the labelled tokens, by one forward pass of one row."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0, :-1].double()
    targets = torch.tensor(labels[1:])
    kept = targets != -100
    return -torch.log_softmax(logits, -1)[kept].gather(1, targets[kept][:, None]).sum().item(), int(
        kept.sum()
    )


def written(tokenizer, pieces):
    """Return ids and labels of (text, learnt) pieces."""
    ids, labels = [], []
    for text, learnt in pieces:
        found = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += found
        labels += found if learnt else [-100] * len(found)
    return ids, labels


def answers(row, end="<|im_end|>"):
    return [turn["content"] + end for turn in row["messages"] if turn["role"] == "assistant"]


def plain_ifd(model, tokenizer, row, prepared_row):
    """Return (loss given the prompt, loss alone) by the formula."""
    given, n_tokens = nll(model, prepared_row["input_ids"], prepared_row["labels"])
    alone = [nll(model, *written(tokenizer, [(HEADER, False), (text, True)])) for text in answers(row)]
    assert n_tokens == sum(count for _, count in alone), "the same tokens"
    return given / n_tokens, sum(loss for loss, _ in alone) / n_tokens


def scored(name, tables, said=None, **params):
    """Return the score table of a method over feature tables, all rows of the pool valid."""
    method = build_method(name, method_class(name), params, "a test")
    lines = [] if said is None else said
    selection = Selection(1, 1, 0, lines.append)
    state = method.begin({key: MemoryTable(table) for key, table in tables.items()}, selection)
    first = next(iter(tables.values())).select(["row", "row_id"])
    pool = first.append_column("valid", pa.array([True] * len(first)))
    pool = pool.append_column("reason", pa.nulls(len(first), pa.string())).combine_chunks().to_batches()[0]
    features = {key: table.combine_chunks().to_batches()[0] for key, table in tables.items()}
    schema = pa.schema([*SCORES, *method.own_columns(state)])
    return score_block(method, Block(pool, features), state, schema)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tokens", [1, 150, 100_000])
def test_equal_to_the_formula_row_by_row(family, tokens, tmp_path, models, world):
    table, rows = world
    tables = {
        key: computed(tmp_path, table, Need(name), models[family], score_batch_tokens=tokens)
        for key, name in (("given", "losses"), ("alone", "response_losses"))
    }
    found = scored("ifd", tables)
    model, tokenizer = (
        load(models[family]),
        byte_tokenizer(tmp_path / "t", extra=CHATML),
    )
    expected = [plain_ifd(model, tokenizer, row, made) for row, made in zip(ROWS, rows, strict=True)]
    assert np.allclose(found["loss"], [given for given, _ in expected], rtol=0, atol=1e-5)
    assert np.allclose(found["loss_alone"], [alone for _, alone in expected], rtol=0, atol=1e-5)
    assert np.allclose(found["ifd"], [given / alone for given, alone in expected], rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_score_model_reads_rows_through_its_own_template_and_tokens(family, tmp_path, models, world):
    table, _ = world
    small = save_model(tmp_path / "small", family, NUMBERED, seed=1)
    given = {"score_model": str(small)}
    method = build_method("ifd", method_class("ifd"), given, "a test")
    needs = method.needs(Selection(1, 1, 0, lambda line: None))
    tables = {key: computed(tmp_path, table, need, models["llama"]) for key, need in needs.items()}
    model, tokenizer = load(small), byte_tokenizer(tmp_path / "t")
    for row, loss, alone in zip(ROWS, tables["given"]["loss"], tables["alone"]["loss"], strict=True):
        pieces, sums = [], [0.0, 0.0, 0]
        for number, turn in enumerate(row["messages"], 1):
            assistant = turn["role"] == "assistant"
            head, said = f"[{number} {turn['role']}] ", turn["content"] + "</s>"
            pieces += [(head, False), (said, assistant), ("\n", False)]
            if assistant:
                start = "[1 user] </s>\n[2 assistant] "
                found, count = nll(model, *written(tokenizer, [(start, False), (said, True)]))
                sums[1], sums[2] = sums[1] + found, sums[2] + count
        sums[0], count = nll(model, *written(tokenizer, pieces[:-1]))
        assert count == sums[2]
        assert loss.as_py() == pytest.approx(sums[0] / count, abs=1e-5)
        assert alone.as_py() == pytest.approx(sums[1] / count, abs=1e-5)
    assert scored("perplexity", {"now": tables["given"]}, **given)["score"].equals(tables["given"]["loss"])


def test_the_run_s_own_model_as_score_model_gives_the_run_s_losses(tmp_path, models, world):
    table, _ = world
    own = computed(tmp_path, table, Need("losses"), models["gpt2"])
    need = Need("score_losses", params={"score_model": str(models["gpt2"]), "score_template": "chatml"})
    assert np.allclose(computed(tmp_path, table, need, models["llama"])["loss"], own["loss"], atol=1e-6)


WEATHER = {"type": "function", "function": {"name": "weather", "description": "now", "parameters": {}}}
ODD = [
    {
        "messages": [
            *ROWS[0]["messages"][:1],
            {"role": "assistant", "content": "8", "reasoning_content": "4+4"},
        ]
    },
    {"messages": ROWS[1]["messages"], "tools": [WEATHER]},
    {"messages": [{"role": "user", "content": "x" * 300}, {"role": "assistant", "content": "y" * 100}]},
    {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y" * 400}]},
]


def test_rows_that_a_score_model_cannot_be_shown_are_named(tmp_path, models):
    own = "{% for m in messages %}{{ m.role }}: {{ m.reasoning_content }}{{ m.content }}</s>{% endfor %}" + (
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    table, _ = prepared(tmp_path / "rows", [*ROWS[:2], *ODD], template=own)
    run = save_model(tmp_path / "run", "llama", own)
    small = save_model(tmp_path / "short", "gpt2", NUMBERED)
    settings = json.loads((small / "config.json").read_text())
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(small)
    model.config.n_positions = settings["n_positions"] = 256
    model.transformer.wpe.weight = torch.nn.Parameter(model.transformer.wpe.weight[:256].clone())
    model.save_pretrained(small)
    need, said = Need("score_losses", params={"score_model": str(small)}), Lines()
    found = computed(tmp_path, table, need, run, said, template=None, cutoff_len=4096)
    valid, reasons = found["valid"].to_pylist(), found["reason"].to_pylist()
    assert valid == [True, True, False, False, False, True]
    assert all("not all of the row is in its turns" in reason for reason in reasons[2:4])
    assert reasons[4] == "no response token within the 256 tokens that score_model is given"
    assert "2 rows are longer than 256 tokens of score_model: scored up to there" in said.said


def test_a_score_model_that_is_none_is_refused(tmp_path, models, world):
    def refusal(folder, **more):
        feature = make_feature(Need("score_losses", params={"score_model": str(folder), **more}), Config())
        with pytest.raises(ConfigError) as error:
            feature.check(Need("score_losses"), None)
        return str(error.value)

    assert "score_template" in refusal(models["gpt2"])
    from transformers import BertConfig, BertLMHeadModel, T5Config, T5ForConditionalGeneration

    small = {"vocab_size": 272, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    T5ForConditionalGeneration(T5Config(**small)).save_pretrained(tmp_path / "t5")
    byte_tokenizer(tmp_path / "t5", NUMBERED)
    assert "t5 is an encoder with a decoder" in refusal(tmp_path / "t5")
    both = BertConfig(
        vocab_size=272, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    BertLMHeadModel(both).save_pretrained(tmp_path / "bert")
    byte_tokenizer(tmp_path / "bert", NUMBERED)
    need = Need("score_losses", params={"score_model": str(tmp_path / "bert")})
    with pytest.raises(ConfigError, match="depends on the tokens behind it"):
        computed(tmp_path, world[0], need, models["llama"])
    with pytest.raises(ConfigError, match="score_template is none of"):
        build_method("ifd", method_class("ifd"), {"score_model": "x", "score_template": "y"}, "a test")


def losses_of(values):
    n = len(values)
    base = {"row": range(n), "row_id": [f"{row:032x}" for row in range(n)], "valid": [True] * n}
    return pa.table(base | {"loss": values, "n_tokens": [4] * n, "reason": pa.nulls(n, pa.string())})


def test_rows_above_one_stay_valid_and_come_last():
    said = []
    tables = {"given": losses_of([1.0, 3.0, 0.5, 2.0, 9.0]), "alone": losses_of([2.0, 2.0, 2.0, 2.0, 1.0])}
    found = scored("ifd", tables, said)
    assert found["ifd"].to_pylist() == [0.5, 1.5, 0.25, 1.0, 9.0]
    assert found["over_one"].to_pylist() == [False, True, False, False, True]
    assert all(found["valid"].to_pylist())
    assert np.argsort(-found["score"].to_numpy()).tolist() == [3, 0, 2, 1, 4]
    assert said == ["2 of 5 rows have an ifd above 1 (the prompt does not help): ranked last"]


def test_a_planted_world_is_told_apart(tmp_path):
    """Prompts that say the answer, nothing, or another answer: ifd near 0, near 1, above 1."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(configuration("llama"))
    tokenizer = byte_tokenizer(tmp_path / "model", extra=CHATML)
    rng = np.random.default_rng(0)

    def row(kind):
        said, other = rng.permutation(list("abcdefgh"))[:2]
        asked = {"helps": said, "silent": "?", "misleads": other, "empty": ""}[kind]
        return {
            "messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}],
        }

    def batch(kinds):
        pairs = []
        for question, answer in (row(kind)["messages"] for kind in kinds):
            head = f"<|im_start|>user\n{question['content']}<|im_end|>\n<|im_start|>assistant\n"
            pairs.append(written(tokenizer, [(head, False), (answer["content"] + "<|im_end|>", True)]))
        return [torch.tensor(part) for part in zip(*pairs, strict=True)]

    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(120):
        optimizer.zero_grad()
        for kinds in (["helps", "silent"] * 12, ["empty"] * 12):
            ids, labels = batch(kinds)
            model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
    model.save_pretrained(tmp_path / "model")
    kinds = rng.permutation(["helps", "silent", "misleads"] * 10)
    table, _ = prepared(tmp_path / "rows", [row(kind) for kind in kinds])
    tables = {
        key: computed(tmp_path, table, Need(name), tmp_path / "model")
        for key, name in (("given", "losses"), ("alone", "response_losses"))
    }
    found = scored("ifd", tables)
    ifd, over = found["ifd"].to_numpy(), found["over_one"].to_numpy(zero_copy_only=False)
    helps, silent, misleads = (ifd[kinds == kind] for kind in ("helps", "silent", "misleads"))
    assert np.median(helps) < 0.2 < 0.7 < np.median(silent) < 1.1 < np.median(misleads)
    assert (helps[:, None] < silent).mean() > 0.85
    assert (helps[:, None] < misleads).mean() > 0.95
    assert over[kinds == "misleads"].mean() > over[kinds == "silent"].mean()


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_the_beginning_is_the_template_without_a_question(name, tmp_path):
    tokenizer = byte_tokenizer(tmp_path, extra=CHATML)
    chat = ChatFormat(tokenizer, named_template(name))
    ids = beginning_ids(chat)
    conversation = [{"role": "user", "content": ""}]
    text = tokenizer.apply_chat_template(
        conversation, chat_template=named_template(name).text, add_generation_prompt=True, tokenize=False
    )
    found = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    assert found.split() == (text or "<s>").split() or found.split() == ("<s>" + text).split()
    assert ids, "there is always a token to predict the first one from"


def test_responses_alone_by_hand():
    rows = Sequences(
        np.array([5, 6, 7, 8, 9, 1, 2, 3, 4, 3]),
        np.array([5, 6, -100, 8, 9, -100, -100, 3, 4, -100]),
        np.array([0, 5, 7, 10]),
    )
    found = responses_alone(rows, [90, 91])
    assert found.owners.tolist() == [0, 0, 2]
    assert found.sequences.ids.tolist() == [90, 91, 6, 90, 91, 8, 9, 90, 91, 4]
    assert found.sequences.labels.tolist() == [-100, -100, 6, -100, -100, 8, 9, -100, -100, 4]
    assert found.sequences.starts.tolist() == [0, 3, 7, 10]
