"""Metrics against values worked out by hand, functions of one's own, and the table that comes of them."""

from __future__ import annotations

import math

import pytest
from reward_tables import Listener, make_feature, make_inputs, run

from dataflex_pipeline.errors import ConfigError, UserError
from dataflex_pipeline.reward import Answer
from dataflex_pipeline.reward.metric import MetricRewarder
from dataflex_pipeline.reward.metric_functions import Words
from dataflex_pipeline.reward.settings import MetricSettings


def rewards(name, *pairs, **settings):
    """Judge (completion, reference) pairs."""
    found = {}
    answers = [Answer(f"row {i}", "prompt", done, wanted) for i, (done, wanted) in enumerate(pairs)]
    with MetricRewarder(MetricSettings(name=name, **settings), None, print) as rewarder:
        rewarder.reward(answers, found.__setitem__)
    return [found[i].value for i in range(len(pairs))]


def test_exact_match():
    pairs = (" Paris\n", "Paris"), ("paris", "Paris"), ("Paris, France", "Paris"), ("Paris", None)
    assert rewards("exact_match", *pairs) == [1, 0, 0, None]


def test_contains():
    assert rewards("contains", ("It is Paris.", " Paris "), ("Rome", "Paris"), ("x", None)) == [1, 0, None]


def test_valid_json():
    texts = ['{"a": [1, null]}', " 3 ", "{'a': 1}", '{"a": NaN}', "", "```json\n{}\n```", "[" * 100_000]
    assert rewards("valid_json", *((text, None) for text in texts)) == [1, 1, 0, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("completion", "reference", "value"),
    [
        ("6 x 7 = 42.", "#### 42", 1),
        ("about $1,234.50 in all", "1234.5", 1),
        ("-3", "3", 0),
        ("from 10-2 on", "2", 1),
        ("it is x=-0.5", "-.5", 1),
        ("1/3 = 0.33333333", "0.3333333", 1),
        ("0.3333", "0.3334", 0),
        ("no idea", "3", 0),
        ("3", "no number", None),
        ("3", None, None),
    ],
)
def test_numeric_compares_the_last_numbers(completion, reference, value):
    assert rewards("numeric", (completion, reference)) == [value]


def test_f1_by_hand():
    """Common words count as often as both have them; P and R by hand, F = 2PR / (P + R)."""
    pairs = [("a b b", "b b b c"), ("same words", "words same"), ("x", "y"), ("", "y")]
    p, r = 2 / 3, 2 / 4  # b twice in common
    assert rewards("f1", *pairs) == pytest.approx([2 * p * r / (p + r), 1.0, 0.0, 0.0])


def test_rouge_l_by_hand():
    # the longest common subsequence is "police gunman" (2 words): precision 2/4, recall 2/4,
    # F = 1/2. Identical: 1. Nothing in common: 0. Chinese: 5 of 6 characters.
    pairs = (
        ("police ended the gunman", "police killed a gunman"),
        ("The cat!", "the cat"),
        ("dog", "cat"),
        ("今天天气好", "今天天气很好"),
    )
    p, r = 5 / 5, 5 / 6
    assert rewards("rouge_l", *pairs) == pytest.approx([0.5, 1.0, 0.0, 2 * p * r / (p + r)])


def test_the_words_of_rouge_are_rouge_scores_own_on_ascii():
    from rouge_score.tokenizers import DefaultTokenizer

    text = "Don't stop: 3.5 e-mails, snake_case & Üb... no! x2"
    ours = Words().tokenize(text)
    assert [word for word in ours if word.isascii()] == [
        word for word in DefaultTokenizer().tokenize(text) if word != "b"
    ]
    assert "üb" in ours


def test_chrf_by_hand():
    # "ab" against "abc": n=1 P=2/2 R=2/3, n=2 P=1/1 R=1/2; orders without n-grams are left out; averages
    # P = 1, R = 7/12; beta = 2: F = 5 P R / (4 P + R).
    p, r = 1.0, 7 / 12
    value = rewards("chrf", ("ab", "abc"), ("same", "same"), ("xyz", "abc"))
    assert value == pytest.approx([5 * p * r / (4 * p + r), 1.0, 0.0])


def test_bleu_by_hand():
    # "a b c d" against "a b c d e": all four precisions are 1, brevity penalty exp(1 - 5/4).
    # "the cat" against "the cat": with effective order only n = 1, 2 count.
    value = rewards("bleu", ("a b c d", "a b c d e"), ("the cat", "the cat"))
    assert value == pytest.approx([math.exp(-0.25), 1.0])
    chinese = ("今天天气很好", "今天天气很好呀")
    assert rewards("bleu", chinese, bleu_tokenize="zh") == pytest.approx([math.exp(1 - 7 / 6)])


def test_an_unknown_tokenizer_of_bleu_is_told():
    with pytest.raises(ConfigError, match=r"bleu_tokenize: klingon(?s:.*)13a"):
        rewards("bleu", ("a", "b"), bleu_tokenize="klingon")


OWN = """
def longer(prompt, completion, reference):
    if completion == "skip":
        return None
    if completion == "boom":
        return 1 / 0
    if completion == "text":
        return "much"
    if completion == "nan":
        return float("nan")
    return len(completion) > len(reference or prompt)
"""


