"""The demo: tokenizer and chat template, a folder made the same twice, and a model that answers."""

from __future__ import annotations

import json
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st

from dataflex_pipeline.demo import Demo, DemoSettings, ensure_demo
from dataflex_pipeline.demo.corpus import CorpusSettings, Row, make_corpus
from dataflex_pipeline.demo.make import exact_match, greedy_answers, mean_loss
from dataflex_pipeline.demo.pretrain import ModelSettings
from dataflex_pipeline.demo.skills import SKILLS, TARGET_SKILL

CORPUS = make_corpus(CorpusSettings())


@pytest.fixture(scope="session")
def loaded(demo: Demo):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(demo.model).eval(), AutoTokenizer.from_pretrained(demo.model)


def read(path: Path) -> list[Row]:
    return [Row(**json.loads(line)) for line in path.read_text("utf-8").splitlines()]


# ---------------------------------------------------------------- tokenizer and template


@pytest.mark.slow
@given(text=st.text(max_size=200))
@settings(max_examples=200, deadline=None)
def test_any_text_comes_back_exactly(loaded, text):
    tokenizer = loaded[1]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert len(ids) <= len(text.encode("utf-8"))


@pytest.mark.parametrize(
    "text",
    [
        "  two spaces",
        "line\r\nline\n",
        "细胞理论和日心说。",
        "👩‍🔬 é e\u0301",
        "▁<0x41>Ġ",
        "\x00\t\ufffd",
        "x  y ",
        "12.5%",
    ],
)
def test_awkward_text_comes_back_exactly(loaded, text):
    tokenizer = loaded[1]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_special_tokens(loaded):
    tokenizer = loaded[1]
    ids = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    assert len(ids) == 3
    assert None not in ids
    assert tokenizer("hello")["input_ids"] == tokenizer("hello", add_special_tokens=False)["input_ids"]
    assert tokenizer.tokenize("1234") == ["1", "2", "3", "4"]


def test_chat_template_of_several_turns(loaded):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi."},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Bye."},
    ]
    text = loaded[1].apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|begin|><|system|>Be brief.<|end|><|user|>Hi.<|end|><|assistant|>Hello.<|end|>"
        "<|user|>Bye.<|end|><|assistant|>"
    )


def test_chat_template_of_tools(loaded):
    messages = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "tool_calls": [{"name": "sky", "arguments": {"day": 1}}]},
        {"role": "tool", "content": "rain"},
        {"role": "assistant", "content": "Rain."},
    ]
    text = loaded[1].apply_chat_template(messages, tools=[{"name": "sky"}], tokenize=False)
    assert text == (
        '<|begin|><|system|>Tools: [{"name": "sky"}]<|end|><|user|>Weather?<|end|>'
        '<|assistant|>[{"name": "sky", "arguments": {"day": 1}}]<|end|>'
        "<|tool|>rain<|end|><|assistant|>Rain.<|end|>"
    )


def test_chat_template_refuses_an_unknown_role(loaded):
    from jinja2 import TemplateError

    with pytest.raises(TemplateError, match="unknown role wizard"):
        loaded[1].apply_chat_template([{"role": "wizard", "content": "x"}], tokenize=False)


# ---------------------------------------------------------------- the made folder


def test_files_hold_the_corpus(demo):
    assert read(demo.pool) == CORPUS.pool
    assert read(demo.target) == CORPUS.target
    assert read(demo.test) == CORPUS.test
    assert sorted(path.name for path in demo.folder.iterdir()) == [
        "README.md", "demo.json", "model", "pool.jsonl", "target.jsonl", "test.jsonl",
    ]  # fmt: skip
    assert "{" not in (demo.folder / "README.md").read_text()


def test_model_is_a_small_llama(loaded):
    import torch

    model, tokenizer = loaded
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.config.head_dim in (32, 64)
    assert model.config.max_position_embeddings >= 2048
    assert len(tokenizer) == model.config.vocab_size
    assert 1e6 < sum(p.numel() for p in model.parameters()) < 3e6
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_model_knows_what_it_was_taught_and_only_a_part_of_the_target(demo, loaded):
    model, tokenizer = loaded
    recorded = json.loads((demo.folder / "demo.json").read_text())["measured"]
    measured = exact_match(model, tokenizer, CORPUS.test)
    assert measured == pytest.approx(recorded["test_exact_match"], abs=0.01)
    assert 0.2 <= measured <= 0.5
    of = {name: [r for r in CORPUS.pool if r.skill == name and r.quality == "clean"][:40] for name in SKILLS}
    assert exact_match(model, tokenizer, of["colour"]) > 0.9
    assert exact_match(model, tokenizer, of["dorin"]) > 0.9
    assert exact_match(model, tokenizer, of["keeper"]) == 0
    assert exact_match(model, tokenizer, of["key"]) == 0


