"""Reward models and judges that run here: against a plain forward pass, and in vLLM for real."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request

import psutil
import pytest
from reward_models import NO_SYSTEM, make_cross_encoder, make_judge, make_reward_model
from reward_tables import Listener, make_feature, make_inputs, run

from dataflex_pipeline.config.fields import Config
from dataflex_pipeline.errors import ConfigError
from dataflex_pipeline.reward.answers import JudgedAnswer
from dataflex_pipeline.reward.judge_files import JudgeFiles
from dataflex_pipeline.reward.rewarders import read_settings
from dataflex_pipeline.vllm.engine import vllm_installed

CONFIG = Config(model_name_or_path="none", device="cpu")
with_vllm = pytest.mark.skipif(not vllm_installed(), reason="vLLM is not installed")

ANSWERS = [
    JudgedAnswer(f"row {i}", "Say it.", "yes " * (1 + 3 * i), "yes", (("user", "Say it."),)) for i in range(6)
]


def judge(backend, settings, answers=ANSWERS, say=print):
    found = {}
    made = read_settings(backend, {backend: settings}).rewarder(CONFIG, say)
    with made as rewarder:
        rewarder.reward(answers, found.__setitem__)
    return [found[i] for i in range(len(answers))]


def direct_logits(folder, answer):
    """One forward pass of one conversation, written out. [labels]"""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    if tokenizer.chat_template is None:
        batch = tokenizer(answer.prompt, answer.completion, return_tensors="pt")
    else:
        text = f"[user] {answer.prompt}</s>[assistant] {answer.completion}</s>"
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        batch = {"input_ids": torch.tensor([[tokenizer.bos_token_id, *ids]])}
    with torch.no_grad():
        return model(**batch).logits[0].double()


@pytest.mark.parametrize("pad", [True, False])
@pytest.mark.parametrize("batch_tokens", [1, 150, 100000])
def test_a_reward_model_gives_what_a_plain_forward_pass_gives(tmp_path, pad, batch_tokens):
    folder = make_reward_model(tmp_path / "rm", pad=pad)
    lines = []
    settings = {"hf_model_name_or_path": str(folder), "batch_tokens": batch_tokens}
    rewards = judge("reward_model", settings, say=lines.append)
    wanted = [direct_logits(folder, answer)[0].item() for answer in ANSWERS]
    assert [reward.value for reward in rewards] == pytest.approx(wanted, abs=1e-5)
    assert len(set(wanted)) == len(wanted)
    assert any("one by one" in line for line in lines) != pad


def test_outputs_of_a_model_with_several_labels(tmp_path):
    folder = make_reward_model(tmp_path / "rm", labels=3)
    settings = {"hf_model_name_or_path": str(folder), "label": 2}
    logits = [direct_logits(folder, answer) for answer in ANSWERS]
    for output, wanted in (
        ("logit", [row[2].item() for row in logits]),
        ("sigmoid", [row[2].sigmoid().item() for row in logits]),
        ("softmax", [row.softmax(0)[2].item() for row in logits]),
    ):
        rewards = judge("reward_model", settings | {"output": output})
        assert [reward.value for reward in rewards] == pytest.approx(wanted, abs=1e-5)


def test_a_cross_encoder_gets_a_pair_of_texts(tmp_path):
    folder = make_cross_encoder(tmp_path / "bert")
    rewards = judge("reward_model", {"hf_model_name_or_path": str(folder), "label": 1})
    wanted = [direct_logits(folder, answer)[1].item() for answer in ANSWERS]
    assert [reward.value for reward in rewards] == pytest.approx(wanted, abs=1e-5)


def test_a_text_that_is_too_long_is_unscored(tmp_path):
    folder = make_reward_model(tmp_path / "rm")
    rewards = judge("reward_model", {"hf_model_name_or_path": str(folder), "max_length": 50})
    assert [reward.value is None for reward in rewards] == [False, False, True, True, True, True]
    assert "more tokens" in rewards[-1].reason


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"label": 1}, "has 1 outputs, and label: 1"),
        ({"output": "softmax"}, "softmax of one is always 1"),
    ],
)
def test_settings_that_do_not_fit_the_model(tmp_path, settings, said):
    folder = make_reward_model(tmp_path / "rm")
    with pytest.raises(ConfigError, match=said):
        judge("reward_model", {"hf_model_name_or_path": str(folder)} | settings)


def test_models_that_are_none_are_refused(tmp_path):
    folder = make_judge(tmp_path / "judge")
    with pytest.raises(ConfigError, match="is a LlamaForCausalLM"):
        judge("reward_model", {"hf_model_name_or_path": str(folder)})
    config = folder / "config.json"
    config.write_text(config.read_text().replace("ForCausalLM", "ForSequenceClassification"))
    with pytest.raises(ConfigError, match=r"lacks weights \(score.weight\)"):
        judge("reward_model", {"hf_model_name_or_path": str(folder)})
    with pytest.raises(Exception, match=r"reward_model.hf_model_name_or_path"):
        judge("reward_model", {"hf_model_name_or_path": str(tmp_path / "nowhere")})


def test_the_weights_of_the_judge_count_and_its_place_does_not(tmp_path):
    def ingredients(name):
        return make_feature("reward_model", {"hf_model_name_or_path": str(tmp_path / name)}).ingredients()

    make_reward_model(tmp_path / "a")
    before = ingredients("a")
    (tmp_path / "a").rename(tmp_path / "b")
    assert ingredients("b") == before
    make_reward_model(tmp_path / "c", labels=2)
    assert ingredients("c") != before


def test_what_a_judge_brings_beside_its_weights_counts(tmp_path):
    folder = make_judge(tmp_path / "judge")
    (folder / "generation_config.json").write_text("{}")

    def identities():
        return [JudgeFiles(str(folder), "local_vllm", trusted).identity for trusted in (False, True)]

    plain, trusted = identities()
    assert plain == trusted
    (folder / "own.py").write_text("x = 1")
    assert identities()[0] == plain
    assert identities()[1] != trusted
    (folder / "generation_config.json").write_text('{"top_k": 1}')
    assert identities()[0] != plain


def test_a_template_without_a_system_turn_gets_it_with_the_users(tmp_path):
    make_judge(tmp_path / "judge", NO_SYSTEM)
    files = JudgeFiles(str(tmp_path / "judge"), "local_vllm", False)
    text = files.chat_text([{"role": "system", "content": "S"}, {"role": "user", "content": "U"}], reply=True)
    assert text == "[user] S\n\nU</s>[assistant] "


def assert_nothing_left():
    left = [each for each in psutil.Process().children(recursive=True) if "vllm" in " ".join(each.cmdline())]
    assert not left


@with_vllm
def test_a_classifier_in_vllm_gives_what_transformers_gives(tmp_path):
    folder = make_reward_model(tmp_path / "rm", labels=2)
    settings = {"hf_model_name_or_path": str(folder), "label": 1, "max_length": 512}
    here = judge("reward_model", settings)
    there = judge("reward_model", settings | {"engine": "vllm"})
    assert [each.value for each in there] == pytest.approx([each.value for each in here], abs=1e-4)
    assert_nothing_left()


@with_vllm
@pytest.mark.slow
def test_a_judge_in_vllm_scores_under_constraint_and_again_the_same(tmp_path):
    folder = make_judge(tmp_path / "judge")
    target, generations = make_inputs(tmp_path, ["fine", "bad", None, "a " * 3000, "x", "y"])
    settings = {
        "hf_model_name_or_path": str(folder),
        "vllm_temperature": 1.0,
        "vllm_top_p": 1.0,
        "vllm_top_k": 0,
        "vllm_max_tokens": 40,
        "vllm_max_model_len": 2000,
        "max_score": 10,
    }
    feature = make_feature("local_vllm", settings, CONFIG)
    listener = Listener()
    whole = run(tmp_path / "whole", feature, target, generations, listener).to_pylist()
    assert whole[2]["reason"] == "the prompt is empty"
    assert "too long" in whole[3]["reason"]
    for number in (0, 1, 4, 5):
        row = whole[number]
        assert row["valid"]
        assert row["raw"].startswith("Score: ")
        assert row["reward"] == pytest.approx(float(row["raw"].removeprefix("Score: ")) / 10)
        assert row["backend"] == f"local_vllm {folder}"
    assert len({row["raw"] for row in whole if row["valid"]}) > 1
    parts = run(tmp_path / "parts", feature, target, generations, rows_per_part=1).to_pylist()
    assert [row["raw"] for row in parts] == [row["raw"] for row in whole]
    assert_nothing_left()


@with_vllm
@pytest.mark.slow
def test_an_unconstrained_base_model_is_asked_once_more_and_left_unscored(tmp_path):
    folder = make_judge(tmp_path / "judge", None)
    target, generations = make_inputs(tmp_path, ["fine", "bad"])
    settings = {"hf_model_name_or_path": str(folder), "structured_output": False, "vllm_max_tokens": 8}
    listener = Listener()
    feature = make_feature("local_vllm", settings, CONFIG)
    rows = run(tmp_path / "rewards", feature, target, generations, listener).to_pylist()
    assert [(row["reward"], row["attempts"], row["valid"]) for row in rows] == [(None, 2, False)] * 2
    assert all(row["raw"] is not None for row in rows)
    assert any("no chat template" in line for line in listener.lines)


@pytest.fixture
def openai_server(tmp_path):
    """vLLM's own OpenAI-compatible server on loopback."""
    folder = make_judge(tmp_path / "judge")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = (tmp_path / "server.log").open("wb")
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += [
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--served-model-name",
        "tiny",
        "--dtype",
        "float32",
    ]
    command += ["--enforce-eager", "--max-model-len", "1500", "--kv-cache-memory-bytes", str(64 << 20)]
    command += ["--api-key", "server-key-0123456789", "--gpu-memory-utilization", "0.05"]
    env = os.environ | {"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    server = subprocess.Popen(command, stdout=log, stderr=log, env=env, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + 500
        while True:
            assert time.monotonic() < until
            assert server.poll() is None, (tmp_path / "server.log").read_text()[-3000:]
            try:
                urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"{url}/health", timeout=2)
                break
            except OSError:
                time.sleep(0.5)
        yield f"{url}/v1/chat/completions"
    finally:
        os.killpg(server.pid, 9)
        server.wait()
        log.close()


