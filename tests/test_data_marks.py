"""What other tools write on turns and beside them: honoured, noted or refused, and counted."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_fixtures import Lines, byte_tokenizer, write_jsonl

from dataflex_pipeline.data import DataSettings, prepare, scan_sources
from dataflex_pipeline.errors import DataError

CHATML = ("<|im_start|>", "<|im_end|>")
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


def rows_of(folder: Path, data, template: str | None = "chatml", **more):
    """Prepare rows (a template's name, or its text) and return the table, its rows and what was said."""
    folder.mkdir(exist_ok=True)
    own = template is not None and "{" in template
    byte_tokenizer(folder / "tokenizer", template if own else None, extra=CHATML)
    name = "pool.parquet" if isinstance(data, pa.Table) else "pool.jsonl"
    if isinstance(data, pa.Table):
        pq.write_table(data, folder / name)
    else:
        write_jsonl(folder / name, data)
    wanted = DataSettings((name,), str(folder), None if own else template, 4096, None)
    wanted = replace(wanted, **{key: value for key, value in more.items() if key != "limits"})
    said = Lines()
    limits = {"limits": more["limits"]} if "limits" in more else {}
    table = prepare(
        wanted, scan_sources(wanted), str(folder / "tokenizer"), "d", folder / "out", "pool", said, **limits
    )
    rows = pa.Table.from_batches(table.blocks(), table.schema).to_pylist()
    return table, rows, said.said


def stretches(row, folder: Path) -> list[tuple[str, bool]]:
    """The text of a row, cut where labels begin and end."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    pairs = zip(row["input_ids"], row["labels"], strict=True)
    assert all(label in (-100, token) for token, label in zip(row["input_ids"], row["labels"], strict=True))
    return [
        (tokenizer.decode([token for token, _ in stretch], clean_up_tokenization_spaces=False), learnt)
        for learnt, stretch in groupby(pairs, key=lambda pair: pair[1] != -100)
    ]


def learnt(row, folder: Path) -> list[str]:
    return [text for text, carries in stretches(row, folder) if carries]


def chat(*turns, **beside):
    names = {"u": "user", "a": "assistant", "s": "system", "t": "tool"}
    return {
        "messages": [{"role": names[who], "content": text, **more} for who, text, more in turns],
        **beside,
    }


def two_answers(mark: dict) -> dict:
    return chat(
        ("u", "Capital of Peru?", {}), ("a", "Quito.", mark), ("u", "Sure?", {}), ("a", "Sorry: Lima.", {})
    )


PLAIN = two_answers({})


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
    (chat(("u", "Q", {}), ("a", "A", {"weight": 0})), "every answer is marked as not to be trained on"),
]


@pytest.mark.parametrize(("row", "reason"), MARK_REASONS)
def test_a_mark_that_cannot_be_honoured_refuses_the_row(tmp_path, row, reason):
    table, [refused, good], _ = rows_of(tmp_path, [row, PLAIN])
    assert not refused["valid"] and reason in refused["reason"]
    assert refused["note"] is None and good["valid"]
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
    assert good["valid"] and table.summary["valid"] == 1


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
    assert row["note"] == note and table.summary["notes"] == {note: 1}
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


# Tools

TOOL = {"type": "function", "function": {"name": "w", "parameters": {"type": "object"}}}
CALLS = (
    "{% for t in tools or [] %}[{{ t | tojson }}]{% endfor %}{% for m in messages %}{{ '<|' + m.role + '|>' }}"
    "{% if m.role == 'tool' %}{{ m.tool_call_id + '=' + m.content }}{% else %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.id + ':' + c.function.name + c.function.arguments | tojson }}{% endfor %}"
    "{% endif %}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def call(city: str, **more) -> dict:
    return {"type": "function", "function": {"name": "w", "arguments": {"c": city}}, **more}


def both(first, second, one="one", two="two"):
    """Two calls, and two results in the given order of (id, text)."""
    results = [("t", text, {} if name is None else {"tool_call_id": name}) for name, text in (first, second)]
    calls = [
        call(city, **({} if name is None else {"id": name})) for city, name in (("Rome", one), ("Oslo", two))
    ]
    return chat(
        ("u", "both?", {}), ("a", None, {"tool_calls": calls}), *results, ("a", "ok", {}), tools=[TOOL]
    )


def test_results_are_paired_with_calls_by_id(tmp_path):
    swapped = both(("two", "snow"), ("one", "sun"))
    order = both(("one", "sun"), ("two", "snow"))
    nameless = both((None, "sun"), (None, "snow"))
    table, rows, _ = rows_of(tmp_path, [swapped, order, nameless], CALLS)
    texts = ["".join(text for text, _ in stretches(row, tmp_path)) for row in rows]
    calls = '<|assistant|>call00000:w{"c": "Rome"}call00001:w{"c": "Oslo"}</s>'
    assert calls + "<|tool|>call00001=snow</s><|tool|>call00000=sun</s>" in texts[0]
    assert calls + "<|tool|>call00000=sun</s><|tool|>call00001=snow</s>" in texts[1]
    assert texts[1] == texts[2]
    assert rows[1]["row_id"] == rows[2]["row_id"] != rows[0]["row_id"]
    assert table.summary["notes"] == {}


def test_a_template_without_ids_gets_results_in_the_order_of_the_calls(tmp_path):
    table, rows, _ = rows_of(
        tmp_path, [both(("two", "snow"), ("one", "sun")), both(("one", "sun"), ("two", "snow"))], "qwen"
    )
    results = "<tool_response>\nsun\n</tool_response>\n<tool_response>\nsnow\n</tool_response>"
    assert all(results in "".join(text for text, _ in stretches(row, tmp_path)) for row in rows)
    note = "results of tool calls are written in the order of their calls, since the template has no ids"
    assert [row["note"] for row in rows] == [note, None]
    assert table.summary["notes"] == {note: 1}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            both(("three", "snow"), ("one", "sun")),
            "a tool's result has a tool_call_id that no call before it has",
        ),
        (
            both(("one", "snow"), ("one", "sun")),
            "a tool's result has a tool_call_id that was answered before",
        ),
        (
            chat(("u", "Q", {"tool_calls": [call("Rome")]}), ("a", "A", {})),
            "a user turn holds tool_calls, and only an assistant calls tools",
        ),
    ],
)
def test_a_result_of_no_call_refuses_the_row(tmp_path, row, reason):
    _, [refused, _], _ = rows_of(tmp_path, [row, PLAIN], CALLS)
    assert refused["reason"] == reason


def test_some_ids_and_calls_of_two_turns(tmp_path):
    row = chat(
        ("u", "Q", {}),
        ("a", "", {"tool_calls": [call("Rome", id="x"), call("Oslo", id="y"), call("Bern", id="z")]}),
        ("t", "snow", {"tool_call_id": "y"}),
        ("t", "sun", {}),
        ("t", "fog", {"tool_call_id": "z"}),
        ("a", "", {"tool_calls": [call("Riga", id="x"), call("Kyiv", id="y")]}),
        ("t", "hail", {"tool_call_id": "y"}),
        ("t", "rain", {"tool_call_id": "x"}),
        ("a", "ok", {}),
    )
    _, [made], _ = rows_of(tmp_path, [row], CALLS)
    text = "".join(text for text, _ in stretches(made, tmp_path))
    assert [part.split("</s>")[0] for part in text.split("<|tool|>")[1:]] == [
        "call00001=snow",
        "call00000=sun",
        "call00002=fog",
        "call00004=hail",
        "call00003=rain",
    ]


NULLS = {
    "tools": [
        {
            "type": "function",
            "function": {
                "name": "book",
                "parameters": {
                    "type": "object",
                    "properties": {"hotel": {"type": "string", "default": None, "enum": ["a", None]}},
                },
            },
        }
    ],
    "messages": [
        {"role": "user", "content": "Book Rome, no hotel."},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"function": {"name": "book", "arguments": {"city": "Rome", "hotel": None}}}],
        },
        {"role": "tool", "content": "ok"},
        {"role": "assistant", "content": "Booked."},
    ],
}


def test_nulls_of_json_files_stay_as_they_are(tmp_path):
    _, [row], _ = rows_of(tmp_path, [NULLS], CALLS)
    assert learnt(row, tmp_path)[0] == 'call00000:book{"city": "Rome", "hotel": null}</s>'
    text = stretches(row, tmp_path)[0][0]
    assert '"hotel": {"type": "string", "default": null, "enum": ["a", null]}' in text
    assert json.loads(row["messages"][1]["content"])["arguments"] == {"city": "Rome", "hotel": None}
    assert row["note"] is None


def test_nulls_of_columnar_files_are_padding_unless_they_are_json_text(tmp_path):
    padded = pa.Table.from_pylist([NULLS])
    _, [row], _ = rows_of(tmp_path / "padded", padded, CALLS)
    assert learnt(row, tmp_path / "padded")[0] == 'call00000:book{"city": "Rome"}</s>'
    assert '"hotel": {"type": "string", "enum": ["a", null]}' in stretches(row, tmp_path / "padded")[0][0]
    assert row["note"] == (
        "a null argument of a tool call is read as the padding of a columnar file, and left out"
    )
    as_text = pa.Table.from_pylist([{key: json.dumps(value) for key, value in NULLS.items()}])
    _, [spelt], _ = rows_of(tmp_path / "text", as_text, CALLS)
    _, [plain], _ = rows_of(tmp_path / "json", [NULLS], CALLS)
    assert spelt["row_id"] == plain["row_id"] and spelt["note"] is None
    assert spelt["input_ids"] == plain["input_ids"]


def test_calls_that_the_template_does_not_write_whole_refuse_the_row(tmp_path):
    lossy = CALLS.replace("c.function.arguments | tojson", "c.function.arguments.keys() | first")
    nameless = CALLS.replace("+ ':' + c.function.name", "")
    toolless = CALLS.replace("[{{ t | tojson }}]", "")
    for number, template in enumerate((lossy, nameless, toolless)):
        _, [row, _], _ = rows_of(tmp_path / str(number), [both(("one", "a"), ("two", "b")), PLAIN], template)
        assert row["reason"].startswith(
            "the chat template leaves out a tool's definition"
            if template == toolless
            else "the chat template leaves out a tool call's name or one of its arguments"
        )


def test_older_forms_of_calls_and_roles(tmp_path):
    old = chat(
        ("s", "Be kind.", {}),
        ("u", "Weather?", {}),
        ("a", None, {"function_call": {"name": "w", "arguments": '{"c": "Rome"}'}}),
        ("t", "sun", {}),
        ("a", "Sunny.", {}),
        functions=[TOOL["function"]],
    )
    new = chat(
        ("s", "Be kind.", {}),
        ("u", "Weather?", {}),
        ("a", None, {"tool_calls": [call("Rome")]}),
        ("t", "sun", {}),
        ("a", "Sunny.", {}),
        tools=[TOOL],
    )
    old["messages"][0]["role"], old["messages"][3]["role"] = "developer", "function"
    _, rows, _ = rows_of(tmp_path, [old, new], CALLS)
    assert rows[0]["row_id"] == rows[1]["row_id"]
    assert rows[0]["input_ids"] == rows[1]["input_ids"]
    assert rows[0]["note"] == "a turn of role developer is read as the system prompt"


# Columns beside the conversation


def test_answers_labelled_bad_are_refused(tmp_path):
    data = [
        {"prompt": "Is fire cold?", "completion": "Yes.", "label": False},
        {"prompt": "Is ice cold?", "completion": "Yes.", "label": True},
        {"prompt": "Is ice cold?", "completion": "Yes."},
    ]
    table, [bad, good, plain], _ = rows_of(tmp_path, data)
    assert not bad["valid"] and bad["reason"].startswith("label is false: the answer is marked as a bad one")
    assert good["valid"] and good["row_id"] == plain["row_id"]
    note = "label is not used further: the answer is trained on as it is"
    assert (good["note"], plain["note"]) == (note, None)
    assert table.summary["notes"] == {note: 1}


@pytest.mark.parametrize(
    ("beside", "refused"),
    [
        ({"label": False}, True),
        ({"label": "False"}, True),
        ({"kto_tag": False}, True),
        ({"kto_tag": 0}, True),
        ({"kto_tag": True}, False),
        ({"label": 0}, False),
        ({"label": "sports"}, False),
    ],
)
def test_labels_of_conversations(tmp_path, beside, refused):
    _, [row, _], _ = rows_of(tmp_path, [{**PLAIN, **beside}, PLAIN])
    assert row["valid"] is not refused


@pytest.mark.parametrize("key", ["rejected", "rejected_response", "rejected_messages"])
def test_the_worse_half_of_a_pair_is_noted(tmp_path, key):
    worse = {"rejected_messages": [{"role": "assistant", "content": "No."}]}.get(key, "No.")
    table, [pair, plain], _ = rows_of(tmp_path, [{**PLAIN, key: worse}, {**PLAIN, key: None}])
    note = f"{key}, the worse answer of a preference pair, is not used"
    assert (pair["note"], plain["note"]) == (note, None)
    assert pair["row_id"] == plain["row_id"]
    assert table.summary["notes"] == {note: 1}


@pytest.mark.parametrize(
    "beside",
    [
        {"images": ["cat.jpg"]},
        {"images": '["cat.jpg"]'},
        {"images": [{"bytes": None, "path": "cat.jpg"}]},
        {"videos": ["cat.mp4"]},
        {"audios": ["cat.wav"]},
        {"image": {"bytes": "abc", "path": None}},
        {"image": "cat.jpg"},
    ],
)
def test_rows_with_images_sound_or_videos_are_refused(tmp_path, beside):
    shows = chat(("u", "<image>What is on it?", {}), ("a", "A cat.", {}), **beside)
    _, [row, _], _ = rows_of(tmp_path, [shows, PLAIN])
    assert row["reason"] == f"the row has {next(iter(beside))}, and only text is trained on"


@pytest.mark.parametrize("empty", [[], None, "", "[]", [None], [{"bytes": None, "path": None}]])
def test_an_empty_column_of_images_is_nothing(tmp_path, empty):
    table, [row], _ = rows_of(tmp_path, [{**PLAIN, "images": empty}])
    assert row["valid"] and row["note"] is None
    assert table.summary["notes"] == {}


def test_media_in_a_turn_refuse_the_row(tmp_path):
    data = [chat(("u", "Q", {key: ["x"]}), ("a", "A", {})) for key in ("images", "audio")]
    _, rows, _ = rows_of(tmp_path, [*data, PLAIN])
    assert [row["reason"] for row in rows] == [
        "a turn holds images, and only text is trained on",
        "a turn holds audio, and only text is trained on",
        None,
    ]


def test_columns_without_a_use_are_noted(tmp_path):
    beside = {"weight": 0.3, "image": "cat.jpg", "parallel_tool_calls": False}
    table, [row], _ = rows_of(tmp_path, [{**PLAIN, **beside}])
    assert row["valid"] and row["note"].split("; ") == [
        "column image is not used: only text is trained on",
        "column weight is not used: what a row weighs is up to the method",
        "parallel_tool_calls is not used: it has no meaning in training",
    ]


def test_thoughts_beside_an_alpaca_answer_are_noted(tmp_path):
    _, [row], _ = rows_of(tmp_path, [{"instruction": "Q", "output": "A", "reasoning": "Because."}])
    assert row["note"] == "column reasoning is not used: only the answer is trained on"


THINKS = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{{ eos_token }}{% endfor %}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '/off' }}{% endif %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def test_chat_template_kwargs_of_a_row_reach_the_template(tmp_path):
    template = (
        "{{ 'mood: ' + mood + '\n' if mood is defined else '' }}{% for m in messages %}{{ '<|' + m.role + '|>' }}"
        "{{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    kinds = [{"mood": "glad"}, '{"mood": "glad"}', {"mood": "sad"}, {}, None, {"temper": 1}]
    data = [chat(("u", "Q", {}), ("a", "A", {}), chat_template_kwargs=value) for value in kinds]
    table, rows, _ = rows_of(tmp_path, data, template)
    texts = ["".join(text for text, _ in stretches(row, tmp_path)) for row in rows]
    plain = "<|user|>Q</s><|assistant|>A</s>"
    assert texts == [f"mood: glad\n{plain}"] * 2 + [f"mood: sad\n{plain}"] + [plain] * 3
    assert rows[0]["row_id"] == rows[1]["row_id"]
    assert rows[3]["row_id"] == rows[4]["row_id"]
    assert len({row["row_id"] for row in rows}) == 4
    assert [row["note"] for row in rows] == [None] * 5 + [
        "temper of chat_template_kwargs is not read by the chat template"
    ]


def test_chat_template_kwargs_may_not_take_the_place_of_ours(tmp_path):
    values = [
        {"tools": []},
        {"add_generation_prompt": False},
        {"tokenize": True},
        {"chat_template": "x"},
        "[1]",
    ]
    data = [chat(("u", "Q", {}), ("a", "A", {}), chat_template_kwargs=value) for value in values]
    _, rows, _ = rows_of(tmp_path, [*data, PLAIN])
    told = "chat_template_kwargs holds {}, which the pipeline sets itself; remove it there"
    names = ("tools", "add_generation_prompt", "tokenize", "chat_template")
    assert [row["reason"] for row in rows[:4]] == [told.format(name) for name in names]
    assert rows[4]["reason"] == "chat_template_kwargs is a list, not an object"


def test_thinking_switched_off_by_a_row_of_qwen3(tmp_path):
    kinds = [{"enable_thinking": False}, {"enable_thinking": True}]
    data = [chat(("u", "Q", {}), ("a", "A", {}), chat_template_kwargs=value) for value in kinds]
    _, rows, _ = rows_of(tmp_path, data, "qwen3")
    assert [learnt(row, tmp_path) for row in rows] == [
        ["A<|im_end|>"],
        ["<think>\n\n</think>\n\nA<|im_end|>"],
    ]


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


# What the model can take


def limits_of(config):
    from dataflex_pipeline.data.limits import TokenLimits

    return TokenLimits.of(config)


def test_rows_beyond_a_table_of_positions_stop_the_preparation(tmp_path):
    from transformers import GPT2Config

    long = chat(("u", "Count.", {}), ("a", "1 2 3 " * 40, {}))
    limits = limits_of(GPT2Config(vocab_size=300, n_positions=64))
    with pytest.raises(DataError) as caught:
        rows_of(tmp_path, [PLAIN, long], "alpaca", limits=limits)
    assert "cutoff_len lets a row of the pool have" in caught.value.what
    assert "the model has 64 positions." in caught.value.what
    assert caught.value.fix.startswith("Set cutoff_len=64 (or less)")
    assert not (tmp_path / "out").exists()
    table, rows, _ = rows_of(tmp_path, [PLAIN, long], "plain", limits=limits, cutoff_len=64)
    assert table.summary["longest"] == 64 and rows[1]["valid"]


def test_tokens_beyond_the_embedding_stop_the_preparation(tmp_path):
    from transformers import LlamaConfig

    with pytest.raises(DataError) as caught:
        rows_of(tmp_path, [PLAIN], limits=limits_of(LlamaConfig(vocab_size=260)))
    # 256 bytes, <s> </s> <pad> are 256 to 258, then <|im_start|> and <|im_end|>
    assert caught.value.what == (
        "Token 260 (<|im_end|>) occurs in the pool, and the model's embedding has 260 rows."
    )
    table, _, _ = rows_of(tmp_path, [PLAIN], limits=limits_of(LlamaConfig(vocab_size=261)))
    assert table.summary["largest_token"] == 260


@pytest.mark.parametrize("scaled", [False, True])
def test_rows_beyond_what_rotary_positions_were_trained_on_are_said(tmp_path, scaled):
    from transformers import LlamaConfig

    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4} if scaled else None
    config = LlamaConfig(vocab_size=300, max_position_embeddings=32, rope_parameters=rope)
    table, [row], said = rows_of(tmp_path, [PLAIN], limits=limits_of(config))
    line = (
        f"the longest row of the pool has {row['n_tokens']} tokens, and the model was made for 32 "
        "(max_position_embeddings): set cutoff_len=32, or expect worse losses beyond"
    )
    assert (line in said) is not scaled
    assert (line in table.summary["notices"]) is not scaled