def test_exact_match_agrees_with_one_prompt_at_a_time(loaded):
    import torch

    model, tokenizer = loaded
    rows = CORPUS.test[:12]
    for row, answer in zip(rows, greedy_answers(model, tokenizer, [r.prompt for r in rows]), strict=True):
        ids = tokenizer(f"<|begin|><|user|>{row.prompt}<|end|><|assistant|>", return_tensors="pt")[
            "input_ids"
        ]
        for _ in range(32):
            with torch.no_grad():
                token = model(input_ids=ids).logits[0, -1].argmax()
            if token == tokenizer.eos_token_id:
                break
            ids = torch.cat([ids, token.view(1, 1)], dim=1)
        assert tokenizer.decode(ids[0]).partition("<|assistant|>")[2] == answer


def test_losses_order_the_rows_as_the_ground_truth_does(loaded):
    from dataflex_pipeline.demo.make import encode_rows

    model, tokenizer = loaded

    def loss(skill: str, quality: str) -> float:
        rows = [row for row in CORPUS.pool if row.skill == skill and row.quality == quality]
        return mean_loss(model, encode_rows(tokenizer, rows[:50]), tokenizer.pad_token_id)

    assert loss("dorin", "clean") < 0.2 < loss(TARGET_SKILL, "clean")
    for skill in ("dorin", "colour", TARGET_SKILL):
        assert loss(skill, "clean") + 1 < loss(skill, "mislabelled") < loss(skill, "noise")


def test_a_made_demo_is_returned_at_once(demo):
    said: list[str] = []
    assert ensure_demo(demo.folder.parent, said.append) == demo
    assert said == []


SMALL = DemoSettings(
    corpus=CorpusSettings(pool_rows=100, target_rows=8, test_rows=8),
    model=replace(ModelSettings(), vocab_size=320, hidden=32, heads=1, layers=1, intermediate=32, steps=6),
)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_made_twice_is_equal_byte_for_byte(tmp_path):
    import torch

    threads, state = torch.get_num_threads(), torch.get_rng_state()
    said: list[str] = []
    first = ensure_demo(tmp_path / "a", said.append, SMALL)
    torch.manual_seed(99)  # neither the caller's stream nor its thread count may matter
    torch.set_num_threads(1)
    second = ensure_demo(tmp_path / "b", settings=SMALL)
    assert torch.get_num_threads() == 1
    assert torch.initial_seed() == 99
    torch.set_num_threads(threads)
    torch.set_rng_state(state)
    assert first.folder.name == second.folder.name
    assert files(first.folder) == files(second.folder)
    assert any("step 6 of 6" in line for line in said)


def test_other_settings_make_another_folder(tmp_path):
    one = ensure_demo(tmp_path, settings=SMALL)
    two = ensure_demo(tmp_path, settings=replace(SMALL, model=replace(SMALL.model, steps=2)))
    assert one.folder != two.folder


def test_a_second_process_waits_for_the_first(tmp_path):
    name = ensure_demo(tmp_path / "made", settings=SMALL).folder.name
    lock = FileLock(tmp_path / f".{name}.lock")
    said: list[str] = []
    waiting = threading.Event()

    def report(line: str) -> None:
        said.append(line)
        waiting.set()

    thread = threading.Thread(target=ensure_demo, args=(tmp_path, report, SMALL))
    with lock:
        thread.start()
        assert waiting.wait(30)
        shutil.copytree(tmp_path / "made" / name, tmp_path / name)
    thread.join(60)
    assert said == ["another process is making the demo; waiting for it"]  # and it made nothing itself
    lock.acquire(timeout=0)
    lock.release()


def test_a_failure_leaves_no_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("dataflex_pipeline.demo.make.pretrain", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ensure_demo(tmp_path, settings=SMALL)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []
