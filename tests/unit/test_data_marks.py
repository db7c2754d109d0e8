"""What other tools write on turns: honoured, noted or refused, and counted."""

from __future__ import annotations

import pytest
from data_fixtures import PLAIN, chat, learnt, rows_of, stretches, two_answers

HEAD = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' }}{% if m.role == 'assistant' and m.reasoning_content %}"
    "{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
"""A template that writes reasoning_content, as those of Qwen 3, GLM 4.5 and others do."""
CUTS_THOUGHTS = (
    "{% for m in messages %}{% set c = m.content %}{% if m.role == 'assistant' %}"
    "{% set c = c.split('</think>')[-1] %}{% endif %}{{ '<|' + m.role + '|>' + c }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
"""The shape of the first R1 distillations' template."""
FORGETS_THOUGHTS = CUTS_THOUGHTS.replace("m.role == 'assistant' %}{% set c", "not loop.last %}{% set c")
"""Thoughts stay in the last turn only."""


# Turns that are not trained on


@pytest.mark.parametrize(
    ("mark", "shown"),
    [
        ({"weight": 0}, "weight 0"),
        ({"weight": 0.0}, "weight 0"),
        ({"weight": "0"}, "weight 0"),
        ({"loss": False}, "loss false"),
        ({"loss": "false"}, "loss false"),
        ({"loss_scale": 0.0}, "loss_scale 0"),
        ({"train": False}, "train false"),
        ({"training": False}, "training false"),
        ({"trainable": False}, "trainable false"),
        ({"train_on_turn": False}, "train_on_turn false"),
        ({"masked": True}, "masked true"),
        ({"masked": 1}, "masked 1"),
    ],
)
def test_a_turn_marked_as_not_to_be_trained_on_carries_no_labels(tmp_path, mark, shown):
    table, [marked, plain], said = rows_of(tmp_path, [two_answers(mark), PLAIN])
    end = "<|im_end|>"
    assert learnt(plain, tmp_path) == [f"Quito.{end}", f"Sorry: Lima.{end}"]
    assert learnt(marked, tmp_path) == [f"Sorry: Lima.{end}"]
    assert marked["input_ids"] == plain["input_ids"]
    assert marked["row_id"] != plain["row_id"]
    note = f"a turn marked {shown} is not trained on"
    assert (marked["note"], plain["note"]) == (note, None)
    assert table.summary["notes"] == {note: 1}
    assert f"pool: 1 rows: {note}" in said


def test_a_turn_marked_as_trained_on_is_like_any_other(tmp_path):
    marks = [{}, {"weight": 1}, {"loss": True}, {"train": None}, {"trainable": "true", "weight": 1.0}]
    marks += [{"masked": False}, {"train_on_turn": True, "masked": 0}]
    table, rows, _ = rows_of(tmp_path, [two_answers(mark) for mark in marks])
    assert len({row["row_id"] for row in rows}) == 1
    assert {row["note"] for row in rows} == {None}
    assert table.summary["notes"] == {}


def test_marks_in_sharegpt_and_of_the_last_turn(tmp_path):
    turns = [("human", "Q"), ("gpt", "A"), ("human", "R"), ("gpt", "B")]
    said = [{"from": who, "value": text} for who, text in turns]
    said[3]["weight"] = 0
    _, [row], _ = rows_of(tmp_path, [{"conversations": said}])
    assert stretches(row, tmp_path) == [
        ("<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n", False),
        ("A<|im_end|>", True),
        ("\n<|im_start|>user\nR<|im_end|>\n<|im_start|>assistant\nB<|im_end|>\n", False),
    ]


MARK_REASONS = [
    (two_answers({"weight": 0.5}), "weight of a turn is neither 0 nor 1"),
    (two_answers({"weight": "0.25"}), "weight of a turn is neither 0 nor 1"),
    (two_answers({"loss_scale": 2}), "loss_scale of a turn is neither 0 nor 1"),
    (two_answers({"loss": [1]}), "loss of a turn is a list, not a number or true or false"),
    (two_answers({"weight": 1, "train": False}), "the marks of a turn contradict each other"),
    (
        two_answers({"train_detail": [{"begin_offset": 0, "end_offset": 2, "train": False}]}),
        "marked in parts",
    ),
    (chat(("u", "Q", {"train": True}), ("a", "A", {})), "a user turn is marked to be trained on (train)"),
    (chat(("u", "Q", {"loss": True}), ("a", "A", {})), "a user turn is marked to be trained on (loss)"),
    (chat(("u", "Q", {"masked": False}), ("a", "A", {})), "a user turn is marked to be trained on (masked)"),
    (two_answers({"weight": 1, "masked": True}), "the marks of a turn contradict each other"),
    (chat(("u", "Q", {}), ("a", "A", {"weight": 0})), "every answer is marked as not to be trained on"),
]


@pytest.mark.parametrize(("row", "reason"), MARK_REASONS)
def test_a_mark_that_cannot_be_honoured_refuses_the_row(tmp_path, row, reason):
    table, [refused, good], _ = rows_of(tmp_path, [row, PLAIN])
    assert not refused["valid"]
    assert reason in refused["reason"]
    assert refused["note"] is None
    assert good["valid"]
    assert table.summary["invalid"] == 1


def test_a_last_turn_without_labels_under_mask_history(tmp_path):
    last = chat(("u", "Q", {}), ("a", "A", {}), ("u", "R", {}), ("a", "B", {"loss": False}))
    _, [refused, good], _ = rows_of(tmp_path, [last, PLAIN], mask_history=True)
    assert "the last answer is marked as not to be trained on" in refused["reason"]
    assert learnt(good, tmp_path) == ["Sorry: Lima.<|im_end|>"]


# Reasoning


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_written_learnt_and_part_of_the_row(tmp_path, key):
    data = [
        chat(("u", "1+1?", {}), ("a", "2.", {key: thought})) for thought in ("One more.", "Count.", "", None)
    ]
    table, rows, _ = rows_of(tmp_path, data, HEAD)
    assert stretches(rows[0], tmp_path) == [
        ("<|user|>1+1?</s><|assistant|>", False),
        ("<think>One more.</think>2.</s>", True),
    ]
    assert [learnt(row, tmp_path) for row in rows[2:]] == [["2.</s>"]] * 2
    assert len({row["row_id"] for row in rows}) == 3
    assert rows[2]["row_id"] == rows[3]["row_id"]
    assert table.summary["notes"] == {}


@pytest.mark.parametrize("template", ["chatml", CUTS_THOUGHTS])
def test_reasoning_that_the_template_does_not_write_refuses_the_row(tmp_path, template):
    thinks = chat(("u", "1+1?", {}), ("a", "2.", {"reasoning_content": "One more."}))
    _, [refused, _], _ = rows_of(tmp_path, [thinks, PLAIN], template)
    assert refused["reason"] == (
        "the chat template leaves out the reasoning of an answer; choose one that writes reasoning_content "
        "(such as template: qwen3), or move the reasoning into the answer's content (<think>...</think>)"
    )


def test_reasoning_of_answers_without_labels_is_noted(tmp_path):
    thinks = chat(
        ("u", "1+1?", {}),
        ("a", "2.", {"reasoning": "Sum.", "weight": 0}),
        ("u", "Sure?", {}),
        ("a", "Yes.", {}),
    )
    table, [row], _ = rows_of(tmp_path, [thinks])
    assert learnt(row, tmp_path) == ["Yes.<|im_end|>"]
    assert row["note"] == (
        "a turn marked weight 0 is not trained on; "
        "the chat template leaves out the reasoning of an answer that carries no labels"
    )
    assert list(table.summary["notes"].values()) == [1, 1]


def test_reasoning_that_is_no_text_or_not_one(tmp_path):
    data = [
        chat(("u", "Q", {}), ("a", "A", {"reasoning": {"x": "y"}})),
        chat(("u", "Q", {}), ("a", "A", {"reasoning": "one", "thinking": "two"})),
        chat(("u", "Q", {}), ("a", "A", {"reasoning_details": [{"text": "t"}]})),
        chat(("u", "Q", {"thinking": "hm"}), ("a", "A", {"reasoning": "same", "thinking": "same"})),
    ]
    _, rows, _ = rows_of(tmp_path, data, HEAD)
    assert [row["reason"] for row in rows] == [
        "reasoning of a turn is an object, not text",
        "reasoning and thinking of a turn differ; keep one of them",
        "reasoning_details of a turn is not read; write its text as reasoning_content, or remove it",
        None,
    ]
    assert learnt(rows[3], tmp_path) == ["<think>same</think>A</s>"]
    assert rows[3]["note"] == "thinking of a user turn is not used"


# What a template leaves out of answers


def test_an_answer_that_the_template_cuts_refuses_the_row(tmp_path):
    thinks = chat(("u", "1+1?", {}), ("a", "<think>\nOne more.\n</think>\n\nIt is 2.", {}))
    table, [refused, good], _ = rows_of(tmp_path, [thinks, PLAIN], CUTS_THOUGHTS)
    assert refused["reason"] == (
        "the chat template leaves out a part of an answer that is to be learnt (such as what stands before "
        "</think>); choose a named template, or correct the model's own"
    )
    assert good["valid"]
    assert table.summary["valid"] == 1


def test_an_answer_is_looked_for_in_its_own_turn(tmp_path):
    """What is cut may well stand elsewhere in the row."""
    thinks = chat(("u", "Say: <think>x</think>2", {}), ("a", "<think>x</think>2", {}))
    _, [refused, _], _ = rows_of(tmp_path, [thinks, PLAIN], CUTS_THOUGHTS)
    assert "leaves out a part of an answer" in refused["reason"]


def test_answers_without_labels_may_be_cut_and_that_is_noted(tmp_path):
    thinks = chat(
        ("u", "a", {}), ("a", "<think>1</think>b", {}), ("u", "c", {}), ("a", "<think>2</think>d", {})
    )
    table, [row], said = rows_of(tmp_path, [thinks], FORGETS_THOUGHTS, mask_history=True)
    assert stretches(row, tmp_path)[-1] == ("<think>2</think>d</s>", True)
    note = "the chat template leaves out a part of an answer that carries no labels"
    assert row["note"] == note
    assert table.summary["notes"] == {note: 1}
    assert f"pool: 1 rows: {note}" in said


@pytest.mark.parametrize(
    ("content", "write"),
    [
        (" padded \n", "m.content | trim"),
        ('tab\t"quoted" é', "m.content | tojson"),
        (
            "<think>a</think>b",
            "m.content.split('</think>')[0] + '\\n</think>\\n\\n' + m.content.split('</think>')[1]",
        ),
    ],
)
def test_answers_may_be_trimmed_spaced_and_escaped(tmp_path, content, write):
    template = (
        "{% for m in messages %}{{ '<' + m.role + '>' }}{% if m.role == 'assistant' %}{{ " + write + " }}"
        "{{ eos_token }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
    )
    _, [row], _ = rows_of(tmp_path, [chat(("u", "Q", {}), ("a", content, {}))], template)
    assert row["valid"], row["reason"]


def test_an_answer_may_begin_in_the_generation_prompt(tmp_path):
    template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|><think>' }}{% endif %}"
    )
    _, [row], _ = rows_of(tmp_path, [chat(("u", "Q", {}), ("a", "<think>t</think>A", {}))], template)
    assert learnt(row, tmp_path) == ["t</think>A</s>"]


