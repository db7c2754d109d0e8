"""The API rewarder against an endpoint that misbehaves on purpose."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest
from misbehaving_server import CLOSED, EMPTY, HALF, HTML, Behaviour, MisbehavingServer, failure, reply
from reward_tables import Listener, make_feature, make_inputs, run

from dataflex_pipeline import api
from dataflex_pipeline.errors import ConfigError
from dataflex_pipeline.reward.endpoint import EndpointError, TransientError, retry_after, words
from dataflex_pipeline.reward.pace import BudgetError
from dataflex_pipeline.reward.settings import ApiSettings

KEY = "sk-very-secret-0123456789"
FAST = {"backoff": 0.01, "timeout": 0.5, "max_retries": 3}


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("DF_API_KEY", KEY)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # must not be used for loopback
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")


def judge(tmp_path, server, completions, listener=None, **settings):
    """Run the feature over these completions; returns the table as rows."""
    target, generations = make_inputs(tmp_path, completions)
    feature = make_feature("api", {"api_url": server.url, **FAST, **settings})
    return run(tmp_path / "rewards", feature, target, generations, listener).to_pylist()


def assert_no_secret(folder: Path, *texts: str) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            assert KEY.encode() not in path.read_bytes(), path
    for text in texts:
        assert KEY not in text


def fine(number, answer):
    return reply("Score: 0.5")


def test_each_answer_is_asked_once_with_the_settings_and_the_key(tmp_path):
    completions = [f"answer-{i}" for i in range(6)]
    with MisbehavingServer(lambda number, answer: reply(f"Score: 0.{answer[-1]}")) as server:
        rows = judge(tmp_path, server, completions, model_name="judge-x", temperature=0.25, max_tokens=7)
    assert [row["reward"] for row in rows] == [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]
    assert all(row["valid"] and row["reason"] is None and row["attempts"] == 1 for row in rows)
    assert [row["raw"] for row in rows] == [f"Score: 0.{i}" for i in range(6)]
    assert {row["backend"] for row in rows} == {"api judge-x"}
    assert Counter(each.answer for each in server.log) == dict.fromkeys(completions, 1)
    for each in server.log:
        assert each.headers["Authorization"] == f"Bearer {KEY}"
        assert (each.body["model"], each.body["temperature"], each.body["max_tokens"]) == ("judge-x", 0.25, 7)
        text = each.body["messages"][-1]["content"]
        assert "the reference" in text
        assert "from 0 (useless or wrong) to 1" in text
    assert not list((tmp_path / "rewards").glob("_replies*"))
    assert_no_secret(tmp_path)


MISBEHAVIOURS = {
    "429": failure(429, "slow down"),
    "429-seconds": failure(429, "slow down", Retry_After="0.05"),
    "500": failure(500, "oops"),
    "503-plain": Behaviour(503, b"busy"),
    "hang": Behaviour(wait=5.0),
    "dribble": Behaviour(body=reply("Score: 1").body, dribble=0.1),
    "closed": CLOSED,
    "half": HALF,
    "html": HTML,
    "doubled": Behaviour(body=2 * reply("Score: 1").body),
    "no-json": Behaviour(body=b"Score: 1"),
    "array": Behaviour(body=b"[]"),
    "error-in-200": Behaviour(body=b'{"error": {"message": "overloaded"}}'),
    "content-list": Behaviour(body=b'{"choices": [{"message": {"content": ["Score: 1"]}}]}'),
}


@pytest.mark.parametrize("name", MISBEHAVIOURS)
def test_a_passing_failure_is_tried_again_and_nothing_else_is_asked_twice(tmp_path, name):
    def behave(number, answer):
        return MISBEHAVIOURS[name] if answer == "answer-1" and number < 2 else fine(number, answer)

    with MisbehavingServer(behave) as server:
        rows = judge(tmp_path, server, [f"answer-{i}" for i in range(4)])
    assert [row["reward"] for row in rows] == [0.5] * 4
    assert [row["attempts"] for row in rows] == [1, 3, 1, 1]
    assert Counter(each.answer for each in server.log) == {
        "answer-0": 1,
        "answer-1": 3,
        "answer-2": 1,
        "answer-3": 1,
    }
    assert_no_secret(tmp_path)


def test_a_reply_that_nobody_asked_for_is_taken_for_no_other_answers(tmp_path):
    """It follows the asked one on the same connection, and would be read by the next request there."""
    body = reply("Score: 1").body
    stray = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)

    def behave(number, answer):
        return replace(fine(number, answer), stray=stray + body)

    with MisbehavingServer(behave) as server:
        rows = judge(tmp_path, server, [f"answer-{i}" for i in range(8)], max_concurrency=1)
    assert [row["reward"] for row in rows] == [0.5] * 8


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_honoured_by_every_request(tmp_path, form):
    asked = 1.2 if form == "seconds" else 3.0

    def behave(number, answer):
        if answer == "answer-0" and number == 0:
            when = datetime.now(UTC) + timedelta(seconds=asked)
            value = str(asked) if form == "seconds" else format_datetime(when, usegmt=True)
            return failure(429, Retry_After=value)
        return reply("Score: 0.5", wait=0.1)

    with MisbehavingServer(behave) as server:
        rows = judge(tmp_path, server, [f"answer-{i}" for i in range(6)], max_concurrency=1)
    assert [row["reward"] for row in rows] == [0.5] * 6
    first, second = sorted(each.came for each in server.log)[:2]
    assert second - first >= asked - 1.05  # a date has whole seconds
    assert second - first >= 1.1


def test_retry_after_is_read_as_seconds_and_as_a_date():
    assert retry_after(None) is None
    assert retry_after("7") == 7
    assert retry_after("nan") is None
    assert retry_after("soon") is None
    assert retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    ahead = format_datetime(datetime.now(UTC) + timedelta(seconds=100), usegmt=True)
    assert 97 < retry_after(ahead) <= 100
    assert 97 < retry_after(ahead, "no date") <= 100


def test_a_date_is_counted_by_the_endpoints_own_clock():
    """This machine's clock may be hours off, and then the wait would be hours or nothing."""
    date, later = "Wed, 21 Oct 2015 07:28:00 GMT", "Wed, 21 Oct 2015 07:28:30 GMT"
    assert retry_after(later, date) == 30
    assert retry_after(date, later) == 0
    assert retry_after("7", date) == 7