@with_vllm
@pytest.mark.slow
def test_a_real_openai_compatible_server(tmp_path, openai_server, monkeypatch):
    monkeypatch.setenv("DF_API_KEY", "server-key-0123456789")
    target, generations = make_inputs(tmp_path, [f"answer {i}" for i in range(12)])
    settings = {"api_url": openai_server, "model_name": "tiny", "structured_output": True, "max_tokens": 100}
    feature = make_feature("api", settings | {"temperature": 1.0})
    rows = run(tmp_path / "rewards", feature, target, generations).to_pylist()
    scored = [row for row in rows if row["valid"]]
    assert all('"score"' in row["raw"] for row in scored)
    assert all(row["attempts"] >= 1 and row["raw"] is not None for row in rows)
    plain = make_feature("api", settings | {"structured_output": False, "max_tokens": 4})
    rows = run(tmp_path / "plain", plain, target, generations).to_pylist()
    assert all(row["attempts"] == 2 and row["raw"] is not None for row in rows if not row["valid"])
    for change, said in (({"model_name": "large"}, "404"), ({"max_tokens": 10**6}, "400")):
        with pytest.raises(Exception, match=rf"answered {said} \("):
            run(tmp_path / said, make_feature("api", settings | change), target, generations)
    monkeypatch.setenv("DF_API_KEY", "another-key-0123456789")
    with pytest.raises(Exception, match="answered 401"):
        run(tmp_path / "401", feature, target, generations)
    for path in (tmp_path / "rewards").rglob("*"):
        assert b"server-key" not in path.read_bytes()