# Other marks of a turn


def test_names_go_to_templates_that_write_them(tmp_path):
    named = chat(("u", "Q", {"name": "Bob"}), ("a", "A", {}))
    writes = HEAD.replace("{{ m.content }}", "{{ m.name + ': ' if m.name else '' }}{{ m.content }}")
    _, [row, _], _ = rows_of(tmp_path / "a", [named, PLAIN], writes)
    assert stretches(row, tmp_path / "a")[0][0] == "<|user|>Bob: Q</s><|assistant|>"
    assert row["note"] is None
    _, [row, _], _ = rows_of(tmp_path / "b", [named, PLAIN])
    assert row["note"] == "name of a turn is not written by the chat template"


def test_marks_without_a_meaning_in_training_are_noted(tmp_path):
    data = [
        chat(("u", "Q", {}), ("a", "A", {"prefix": True})),
        chat(("u", "Q", {}), ("a", "A", {"refusal": "No."})),
        chat(("u", "Q", {}), ("a", None, {"refusal": "No."})),
        chat(("u", "Q", {}), ("a", "A", {"prefix": False, "refusal": None})),
    ]
    _, rows, _ = rows_of(tmp_path, data)
    assert [row["note"] for row in rows] == [
        "prefix of a turn has no meaning in training, and is not used",
        "refusal of a turn, beside its content, is not used",
        None,
        None,
    ]
    assert rows[2]["reason"].startswith("an answer stands in 'refusal'")