def test_an_endpoint_that_asks_for_hours_ends_the_command(tmp_path):
    with (
        MisbehavingServer(lambda number, answer: failure(429, Retry_After="7200")) as server,
        pytest.raises(EndpointError, match=r"asks to wait 7200 s") as caught,
    ):
        judge(tmp_path, server, ["answer-0", "answer-1"])
    assert "429" in caught.value.what
    assert_no_secret(tmp_path, str(caught.value))


UNSCORED = {
    "nan": ("NaN", "the judge's reply holds no score"),
    "eight": ("Score: eight", "the judge's score is not a number"),
    "empty-choices": (None, "the judge's reply is empty"),
    "null": ("", "the judge's reply is empty"),
    "outside": ("Score: 8", "the judge's score is outside the scale"),
    "page": ("<html>Score: 1</html>", "the judge's reply is a page of HTML"),
}


@pytest.mark.parametrize("name", UNSCORED)
def test_a_reply_without_a_score_is_asked_for_once_more_and_then_unscored(tmp_path, name):
    text, reason = UNSCORED[name]

    def behave(number, answer):
        if answer == "answer-1":
            return EMPTY if text is None else reply(text or None)
        return fine(number, answer)

    listener = Listener()
    with MisbehavingServer(behave) as server:
        rows = judge(tmp_path, server, [f"answer-{i}" for i in range(4)], listener)
    assert [row["reward"] for row in rows] == [0.5, None, 0.5, 0.5]
    assert rows[1] | {"seconds": 0} == rows[1] | {
        "seconds": 0,
        "raw": text or "",
        "attempts": 2,
        "valid": False,
        "reason": reason,
    }
    first, second = server.requests("answer-1")
    assert "held no score" not in first.body["messages"][-1]["content"]
    assert "held no score" in second.body["messages"][-1]["content"]
    assert len(server.log) == 5
    assert listener.lines[-1] == f"  1 of 4 answers have no reward: 1 x {reason}"


