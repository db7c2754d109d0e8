"""What a judge is asked, how its reply is read, and the settings of the backends."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from reward_tables import make_feature

from dataflex_pipeline.errors import ConfigError
from dataflex_pipeline.reward import Answer
from dataflex_pipeline.reward.address import check_url
from dataflex_pipeline.reward.answers import JudgedAnswer, conversation_text
from dataflex_pipeline.reward.judge_prompts import judge_messages, score_pattern
from dataflex_pipeline.reward.judge_replies import parse_score
from dataflex_pipeline.reward.local_vllm import LocalVllmRewarder
from dataflex_pipeline.reward.rewarders import read_settings
from dataflex_pipeline.reward.settings import ApiSettings, LocalVllmSettings

READ = [
    ("Score: 0.8/1", 1, 0.8),
    ("8/10", 1, 0.8),
    ("8/10", 5, 0.8),
    ("0.8", 1, 0.8),
    (" 0.8.\n", 1, 0.8),
    (".5", 1, 0.5),
    ("80%", 1, 0.8),
    ("8", 10, 0.8),
    ("Score: 8 out of 10", 1, 0.8),
    ("**Score:** 7.", 10, 0.7),
    ("Score (0-1): 0.25", 1, 0.25),
    ("score = 1", 1, 1.0),
    ("Score: -0", 1, 0.0),
    ("得分：0.6", 1, 0.6),
    ("It is right.\nScore: 0.8, because it is.", 1, 0.8),
    ("Score: 0.8 - well done", 1, 0.8),
    ("Well done.\n\n0.5", 1, 0.5),
    ("0.5\nIt is half right, as 3 of 6 are there.", 1, 0.5),
    ("Score: 0.4\nFinal score: 0.4", 1, 0.4),
    ("<think>Score: 0.1, no, Score: 0.7</think>\nScore: 0.9", 1, 0.9),
    ("hm, Score: 0.1</think>0.9", 1, 0.9),
    ('{"score": 0.7, "why": "Score: 3"}', 1, 0.7),
    ('```json\n{"score": "7/10"}\n```', 1, 0.7),
]
NOT_READ = [
    *["", "  ", "NaN", "nan", "inf", "eight", "Score: eight", "Score: NaN", "Score:", "Score: <number>"],
    *["Score: 0,8", "0,8", "Score: 1e-1", "1e-1", "0-1", "Score: 0-1", "Score: 0 to 1", "Score: 8 / ten"],
    *["-0.2", "Score: 1.5", "2", "12/10", "5/0", "120%", "Score: 0.8.1", "Score: 0.8/1/2", "0x1", "1" * 500],
    *["Score: 0.3 and Score: 0.4", "0.3\n0.4", "It scores 0.8 or so.", "Score: 0.5\nReward: unknown"],
    *["<html><body>Score: 1</body></html>", "<!DOCTYPE html>\n1", "<think>Score: 0.5", "[0.5]", "null"],
    *['{"score": NaN}', '{"score": true}', '{"score": null}', '{"rating": 1}', '{"score": "eight"}'],
    *['{"score": 1e400}', '{"score": ' + "9" * 400 + "}", "[" * 100_000],
]


@pytest.mark.parametrize(("reply", "max_score", "value"), READ)
def test_a_score_that_can_only_mean_one_thing_is_read(reply, max_score, value):
    assert parse_score(reply, max_score) == (pytest.approx(value, abs=1e-15), None)


@pytest.mark.parametrize("reply", NOT_READ)
def test_anything_else_is_no_score_and_never_zero(reply):
    value, reason = parse_score(reply, 1.0)
    assert value is None
    assert reason.startswith("the judge")


@given(st.text())
def test_no_text_breaks_the_parser_and_scores_stay_on_the_scale(text):
    for reply in (text, f"Score: {text}", f'{{"score": {text}}}'):
        value, reason = parse_score(reply, 7.0)
        assert (value is None) != (reason is None)
        assert value is None or 0 <= value <= 1


@given(st.integers(0, 1000), st.sampled_from([1.0, 5.0, 10.0, 100.0]))
def test_a_number_on_the_scale_is_read_back(thousandths, max_score):
    score = thousandths * max_score / 1000
    assert parse_score(f"Score: {score:.3f}", max_score)[0] == pytest.approx(thousandths / 1000, abs=1e-3)


@pytest.mark.parametrize("max_score", [1, 2, 5, 10, 100, 7.5, 20])
def test_the_structured_pattern_admits_the_scale_and_only_what_can_be_read(max_score):
    pattern = re.compile(score_pattern(max_score))
    assert pattern.fullmatch("Score: 0")
    assert pattern.fullmatch(f"Score: {max_score:g}")
    assert pattern.fullmatch("Score: 0.125")
    assert not pattern.fullmatch("Score: -1")
    if max_score in (1, 2, 5, 10, 100):
        for number in (max_score + 0.5, max_score + 1, max_score * 10):
            assert not pattern.fullmatch(f"Score: {number:g}")


ANSWER = JudgedAnswer("row 0", "What is {completion}?", "a {reference} and {prompt}", "the truth", ())


def test_texts_are_put_in_once_and_braces_in_them_are_left_alone():
    system, user = judge_messages(ANSWER, ApiSettings())
    assert system["role"] == "system"
    assert "<request>\nWhat is {completion}?\n</request>" in user["content"]
    assert "<reference>\nthe truth\n</reference>" in user["content"]
    assert "<answer>\na {reference} and {prompt}\n</answer>" in user["content"]
    assert "{max_score}" not in user["content"]


def test_prompts_with_and_without_reference():
    plain = Answer("k", "p", "c", None)
    assert "<reference>" not in judge_messages(plain, ApiSettings())[-1]["content"]
    hidden = ApiSettings(show_reference=False)
    assert "the truth" not in judge_messages(ANSWER, hidden)[-1]["content"]
    own = ApiSettings(
        system_prompt="", prompt="{completion}!", prompt_with_reference="{reference}={completion}"
    )
    assert judge_messages(plain, own) == [{"role": "user", "content": "c!"}]
    assert judge_messages(ANSWER, own)[0]["content"] == "the truth=a {reference} and {prompt}"


def test_a_template_without_the_answer_is_refused():
    with pytest.raises(ConfigError, match=r"prompt has no \{completion\}"):
        read_settings("api", {"api": {"prompt": "Grade {prompt}"}})


def test_a_conversation_as_text():
    assert conversation_text((("user", "hi"),)) == "hi"
    turns = (("system", "be"), ("user", "hi"), ("assistant", "ho"), ("user", "so"))
    assert conversation_text(turns) == "system: be\n\nuser: hi\n\nassistant: ho\n\nuser: so"


GUIDE = {
    "local_vllm": {
        "hf_model_name_or_path": "meta-llama/Llama-3.1-8B",
        "vllm_tensor_parallel_size": 1,
        "vllm_temperature": 0.0,
        "vllm_top_p": 0.9,
        "vllm_max_tokens": 512,
        "vllm_top_k": 40,
        "vllm_seed": 42,
        "vllm_max_model_len": None,
        "vllm_gpu_memory_utilization": 0.9,
    },
    "api": {
        "api_url": "https://api.openai.com/v1/chat/completions",
        "api_key": "DF_API_KEY",
        "model_name": "gpt-4o",
        "temperature": 0.0,
    },
}


@pytest.mark.parametrize("backend", ["local_vllm", "api"])
def test_the_guides_settings_are_taken_as_they_stand_and_are_the_defaults(backend):
    assert read_settings(backend, GUIDE) == read_settings(backend, {})


def test_the_chosen_backend_alone_and_no_runtime_setting_counts():
    def ingredients(**api):
        params = {"metric": {"name": "contains"}}
        feature = make_feature("api", api)
        return feature.ingredients() | {"params": feature.params.model_dump(mode="json")} | {"x": len(params)}

    same = {
        "timeout": 3,
        "max_concurrency": 2,
        "max_retries": 1,
        "requests_per_minute": 5,
        "max_requests": 9,
        "api_key": None,
        "skip_refused": True,
        "backoff": 2,
    }
    assert ingredients(**same) == ingredients()
    changes: list[dict] = [{"model_name": "x"}, {"temperature": 1}, {"prompt": "{completion}"}]
    for change in [*changes, {"max_score": 10}]:
        assert ingredients(**change) != ingredients()
    assert "skip_refused" not in str(ingredients())
    assert "api_key" not in str(ingredients())


def test_the_judges_number_format_counts_and_auto_is_said_on_a_cpu():
    def decisive(**local):
        return read_settings("local_vllm", {"local_vllm": local}).model_dump(mode="json")

    assert decisive(vllm_dtype="float32") != decisive() == decisive(vllm_dtype="auto")
    said = []
    rewarder = object.__new__(LocalVllmRewarder)
    rewarder.settings, rewarder.say = LocalVllmSettings(), said.append
    assert (rewarder._dtype("cuda"), said) == ("auto", [])
    assert rewarder._dtype("cpu") == "float32"
    assert said == ["vllm_dtype: auto becomes float32 on a CPU"]
    rewarder.settings = LocalVllmSettings(vllm_dtype="bfloat16")
    assert rewarder._dtype("cpu") == "bfloat16"


@pytest.mark.parametrize(
    ("backend", "params", "said"),
    [
        ("apo", {}, "Did you mean 'api'"),
        ("api", {"apis": {}}, "Did you mean 'api'"),
        (
            "metric",
            {"api": {"modelname": "x"}},
            "api.modelname is not a setting of api. Did you mean 'model_name'",
        ),
        ("metric", {"local_vllm": {"vllm_topk": 1}}, "Did you mean 'vllm_top_k'"),
        ("api", {"api": {"timeout": -1}}, "api.timeout is -1."),
        ("api", {"api": 3}, "api is not a mapping"),
        ("reward_model", {}, "without a model"),
        ("metric", {"metric": {"name": "exactmatch"}}, "Did you mean 'exact_match'"),
        ("metric", {"metric": {"name": "nowhere.py:f"}}, "no file nowhere.py"),
        ("metric", {"metric": {"name": "not_a_module_xyz:f"}}, "no installed module"),
        ("metric", {"metric": {"name": "json:"}}, "module:function"),
    ],
)
def test_a_wrong_setting_is_told(backend, params, said):
    with pytest.raises(ConfigError) as caught:
        read_settings(backend, params)
        make_feature(backend, params[backend]).ingredients()
    assert said in str(caught.value)


@pytest.mark.parametrize("value", ["sk-abcdef0123456789", "secretkey", 12345678, ["sk-abc"]])
def test_a_literal_key_is_refused_and_not_shown(value):
    with pytest.raises(ConfigError, match="environment variable") as caught:
        read_settings("metric", {"api": {"api_key": value}})
    shown = str(caught.value) + repr(caught.value)
    assert "12345678" not in shown
    assert "sk-abc" not in shown
    assert "secretkey" not in shown


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://judge.example/v1/chat/completions", "plain http"),
        ("http://10.0.0.3:8000/v1/chat/completions", "plain http"),
        ("https://user:hunter2@judge.example/v1", "user name, password or key"),
        ("https://judge.example/v1?api_key=hunter2", "user name, password or key"),
        ("https://judge.example/v1?sig=hunter2", "user name, password or key"),
        ("https://judge.example/v1?api-key=hunter2", "user name, password or key"),
        ("https://judge.example/v1?X-Api-Key=hunter2", "user name, password or key"),
        ("https://judge.example/v1?subscription-key=hunter2", "user name, password or key"),
        ("https://judge.example/v1?access_key=hunter2", "user name, password or key"),
        ("https://judge.example/v1?api-version=1&auth=hunter2", "user name, password or key"),
        ("https://judge.example/v1?api-version=1;sas=hunter2", "user name, password or key"),
        ("https://judge.example/v1?hunter2", "user name, password or key"),
        ("https://judge.example/v1#hunter2", "user name, password or key"),
        ("judge.example/v1", "not the address"),
        ("ftp://judge.example/hunter2", "not the address"),
        ("https://", "not the address"),
        ("https://judge.example:hunter2/v1", "not the address"),
        ("https://[::1/v1", "not the address"),
    ],
)
def test_addresses_that_are_refused(url, said):
    with pytest.raises(ConfigError, match=said) as caught:
        read_settings("api", {"api": {"api_url": url}})
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "sends_key"),
    [
        ("http://localhost:8000/v1/chat/completions", True),
        ("http://127.0.0.1:8000/v1/chat/completions", True),
        ("http://[::1]:8000/v1/chat/completions", True),
        ("http://10.0.0.3:8000/v1/chat/completions", False),
        ("https://x.openai.azure.com/openai/deployments/d/chat/completions?api-version=2024-06-01", True),
    ],
)
def test_addresses_that_are_taken(url, sends_key):
    check_url(url, sends_key=sends_key)