def test_notes_are_counted_over_a_preparation_that_was_cut_off(tmp_path, monkeypatch):
    import importlib

    preparing = importlib.import_module("dataflex_pipeline.data.prepare")
    monkeypatch.setattr(preparing, "PART_ROWS", 4)
    monkeypatch.setattr(preparing, "CHUNK_ROWS", 2)
    data = [two_answers({"weight": 0}) if n % 3 == 0 else PLAIN for n in range(12)]
    whole, _, _ = rows_of(tmp_path / "whole", data)
    write = preparing.PartsWriter.write

    def dying(self, number, table):
        if number == 2:
            raise KeyboardInterrupt
        write(self, number, table)

    monkeypatch.setattr(preparing.PartsWriter, "write", dying)
    with pytest.raises(KeyboardInterrupt):
        rows_of(tmp_path / "cut", data)
    monkeypatch.setattr(preparing.PartsWriter, "write", write)
    table, _, said = rows_of(tmp_path / "cut", data)
    note = "a turn marked weight 0 is not trained on"
    assert table.summary["notes"] == whole.summary["notes"] == {note: 4}
    assert f"pool: 4 rows: {note}" in said
    assert table.summary == whole.summary


def test_rows_without_marks_keep_the_ids_that_they_had(tmp_path):
    _, [row], _ = rows_of(tmp_path, [chat(("u", "Q", {}), ("a", "A", {"weight": 1}))])
    assert row["row_id"] == "ca7517141ba0a552eeda10ca871c732d"


