"""Calls of tools and their results: paired by id, nulls as the data has them, nothing left out."""

from __future__ import annotations

import json

import pyarrow as pa
import pytest
from data_fixtures import PLAIN, chat, learnt, rows_of, stretches

# Tools

TOOL = {"type": "function", "function": {"name": "w", "parameters": {"type": "object"}}}
CALLS = (
    "{% for t in tools or [] %}[{{ t | tojson }}]{% endfor %}"
    "{% for m in messages %}{{ '<|' + m.role + '|>' }}"
    "{% if m.role == 'tool' %}{{ m.tool_call_id + '=' + m.content }}{% else %}"
    "{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.id + ':' + c.function.name + c.function.arguments | tojson }}"
    "{% endfor %}{% endif %}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
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
    assert spelt["row_id"] == plain["row_id"]
    assert spelt["note"] is None
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


# What a template leaves out of tools and calls

FIRST_CALL = (
    "{% for t in tools or [] %}{{ '[' + t.function.name + ']' }}{% endfor %}{% for m in messages %}"
    "{{ '<|' + m.role + '|>' }}{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}{% endif %}"
    "{{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
"""A template that writes one call of a turn, and of the tools only their names."""
ALL_CALLS = FIRST_CALL.replace("{{ m.tool_calls[0].function | tojson }}", "{{ m.tool_calls | tojson }}")
DICE = {"name": "dice", "description": "Throws one.", "parameters": {"properties": {"sides": {"type": "n"}}}}


def throws(*arguments, **beside):
    called = [{"function": {"name": "dice", "arguments": each}} for each in arguments]
    return chat(("u", "Throw!", {}), ("a", "", {"tool_calls": called}), **beside)


@pytest.mark.parametrize(
    ("arguments", "kept"),
    [
        ([{"sides": 6}], True),
        ([{"sides": 6}, {"sides": 6}], False),
        ([{"sides": 6}, {}], False),
        ([{}, {}], False),
    ],
)
def test_parallel_calls_that_are_alike_are_counted(tmp_path, arguments, kept):
    data = [throws(*arguments), PLAIN]
    _, [row, _], _ = rows_of(tmp_path / "first", data, FIRST_CALL)
    reason = (
        "the chat template leaves out a tool call's name or one of its arguments; choose a named template"
    )
    assert row["reason"] == (None if kept else reason)
    _, [row, _], _ = rows_of(tmp_path / "all", data, ALL_CALLS)
    assert row["valid"], row["reason"]


def test_tools_of_which_only_the_names_are_written(tmp_path):
    note = "the chat template writes only the names of tools"
    data = [throws({"sides": 6}, tools=[DICE]), throws({"sides": 6}, tools=[{"name": "dice"}])]
    _, rows, said = rows_of(tmp_path / "a", data, FIRST_CALL)
    assert [row["note"] for row in rows] == [note, None]
    assert f"pool: 1 rows: {note}" in said
    described = FIRST_CALL.replace("t.function.name", "t.function.name + ':' + t.function.description")
    _, [row], _ = rows_of(tmp_path / "b", data[:1], described)
    assert row["note"] == "the chat template leaves out a parameter of a tool"
    whole = FIRST_CALL.replace("t.function.name", "(t.function | tojson)")
    _, [row], _ = rows_of(tmp_path / "c", data[:1], whole)
    assert row["note"] is None


def test_tools_in_words_of_our_own_are_said(tmp_path):
    note = (
        "the chat template has no place for tools: their definitions stand in plain words at the end of the "
        "system prompt"
    )
    table, rows, said = rows_of(tmp_path, [throws({"sides": 6}, tools=[DICE]), PLAIN], "vicuna")
    assert [row["note"] for row in rows] == [note, None]
    assert table.summary["notes"] == {note: 1}
    assert f"pool: 1 rows: {note}" in said