@pytest.fixture
def own(tmp_path):
    path = tmp_path / "own_metric.py"
    path.write_text(OWN)
    return f"{path}:longer"


def test_a_function_of_ones_own_from_a_file_and_from_a_module(own, tmp_path, monkeypatch):
    pairs = ("longer than", "short"), ("a", "bb"), ("skip", "x"), ("nan", "x"), ("seven..", None)
    assert rewards(own, *pairs) == [1, 0, None, None, 1]
    monkeypatch.syspath_prepend(tmp_path)
    assert rewards("own_metric:longer", *pairs) == [1, 0, None, None, 1]


def test_a_failing_function_is_told_with_row_and_line(own):
    with pytest.raises(UserError) as caught:
        rewards(own, ("fine", "x"), ("boom", "x"))
    assert "failed on row 1: ZeroDivisionError: division by zero" in caught.value.what
    assert "line 6 of own_metric.py (longer)" in caught.value.why
    with pytest.raises(UserError, match="returned 'much' for row 0"):
        rewards(own, ("text", "x"))


@pytest.mark.parametrize(
    ("text", "name", "said"),
    [
        ("def f(:", "f", "SyntaxError"),
        ("import nothing_of_that_name", "f", "nothing_of_that_name"),
        ("", "f", "no function f"),
        ("f = 3", "f", "no function f"),
        ("raise RuntimeError('x')", "f", "RuntimeError: x"),
    ],
)
def test_a_file_without_such_a_function_is_told(tmp_path, text, name, said):
    path = tmp_path / "broken.py"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said):
        rewards(f"{path}:{name}", ("a", "b"))


def test_another_text_of_the_function_makes_another_table(own, tmp_path):
    before = make_feature("metric", {"name": own}).ingredients()
    (tmp_path / "own_metric.py").write_text(OWN + "# changed\n")
    assert make_feature("metric", {"name": own}).ingredients() != before


def test_the_table(tmp_path):
    target, generations = make_inputs(
        tmp_path, ["Paris", "Rome", None, "x", "Bern", "Bern"], ["Paris", "Oslo", " "]
    )
    listener = Listener()
    feature = make_feature("metric", {"name": "exact_match"}, reference=True)
    table = run(tmp_path / "rewards", feature, target, generations, listener)
    assert table.schema.names == feature.schema.names
    assert all(field.metadata[b"description"] for field in feature.schema)
    rows = table.to_pylist()
    assert [row["row"] for row in rows] == [0, 0, 1, 1, 2, 2]
    assert [row["sample"] for row in rows] == [0, 1, 0, 1, 0, 1]
    assert [row["reward"] for row in rows] == [1, 0, None, 0, None, None]
    assert [row["reference_reward"] for row in rows] == [1, 1, 1, 1, None, None]
    assert [row["reason"] for row in rows] == [None, None, "the prompt is empty", None] + [
        "the row has no reference answer"
    ] * 2
    assert [row["valid"] for row in rows] == [True, True, False, True, False, False]
    assert {row["backend"] for row in rows} == {"metric exact_match"}
    assert {row["raw"] for row in rows} == {None}
    assert listener.lines == ["  2 of 7 answers have no reward: 2 x the row has no reference answer"]


def test_parts_are_the_same_whatever_their_journals_held(tmp_path, own):
    """Another division, and a journal cut anywhere, give the same table."""
    completions = ["Paris", "Rome", "x", "the reference", "Bern", None, "the reference", "y"]
    target, generations = make_inputs(tmp_path, completions)
    feature = make_feature("metric", {"name": own})
    whole = run(tmp_path / "whole", feature, target, generations)
    assert run(tmp_path / "parts", feature, target, generations, rows_per_part=1) == whole
    calls = []
    real = MetricRewarder.reward

    def die_after_three(self, answers, keep):
        def counted(position, reward):
            keep(position, reward)
            calls.append(position)
            if len(calls) == 3:
                raise KeyboardInterrupt

        real(self, answers, counted)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MetricRewarder, "reward", die_after_three)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "cut", feature, target, generations)
    journal = next((tmp_path / "cut").glob("_replies*"))
    lines = journal.read_bytes()
    for size in range(0, len(lines), 7):
        journal.write_bytes(lines[:size])
        listener = Listener()
        assert run(tmp_path / "cut", feature, target, generations, listener) == whole
        assert not journal.exists()
        (tmp_path / "cut" / "part-00000.parquet").unlink()
    journal.write_bytes(b"\x00\xff garbage\n[]\n{}\n" + lines)
    listener = Listener()
    assert run(tmp_path / "cut", feature, target, generations, listener) == whole
    assert listener.lines[0] == "  3 of 7 answers of this part were judged before"


def test_a_journal_of_a_part_that_is_there_goes_away(tmp_path):
    target, generations = make_inputs(tmp_path, ["a", "b", "c", "d"])
    feature = make_feature("metric", {"name": "contains"})
    folder = tmp_path / "rewards"
    run(folder, feature, target, generations, rows_per_part=1)
    assert not list(folder.glob("_*"))
    for number in (0, 1):
        (folder / f"_replies-{number:08d}.jsonl").write_text("left behind by a kill\n")
    (folder / "part-00001.parquet").unlink()
    run(folder, feature, target, generations, rows_per_part=1)
    assert not list(folder.glob("_*"))
