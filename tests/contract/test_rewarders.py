"""What every rewarder holds: the shipped metrics, a judge behind an endpoint, and the example in the docs."""

import shutil
from pathlib import Path
from typing import ClassVar

import pyarrow.parquet as pq
import pytest
from cli_runs import done, refused, small
from misbehaving_server import MisbehavingServer, failure, reply

from dataflex_pipeline.errors import ConfigError
from dataflex_pipeline.reports.methods import describe_methods
from dataflex_pipeline.reward import Answer
from dataflex_pipeline.reward.endpoint import EndpointError
from dataflex_pipeline.reward.rewarders import read_settings
from dataflex_pipeline.testing.rewarder import RewarderContract

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "my_reward.py"
DOCS = Path(__file__).resolve().parents[2] / "docs" / "extending.md"


class TestExactMatch(RewarderContract):
    backend = "metric"
    settings: ClassVar = {"name": "exact_match"}


class TestNumeric(RewarderContract):
    backend = "metric"
    settings: ClassVar = {"name": "numeric"}


class TestBrevity(RewarderContract):
    backend = f"{EXAMPLE}:Brevity"
    settings: ClassVar = {"words": 3}


KEY = "sk-very-secret-0123456789"
SHOWN = {"prompt": "answer-0 {completion}", "prompt_with_reference": "answer-0 {completion} {reference}"}


class TestApi(RewarderContract):
    """An endpoint that repeats the key that it got, in replies and in refusals."""

    backend = "api"
    environment: ClassVar = {"DF_API_KEY": KEY}

    @pytest.fixture(autouse=True)
    def server(self, monkeypatch):
        """An endpoint whose address is the class's setting while a test runs."""
        with MisbehavingServer(lambda number, answer: reply(f"Score: 0.5\nKey: {KEY}")) as server:
            given = {"api_url": server.url, "backoff": 0.01, "max_retries": 1, **SHOWN}
            monkeypatch.setattr(type(self), "settings", given, raising=False)
            yield server

    def test_the_secret_is_in_use(self, server):
        """Or that it shows nowhere would say nothing."""
        rewards = self.judged(self.answers)[0].values()
        assert {each.headers["Authorization"] for each in server.log} == {f"Bearer {KEY}"}
        assert {(each.value, each.raw) for each in rewards} == {
            (0.5, "Score: 0.5\nKey: (a secret, not shown)")
        }

    @pytest.mark.parametrize("status", [400, 401, 500])
    def test_a_refusal_shows_no_secret(self, server, status):
        server.behave = lambda number, answer: failure(status, f"Incorrect key: {KEY}")
        with pytest.raises(EndpointError, match=rf"{status} \(Incorrect key: \(a secret, not shown\)\)"):
            self.judged(self.answers)
        self.test_no_secret_is_shown()


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with nothing but the rewarder."""
    shutil.copy2(EXAMPLE, tmp_path / "my_reward.py")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def settings(**given):
    return read_settings("my_reward.py:Brevity", {"settings": given})


def test_the_docs_show_this_very_file():
    assert EXAMPLE.read_text(encoding="utf-8").strip() in DOCS.read_text(encoding="utf-8")


def test_its_settings_are_checked_like_any_other(here):
    assert settings(words=7).words == 7
    with pytest.raises(ConfigError, match=r"words is 0\."):
        settings(words=0)
    with pytest.raises(ConfigError, match="Did you mean 'words'"):
        settings(word=1)


def test_its_settings_are_listed_with_the_method(here):
    chosen = "nice.reward_model_backend=my_reward.py:Brevity"
    (nice,) = describe_methods("nice", settings=[chosen, "nice.reward_backend_params.settings.words=7"])
    (words,) = (line for line in nice["parameters"] if line["parameter"].endswith(".settings.words"))
    assert (words["value"], words["default"]) == (7, 20)
    assert words["meaning"] == "words from which on an answer earns nothing"


def test_its_fingerprint_follows_the_file_and_the_settings(here):
    first = settings().identity(None)
    assert settings(words=3).identity(None) != first
    file = here / "my_reward.py"
    file.write_text(file.read_text() + "# changed\n")
    assert settings().identity(None) != first


@pytest.mark.parametrize(
    ("named", "why"),
    [
        ("missing.py:Brevity", "missing.py cannot be imported"),
        ("my_reward.py:Reward", "no class Reward that is an OwnRewarder"),
        ("my_reward.py:Nothing", "no class Nothing"),
        ("my_reward.py:OwnRewarder", "no method reward"),
        ("no_such_module:Brevity", "no_such_module cannot be imported"),
        (":Brevity", "cannot be imported"),
        ("brevity", "Choose one of them, or name a class of your own"),
    ],
)
def test_what_is_no_rewarder_is_refused(here, named, why):
    with pytest.raises(ConfigError, match=why):
        read_settings(named, {})


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("def rewarder(self, config, say): pass", "Settings.rewarder() of the rewarder Brevity"),
        ("def rewarder(self, config, say): return 7", "returns 7"),
        ("def cost(self, answers, each): pass", "Settings.cost() of the rewarder Brevity"),
        ("def reach(self): return 'here'", "Settings.reach() of the rewarder Brevity"),
    ],
)
def test_what_its_settings_return_is_looked_at(here, function, said):
    file = here / "my_reward.py"
    marked = "class Settings(OwnSettings):"
    assert marked in file.read_text()
    file.write_text(file.read_text().replace(marked, f"{marked}\n        {function}\n", 1))
    chosen, name = settings(), function.split("(")[0].removeprefix("def ")
    given = {"rewarder": (None, print), "cost": (3, None), "reach": ()}[name]
    with pytest.raises(ConfigError) as caught:
        getattr(chosen, name)(*given)
    assert said in caught.value.what
    assert "my_reward.py" in caught.value.what


def test_an_object_that_its_settings_make_is_held_to_the_contract_too(here):
    file = here / "my_reward.py"
    marked = "class Settings(OwnSettings):"
    own = "def rewarder(self, config, say): return Brevity(self, config, say)"
    file.write_text(file.read_text().replace(marked, f"{marked}\n        {own}\n", 1))
    file.write_text(
        file.read_text().replace(
            "            else:\n                keep(", "            else:\n                print("
        )
    )
    with settings().rewarder(None, print) as made, pytest.raises(ConfigError, match="keeps 0 rewards of 1"):
        made.reward([Answer("a", "b", "", None)], lambda position, reward: None)


def test_nice_with_it(here, tiny_demo):
    use = ("--method", "nice", "nice.reward_model_backend=my_reward.py:Brevity", "nice.mc_samples=2")
    text = refused(
        here, "round", 1, *small(tiny_demo), *use, "nice.reward_backend_params.settings.words=none"
    )
    assert "reward_backend_params.settings.words is 'none'." in text
    short = "nice.max_new_tokens=4"
    done("round", 1, *small(tiny_demo), *use, short, "nice.reward_backend_params.settings.words=5")
    (part,) = here.glob("runs/*/features/rewards-*/part-00000.parquet")
    assert set(pq.read_table(part)["backend"].to_pylist()) == {"Brevity my_reward.py"}
