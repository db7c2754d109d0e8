"""Rewarders and metrics of the user's own that break their contract: one error in three parts, by name."""

from __future__ import annotations

import pytest

from dataflex_pipeline.config.fields import Config
from dataflex_pipeline.errors import ConfigError, UserError
from dataflex_pipeline.reward import Answer
from dataflex_pipeline.reward.metric import MetricRewarder
from dataflex_pipeline.reward.rewarders import read_settings
from dataflex_pipeline.reward.settings import MetricSettings, identity_of

ANSWERS = [Answer(f"row {number}", "prompt", "completion", None) for number in range(3)]
HEAD = """
from typing import Any
from dataflex_pipeline.reward import Reward
from dataflex_pipeline.reward.own import OwnRewarder, OwnSettings

class Mine(OwnRewarder):
"""
EACH = "def reward(self, answers, keep):\n        for i, answer in enumerate(answers):\n            "
FINE = EACH + "keep(i, Reward(1.0))"


@pytest.fixture
def judged(tmp_path, monkeypatch):
    """A function that has answers judged by a class with this body, and returns the values."""
    monkeypatch.chdir(tmp_path)

    def run(*parts, settings=None):
        (tmp_path / "mine.py").write_text(HEAD + "".join(f"    {part}\n" for part in parts))
        chosen = read_settings("mine.py:Mine", {"settings": settings})
        identity_of(chosen, Config())
        chosen.check()
        kept = {}
        with chosen.rewarder(Config(), print) as rewarder:
            rewarder.reward(ANSWERS, kept.__setitem__)
        return [kept[place].value for place in range(len(ANSWERS))]

    return run


def test_what_keeps_the_contract(judged):
    assert judged(FINE) == [1.0, 1.0, 1.0]
    leaves = "def __exit__(self, kind, error, traceback):\n        return True"
    assert judged(EACH + "keep(i, Reward(None, reason='no'))", leaves) == [None] * 3
    float32 = "import numpy; keep(numpy.int64(i), Reward(numpy.float32(0.5)))"
    assert [type(value) for value in judged(EACH + float32)] == [float] * 3


@pytest.mark.parametrize(
    ("call", "what"),
    [
        ("keep(i, 1.0)", "calls keep with 1.0, which is no dataflex_pipeline.reward.Reward"),
        ("keep(i, Reward('1'))", "the value '1'"),
        ("keep(i, Reward(float('nan')))", "the value nan"),
        ("keep(i, Reward(None))", "neither a value nor a reason"),
        ("keep(i, Reward(1.0, reason='no'))", "a value and a reason"),
        ("keep(i, Reward(None, reason=3))", "raw or reason that is no text"),
        ("keep(i, Reward(1.0, attempts='x'))", "attempts or seconds"),
        ("keep(3, Reward(1.0))", "the position 3 of 3 answers"),
        ("keep(-1, Reward(1.0))", "the position -1"),
        ("keep(0.0, Reward(1.0))", "the position 0.0"),
        ("keep(0, Reward(1.0))", "the position 0 twice"),
        ("i != 1 and keep(i, Reward(1.0))", "keeps 2 rewards of 3: that of row 1 is missing"),
        ("pass", "keeps 0 rewards of 3"),
    ],
)
def test_what_is_kept(judged, call, what):
    with pytest.raises(ConfigError) as caught:
        judged(EACH + call)
    assert "reward() of the rewarder Mine" in caught.value.what
    assert "mine.py" in caught.value.what
    assert what in caught.value.what


@pytest.mark.parametrize(
    ("parts", "what"),
    [
        (["def reward(self, answers): pass"], "The program calls reward(answers, keep)"),
        (["async def reward(self, answers, keep): pass"], "an async function"),
        ([EACH + "yield 1"], "a generator"),
        ([FINE, "def __init__(self): pass"], "__init__(settings, config, say)"),
        ([FINE, "def __enter__(self): pass"], "__enter__() of the rewarder Mine"),
        ([FINE, "def __exit__(self): pass"], "__exit__(kind, error, traceback)"),
        ([FINE, "def check(self, more): pass"], "The program calls check()"),
        ([FINE, "Settings = None"], "Settings of the rewarder Mine"),
        ([FINE, "class Settings: pass"], "inherits from something else"),
        ([FINE, "class Settings(OwnSettings):\n        a: 'Nix' = 1"], "'Nix' is not defined"),
        ([FINE, "class Settings(OwnSettings):\n        a: int = 'x'"], "has the default 'x'"),
        ([FINE, "class Settings(OwnSettings):\n        a: Any = object()"], "Settings.a"),
        ([FINE, "class Settings(OwnSettings):\n        paid = 'x'"], "paid of the rewarder"),
        ([FINE, "class Settings(OwnSettings):\n        def identity(self): pass"], "identity(config)"),
        (
            [FINE, "class Settings(OwnSettings):\n        def identity(self, config): pass"],
            "cannot be written down: it is None",
        ),
    ],
)
def test_a_class_that_is_declared_wrongly(judged, parts, what):
    with pytest.raises(ConfigError) as caught:
        judged(*parts)
    assert what in str(caught.value)


def test_settings_that_are_no_names(judged):
    with pytest.raises(ConfigError, match="settings is not a mapping from names to values"):
        judged(FINE, settings={False: 1})


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("def mine(prompt): return 1", "mine takes (prompt): too many positional arguments"),
        ("async def mine(prompt, completion, reference): return 1", "mine is an async function"),
        ("def mine(prompt, completion, reference): yield 1", "mine is a generator"),
        ("mine = len", "mine takes (obj, /)"),
        ("mine = 3", "has no function mine"),
        ("import os; os.chdir('/')\ndef mine(a, b, c): return 1", "changes the working directory, to /"),
    ],
)
def test_a_metric_that_cannot_be_called(tmp_path, text, what):
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(ConfigError) as caught:
        MetricRewarder(MetricSettings(name=f"{tmp_path}/mine.py:mine"), None, print)
    assert what in str(caught.value)


def test_an_error_below_a_metric_is_told_with_the_line_of_its_file(tmp_path):
    (tmp_path / "mine.py").write_text("import json\ndef mine(a, b, c):\n    return json.loads('{')\n")
    with pytest.raises(UserError, match=r"line 3 of mine\.py"):
        MetricRewarder(MetricSettings(name=f"{tmp_path}/mine.py:mine"), None, print).reward(ANSWERS, print)


@pytest.mark.parametrize("returned", ["'0.5'", "b'1'", "[1.0]", "1j", "10 ** 400", "object()"])
def test_what_is_no_reward_of_a_metric(tmp_path, returned):
    (tmp_path / "mine.py").write_text(f"def mine(a, b, c):\n    return {returned}\n")
    with pytest.raises(UserError, match=r"returned .* for row 0"):
        MetricRewarder(MetricSettings(name=f"{tmp_path}/mine.py:mine"), None, print).reward(ANSWERS, print)