# Other keys of a turn

PLANS = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' }}"
    "{% if m.tool_plan %}{{ m['tool_plan'] + '|' }}{% endif %}"
    "{% if m.get('channel') %}{{ m.channel + '|' }}{% endif %}{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
"""A template that writes the plan of a turn, as that of Command R does."""


def test_keys_that_the_template_reads_are_written_learnt_and_part_of_the_row(tmp_path):
    from transformers import AutoTokenizer

    data = [
        chat(("u", "1+1?", {}), ("a", "2.", {"tool_plan": plan, "channel": "final"}))
        for plan in ("Add them.", "Count.")
    ]
    data.append(chat(("u", "1+1?", {}), ("a", "2.", {})))
    table, rows, _ = rows_of(tmp_path, data, PLANS)
    assert stretches(rows[0], tmp_path) == [
        ("<|user|>1+1?</s><|assistant|>", False),
        ("Add them.|final|2.</s>", True),
    ]
    theirs = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    for row, given in zip(rows, data, strict=True):
        ids = theirs.apply_chat_template(given["messages"], return_dict=False)
        assert row["input_ids"] == ids
    assert len({row["row_id"] for row in rows}) == 3
    assert table.summary["notes"] == {}


def test_keys_that_nothing_reads_are_noted_once_each_and_leave_the_row_as_it_is(tmp_path):
    unread = {"tool_plan": "Add.", "citations": [1], "mask": True, "learn": False, "empty": "", "none": None}
    data = [
        chat(("u", "Q", {"id; \u00e9": "u1"}), ("a", "A", unread), ("u", "R", {}), ("a", "B", unread)),
        chat(("u", "Q", {}), ("a", "A", {}), ("u", "R", {}), ("a", "B", {})),
    ]
    table, rows, said = rows_of(tmp_path, data)
    assert rows[0]["input_ids"] == rows[1]["input_ids"]
    assert rows[0]["row_id"] == rows[1]["row_id"]
    notes = [
        f"a turn's key '{key}' is not used"
        for key in ("id, \\xe9", "tool_plan", "citations", "mask", "learn")
    ]
    assert rows[0]["note"] == "; ".join(notes)
    assert table.summary["notes"] == dict.fromkeys(notes, 1)
    assert f"pool: 1 rows: {notes[1]}" in said


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        (
            "{% for m in messages %}{{ m.a ~ m['b'] ~ m.get('c') }}{% if 'd' in m %}{% endif %}{% endfor %}",
            "abcd",
        ),
        ("{{ messages[0].a }}{{ (messages | last).b }}{{ messages[1:][0]['c'] }}", "abc"),
        ("{% set rest = messages[1:] if x else messages %}{% for t in rest %}{{ t.a }}{% endfor %}", "a"),
        ("{% set ns = namespace(m=0) %}{% set ns.m = messages[0] %}{{ ns.m.a }}{{ ns.other.b }}", "a"),
        (
            "{% macro w(t, x) %}{{ t.a }}{{ x.b }}{% endmacro %}{{ w(messages[0], 1) }}",
            "a",
        ),
        ("{% for m in messages | selectattr('a', 'equalto', 1) %}{{ loop.previtem.b }}{% endfor %}", "ab"),
        ("{% for m in messages %}{% generation %}{{ m.a }}{% endgeneration %}{% break %}{% endfor %}", "a"),
        ("{% for m in messages %}{% for c in m.a %}{{ c.id }}{% endfor %}{% endfor %}{{ tools[0].b }}", "a"),
        ("{{ broken", ""),
    ],
)
def test_the_keys_that_a_template_reads_from_messages(text, keys):
    from dataflex_pipeline.data.chat.turns import message_keys

    assert {key for key in message_keys(text) if len(key) < 3} == set(keys)
