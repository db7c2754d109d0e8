"""judge: rows of the pool graded 1 to 5 by an endpoint, each once, whatever it answers."""

from __future__ import annotations

import re

import pyarrow as pa
import pytest
from misbehaving_server import MisbehavingServer, failure, reply
from reward_tables import Listener, make_target

from dataflex_pipeline.api import Block, FeatureInput, Need, Selection
from dataflex_pipeline.config.fields import Config
from dataflex_pipeline.errors import ConfigError, UserError
from dataflex_pipeline.features.plan import make_feature
from dataflex_pipeline.methods import build_method, method_class
from dataflex_pipeline.pipeline.score import score_block
from dataflex_pipeline.reward.pace import BudgetError
from dataflex_pipeline.schemas import SCORES
from dataflex_pipeline.store.parts import PartsWriter


def grades_of(url, **api):
    backend = {"api_url": url, "api_key": None, "backoff": 0.01, "max_retries": 1, **api}
    given = {"reward_model_backend": "api", "reward_backend_params": {"api": backend}}
    return make_feature(Need("grades", params=given), Config(model_name_or_path="none"))


def run(folder, feature, rows, listener=None, rows_per_part=3):
    writer = PartsWriter(folder, feature.schema, {"ingredients": feature.ingredients()})
    given = FeatureInput(rows, "t", None, None, folder=folder)
    n_parts = -(-rows.n_rows // rows_per_part)
    with feature.open(given, listener or Listener()) as compute:
        for number in range(n_parts):
            if number not in writer.done:
                part = slice(number * rows_per_part, (number + 1) * rows_per_part)
                writer.write(number, compute(rows.rows(part.start, part.stop, list(feature.input_columns))))
    return pa.concat_tables([writer.read(number, feature.schema.names) for number in range(n_parts)])


@pytest.fixture
def rows(tmp_path):
    answers = [f"answer-{n}" for n in range(6)]
    return make_target(tmp_path / "pool", [f"prompt {n}" for n in range(6)], answers)


REPLIES = {
    "answer-0": "Score: 4.5",
    "answer-1": "5/5",
    "answer-2": "Score: 0",
    "answer-3": "I like it.",
    "answer-4": "Score: 1",
    "answer-5": "Score: 9",
}


def test_grades_are_the_numbers_that_the_judge_wrote(tmp_path, rows):
    with MisbehavingServer(lambda number, answer: reply(REPLIES[answer])) as server:
        found = run(tmp_path / "grades", grades_of(server.url), rows)
    assert found["grade"].to_pylist() == [4.5, 5.0, None, None, 1.0, None]
    assert found["valid"].to_pylist() == [True, True, False, False, True, False]
    assert found["reason"].to_pylist()[2] == "the judge's grade is below 1"
    assert found["reason"].to_pylist()[3] == "the judge's reply holds no score"
    assert found["raw"].to_pylist()[0] == "Score: 4.5"
    asked = [each.answer for each in server.log]
    assert {answer: asked.count(answer) for answer in asked} == {
        **dict.fromkeys(REPLIES, 1),
        "answer-3": 2,  # a reply without a grade is asked for once more
        "answer-5": 2,
    }
    messages = server.log[0].body["messages"]
    assert "from 1 to 5" in messages[1]["content"]
    assert re.search(r"<request>\nprompt \d\n</request>", messages[1]["content"])
    assert "{" not in messages[1]["content"]


def test_no_reply_is_asked_for_twice_after_a_failure_or_a_budget(tmp_path, rows):
    def broken(number, answer):
        return failure(500) if answer == "answer-4" and number < 2 else reply("Score: 3")

    with MisbehavingServer(broken) as server:
        with pytest.raises(UserError, match="500"):
            run(tmp_path / "grades", grades_of(server.url, max_concurrency=1), rows)
        before = [each.answer for each in server.log]
        found = run(tmp_path / "grades", grades_of(server.url, max_concurrency=1), rows)
        after = [each.answer for each in server.log][len(before) :]
        assert found["grade"].to_pylist() == [3.0] * 6
        assert not {*before} & {*after} - {"answer-4"}
        with pytest.raises(BudgetError, match="1 answers are left without a reward, and 3 rows beyond"):
            run(tmp_path / "again", grades_of(server.url, max_requests=2, max_concurrency=1), rows)


def test_prompts_and_scale_are_ours_unless_they_are_set(tmp_path, rows):
    mine = {"max_score": 10, "prompt": "Rate {completion} up to {max_score}", "system_prompt": ""}
    with MisbehavingServer(lambda number, answer: reply("Score: 7")) as server:
        found = run(tmp_path / "grades", grades_of(server.url, **mine), rows)
        assert found["grade"].to_pylist() == [7.0] * 6
        assert {each.body["messages"][0]["content"] for each in server.log} == {
            f"Rate answer-{n} up to 10" for n in range(6)
        }
        one, two = grades_of(server.url), grades_of(server.url, **mine)
    assert one.ingredients() != two.ingredients()


def test_errors_name_the_method_whose_settings_they_are():
    def refusal(**params):
        with pytest.raises(ConfigError) as error:
            build_method("judge", method_class("judge"), params, "a test")
        return str(error.value)

    assert "judge.reward_backend_params.apy is none" in refusal(reward_backend_params={"apy": {}})
    assert "judge.reward_model_backend is 'apy'" in refusal(reward_model_backend="apy")
    small = {"reward_model_backend": "api", "reward_backend_params": {"api": {"max_score": 1}}}
    assert "grades go from 1 to max_score" in refusal(**small)


def test_a_metric_that_compares_with_a_reference_is_refused():
    def checked(name):
        given = {"reward_model_backend": "metric", "reward_backend_params": {"metric": {"name": name}}}
        need = Need("grades", params=given)
        make_feature(need, Config(model_name_or_path="none")).check(need, 6)

    checked("valid_json")
    with pytest.raises(ConfigError, match="there is no other"):
        checked("exact_match")


def test_rows_below_the_threshold_are_left_out_by_name(tmp_path, rows):
    with MisbehavingServer(lambda number, answer: reply(REPLIES[answer])) as server:
        found = run(tmp_path / "grades", grades_of(server.url), rows)
    given = {"reward_model_backend": "metric", "at_least": 4.5}
    method = build_method("judge", method_class("judge"), given, "a test")
    assert method.begin({}, Selection(1, 1, 0, lambda line: None)) is None
    pool = pa.table(
        {
            "row": found["row"],
            "row_id": found["row_id"],
            "valid": [True] * 6,
            "reason": pa.nulls(6, pa.string()),
        }
    ).combine_chunks()
    block = Block(pool.to_batches()[0], {"grades": found.combine_chunks().to_batches()[0]})
    table = score_block(method, block, None, pa.schema([*SCORES, *method.columns]))
    assert table["score"].to_pylist() == [4.5, 5.0, None, None, None, None]
    assert table["reason"].to_pylist()[4] == "its grade 1 is below 4.5 (at_least)"
    assert table["grade"].to_pylist()[:3] == [4.5, 5.0, None]