@pytest.mark.parametrize(
    ("text", "value"), [("Score: 0.8/1", 0.8), ("8/10", 0.8), ("**Score:** 0.25.", 0.25)]
)
def test_a_second_reply_with_a_score_counts(tmp_path, text, value):
    with MisbehavingServer(lambda number, answer: reply(text if number else "hm")) as server:
        rows = judge(tmp_path, server, ["answer-0", "answer-1"])
    assert [(row["reward"], row["attempts"], row["raw"]) for row in rows] == [(value, 2, text)] * 2
    assert len(server.log) == 4


FINAL = {
    400: "skip_refused: true",
    401: "environment variable",
    403: "environment variable",
    404: "model_name",
    405: "api_url",
    418: "settings",
}


@pytest.mark.parametrize("status", FINAL)
def test_another_status_is_final_and_what_had_arrived_is_kept(tmp_path, status):
    said = f"Incorrect API key provided: {KEY}"

    def behave(number, answer):
        return failure(status, said) if answer == "answer-2" else reply("Score: 0.5")

    completions = [f"answer-{i}" for i in range(4)]
    with MisbehavingServer(behave) as server, pytest.raises(EndpointError) as caught:
        judge(tmp_path, server, completions, max_concurrency=1)
    error = caught.value
    assert f"{server.url} answered {status}" in error.what
    assert "Incorrect API key provided: (a secret, not shown)" in error.what
    assert FINAL[status] in error.fix
    assert "the same command goes on from there" in error.fix
    assert [each.answer for each in server.log][:3] == completions[:3]
    assert_no_secret(tmp_path, str(error), repr(error))

    with MisbehavingServer(fine) as second:  # another port: the journal stands in the same folder
        target, generations = make_inputs(tmp_path, completions)
        feature = make_feature("api", {"api_url": second.url, **FAST})
        kept = make_feature("api", {"api_url": server.url}).ingredients()
        feature.ingredients = lambda: kept
        rows = run(tmp_path / "rewards", feature, target, generations).to_pylist()
    assert [row["reward"] for row in rows] == [0.5] * 4
    assert not {each.answer for each in second.log} & {"answer-0", "answer-1"}


def test_a_failure_that_stays_names_endpoint_status_and_attempts(tmp_path):
    with (
        MisbehavingServer(lambda number, answer: failure(503, "full")) as server,
        pytest.raises(EndpointError) as caught,
    ):
        judge(tmp_path, server, ["answer-0", "answer-1"], max_concurrency=1)
    assert f"{server.url} failed 4 times; the last time: status 503 (full)" in caught.value.what
    assert len(server.log) == 4


def test_nobody_at_home(tmp_path):
    with MisbehavingServer(fine) as server:
        pass
    with pytest.raises(EndpointError, match="ConnectError"):
        judge(tmp_path, server, ["answer-0", "answer-1"])


def test_redirects_are_not_followed(tmp_path):
    with (
        MisbehavingServer(fine) as other,
        MisbehavingServer(
            lambda n, a: Behaviour(307, headers=(("Location", other.url + "?sig=abc"),))
        ) as server,
        pytest.raises(EndpointError) as caught,
    ):
        judge(tmp_path, server, ["answer-0", "answer-1"])
    assert f"redirects to {other.url}." in caught.value.what
    assert "sig=abc" not in str(caught.value)
    assert not other.log


def test_refused_answers_may_be_skipped(tmp_path):
    def behave(number, answer):
        return failure(400, "too long") if answer == "answer-1" else fine(number, answer)

    with MisbehavingServer(behave) as server:
        rows = judge(tmp_path, server, ["answer-0", "answer-1"], skip_refused=True)
    assert [row["reward"] for row in rows] == [0.5, None]
    assert rows[1]["reason"] == "the endpoint refused it with status 400"
    assert len(server.log) == 2


def test_the_budget_holds_and_the_next_command_goes_on(tmp_path):
    completions = [f"answer-{i}" for i in range(10)]
    with MisbehavingServer(fine) as server:
        with pytest.raises(BudgetError, match=r"4 requests were sent\. 6 answers are left") as caught:
            judge(tmp_path, server, completions, max_requests=4, max_concurrency=3)
        assert len(server.log) == 4
        assert caught.value.left == 6
        target, generations = make_inputs(tmp_path, completions)
        listener = Listener()
        feature = make_feature("api", {"api_url": server.url, **FAST, "max_requests": 6})
        rows = run(tmp_path / "rewards", feature, target, generations, listener).to_pylist()
    assert [row["reward"] for row in rows] == [0.5] * 10
    assert Counter(each.answer for each in server.log) == dict.fromkeys(completions, 1)
    assert "  4 of 10 answers of this part were judged before" in listener.lines


def test_the_processes_of_a_launch_share_the_budget(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    completions = [f"answer-{i}" for i in range(5)]
    listener = Listener()
    with MisbehavingServer(fine) as server:
        with pytest.raises(BudgetError, match="2 requests were sent"):
            judge(tmp_path, server, completions, listener, max_requests=8)
        assert len(server.log) == 2
        assert any("shared by 3 processes: each sends at most 2" in line for line in listener.lines)
        too_small = ApiSettings(api_url=server.url, max_requests=2)
        with pytest.raises(ConfigError, match="max_requests: 2 was set, and 3 processes"):
            too_small.check()


def test_the_budget_tells_rows_of_other_parts(tmp_path):
    target, generations = make_inputs(tmp_path, [f"answer-{i}" for i in range(10)])
    with MisbehavingServer(fine) as server:
        feature = make_feature("api", {"api_url": server.url, **FAST, "max_requests": 5})
        with pytest.raises(BudgetError, match="3 answers are left without a reward, and 1 rows beyond"):
            run(tmp_path / "rewards", feature, target, generations, rows_per_part=2)


def test_requests_per_minute_spaces_requests_evenly(tmp_path):
    with MisbehavingServer(fine) as server:
        judge(tmp_path, server, [f"answer-{i}" for i in range(6)], requests_per_minute=600)
    came = sorted(each.came for each in server.log)
    assert came[-1] - came[0] >= 5 * 0.1 * 0.9


def test_concurrency_is_used_and_bounded(tmp_path):
    with MisbehavingServer(lambda number, answer: reply("Score: 1", wait=0.15)) as server:
        judge(tmp_path, server, [f"answer-{i}" for i in range(12)], max_concurrency=4)
        assert server.most_busy == 4


def test_structured_output_asks_for_json(tmp_path):
    with MisbehavingServer(lambda number, answer: reply('{"score": 5}')) as server:
        rows = judge(tmp_path, server, ["answer-0", "answer-1"], structured_output=True, max_score=10)
    assert [row["reward"] for row in rows] == [0.5, 0.5]
    schema = server.log[0].body["response_format"]["json_schema"]["schema"]
    assert schema["required"] == ["score"]
    assert "to 10" in server.log[0].body["messages"][-1]["content"]


def test_lines_without_an_answer_are_not_asked(tmp_path):
    with MisbehavingServer(fine) as server:
        rows = judge(tmp_path, server, ["answer-0", None, "answer-2", "answer-3"])
    assert [row["reward"] for row in rows] == [0.5, None, 0.5, 0.5]
    assert rows[1]["reason"] == "the prompt is empty"
    assert rows[1]["attempts"] is None
    assert len(server.log) == 3


def test_the_reference_answer_is_judged_once_per_row(tmp_path):
    def behave(number, answer):
        return reply("Score: 0.9" if answer.startswith("answer-ref") else "Score: 0.5")

    target, generations = make_inputs(
        tmp_path, ["answer-0", "answer-1", "answer-2", None], ["answer-ref-a", "answer-ref-b"]
    )
    with MisbehavingServer(behave) as server:
        feature = make_feature(
            "api",
            {"api_url": server.url, "prompt_with_reference": "<{completion}> {reference}", **FAST},
            reference=True,
        )
        rows = run(tmp_path / "rewards", feature, target, generations).to_pylist()
    assert [row["reward"] for row in rows] == [0.5, 0.5, 0.5, None]
    assert [row["reference_reward"] for row in rows] == [0.9] * 4
    assert Counter(each.answer for each in server.log) == dict.fromkeys(
        ["answer-0", "answer-1", "answer-2", "answer-ref-a", "answer-ref-b"], 1
    )


def test_equal_answers_to_a_prompt_are_judged_once(tmp_path):
    completions = ["answer-a", "answer-a", "answer-a", "answer-b"]
    target, generations = make_inputs(tmp_path, completions, ["answer-c", "answer-b"])
    with MisbehavingServer(lambda number, answer: reply(f"Score: 0.{'abc'.index(answer[-1])}")) as server:
        feature = make_feature(
            "api", {"api_url": server.url, "show_reference": False, **FAST}, reference=True
        )
        rows = run(tmp_path / "rewards", feature, target, generations).to_pylist()
    assert [row["reward"] for row in rows] == [0.0, 0.0, 0.0, 0.1]
    assert [row["attempts"] for row in rows] == [1, 0, 1, 1]
    assert [row["reference_reward"] for row in rows] == [0.2, 0.2, 0.1, 0.1]
    assert Counter(each.answer for each in server.log) == {"answer-a": 2, "answer-b": 1, "answer-c": 1}


def test_another_text_under_the_same_number_is_asked_anew(tmp_path):
    """A journal left by generations that were made again (another device) does not lend its rewards."""
    with MisbehavingServer(lambda n, a: failure(404) if a == "answer-3" else fine(n, a)) as server:
        with pytest.raises(EndpointError):
            judge(tmp_path / "a", server, ["answer-0", "answer-1", "answer-2", "answer-3"], max_concurrency=1)
        journal = next((tmp_path / "a" / "rewards").glob("_replies*"))
        (tmp_path / "b" / "rewards").mkdir(parents=True)
        (tmp_path / "b" / "rewards" / journal.name).write_bytes(journal.read_bytes()[:-20])  # a torn line too
        server.behave = lambda number, answer: reply("Score: 1")
        del server.log[:]
        rows = judge(tmp_path / "b", server, ["answer-9", "answer-1", "answer-2", "answer-3"])
    assert [row["reward"] for row in rows] == [1.0, 0.5, 1.0, 1.0]
    assert sorted(each.answer for each in server.log) == ["answer-2", "answer-3", "answer-9"]


def test_a_missing_key_is_told_before_anything_is_asked(tmp_path, monkeypatch):
    monkeypatch.delenv("DF_API_KEY")
    with MisbehavingServer(fine) as server:
        feature = make_feature("api", {"api_url": server.url})
        with pytest.raises(ConfigError, match="DF_API_KEY names an environment variable that is not set"):
            feature.check(api.Need("rewards", "target"), 1)
        with pytest.raises(ConfigError):
            judge(tmp_path, server, ["answer-0", "answer-1"])
        assert not server.log
        rows = judge(tmp_path / "none", server, ["answer-0", "answer-1"], api_key=None)
    assert [row["reward"] for row in rows] == [0.5, 0.5]
    assert "Authorization" not in server.log[0].headers


@pytest.mark.parametrize("value", ["sk-1234567890 ", "a b", "kéy", "x\ny"])
def test_a_key_that_cannot_be_one_is_not_shown(monkeypatch, value):
    monkeypatch.setenv("DF_API_KEY", value)
    with pytest.raises(ConfigError) as caught:
        make_feature("api", {}).check(api.Need("rewards", "target"), 1)
    assert value not in str(caught.value)


def test_words_of_a_completion():
    assert words(b'{"choices": [{"message": {"content": "x"}}]}', "") == "x"
    assert words(b'{"choices": [{"message": {"content": null}}]}', "") == ""
    for content in (
        b"null",
        b'{"choices": [{}]}',
        b'{"choices": {"a": 1}}',
        b'{"choices": [{"message": 3}]}',
    ):
        with pytest.raises(TransientError):
            words(content, "text/html")


def test_a_first_reply_without_a_score_is_kept_before_the_second_is_asked_for(tmp_path):
    completions = ["answer-0", "answer-1"]

    def behave(number, answer):
        if answer == "answer-1":
            return fine(number, answer)
        return [reply("hm"), failure(404), reply("Score: 0.25")][number]

    with MisbehavingServer(behave) as server:
        with pytest.raises(EndpointError):
            judge(tmp_path, server, completions)
        target, generations = make_inputs(tmp_path, completions)
        feature = make_feature("api", {"api_url": server.url, **FAST})
        rows = run(tmp_path / "rewards", feature, target, generations).to_pylist()
    assert [(row["reward"], row["attempts"]) for row in rows] == [(0.25, 2), (0.5, 1)]
    asked = [each.body["messages"][-1]["content"] for each in server.requests("answer-0")]
    assert ["held no score" in text for text in asked] == [False, True, True]
    assert len(server.requests("answer-1")) == 1


@pytest.fixture
def interruptible():
    """SIGINT as in a terminal, also where the tests were started in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_keeps_the_replies_under_way(tmp_path):
    completions = [f"answer-{i}" for i in range(10)]
    target, generations = make_inputs(tmp_path, completions)
    interrupted = threading.Event()

    def held(number, answer):
        interrupted.wait(60)
        return reply("Score: 1")

    def interrupt_when_three_are_under_way():
        while len(server.log) < 3:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.5)  # the interrupt is taken while the three are held
        interrupted.set()

    with MisbehavingServer(held) as server:
        feature = make_feature("api", {"api_url": server.url, "max_concurrency": 3})
        threading.Thread(target=interrupt_when_three_are_under_way).start()
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "rewards", feature, target, generations)
        asked = {each.answer for each in server.log}
        assert len(asked) == 3
        run(tmp_path / "rewards", feature, target, generations)
    assert Counter(each.answer for each in server.log) == dict.fromkeys(completions, 1)


def test_a_full_disk_ends_the_work(tmp_path, monkeypatch):
    def full(self, answer, reward):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dataflex_pipeline.reward.journal.Journal.keep", full)
    with MisbehavingServer(fine) as server, pytest.raises(OSError, match="No space left"):
        judge(tmp_path, server, [f"answer-{i}" for i in range(40)], max_concurrency=2)
    assert len(server.log) <= 4  # not paid for on and on


CHILD = """
import sys
from pathlib import Path
sys.path[:0] = {path!r}
from reward_tables import make_feature, make_inputs, run
folder = Path({folder!r})
target, generations = make_inputs(folder / "inputs", {completions!r})
feature = make_feature("api", {{"api_url": {url!r}, "max_concurrency": 4, "timeout": 30}})
run(folder / "rewards", feature, target, generations, rows_per_part=3)
"""


@pytest.mark.slow
def test_sigkill_while_rewarding_and_no_answered_request_is_repeated(tmp_path):
    completions = [f"answer-{'hold-' if i >= 8 else ''}{i}" for i in range(20)]
    log = tmp_path / "server.jsonl"
    here = Path(__file__).resolve().parents[1] / "support"
    server = subprocess.Popen(
        [sys.executable, here / "misbehaving_server.py", log], stdout=subprocess.PIPE, text=True
    )
    try:
        url = server.stdout.readline().strip()
        code = CHILD.format(path=[str(here)], folder=str(tmp_path), completions=completions, url=url)
        child = subprocess.Popen([sys.executable, "-c", code])
        journal = tmp_path / "rewards" / "_replies-00000003.jsonl"
        until = time.monotonic() + 60
        while not (journal.exists() and journal.read_bytes().count(b"\n") >= 2):  # 8 of 20 are answered
            assert time.monotonic() < until
            assert child.poll() is None
            time.sleep(0.02)
        held = {json.loads(line)[1] for line in log.read_text().splitlines()} - set(completions[:8])
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert held
        before = log.read_text().splitlines()
        Path(f"{log}.go").touch()
        subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    finally:
        os.kill(server.pid, signal.SIGKILL)
        server.wait()
    after = [json.loads(line) for line in log.read_text().splitlines()[len(before) :]]
    asked_again = {answer for event, answer in after if event == "asked"}
    assert asked_again == set(completions[8:])
    assert Counter(answer for event, answer in after if event == "asked").most_common(1)[0][1] == 1
    target, generations = make_inputs(tmp_path / "inputs", completions)
    feature = make_feature("api", {"api_url": url})
    rows = run(tmp_path / "rewards", feature, target, generations, rows_per_part=3).to_pylist()
    assert [row["reward"] for row in rows] == [0.25] * 20
    assert not list((tmp_path / "rewards").glob("_*"))
    assert_no_secret(tmp_path)
