"""Rows of every format as conversations, and the reasons of those that cannot be used."""

from __future__ import annotations

import json

import pytest
from data_fixtures import learnt, rows_of, stretches
from hypothesis import given, settings
from hypothesis import strategies as st

from dataflex_pipeline.data import DataSettings, scan_sources
from dataflex_pipeline.data.conversation import RowError
from dataflex_pipeline.data.formats.formats import to_conversation
from dataflex_pipeline.data.formats.layout import detect_layout
from dataflex_pipeline.data.sources.columns import ColumnTypes
from dataflex_pipeline.data.sources.named import Source
from dataflex_pipeline.errors import DataError


def read(row, formatting=None, columns=None, tags=None, columnar=False):
    source = Source("s", "s", formatting=formatting, columns=columns or {}, tags=tags or {})
    seen = ColumnTypes()
    seen.see(row)
    return to_conversation(row, detect_layout(source, seen.samples), columnar)


def turns(*args, **more):
    return [(message.role, message.content) for message in read(*args, **more).messages]


QA = [("user", "Q"), ("assistant", "A")]
ALPACA = {"instruction": "Q", "input": "", "output": "A"}
CALL = '{"name": "f", "arguments": {"x": 1}}'
TOOL = {"name": "f", "description": "d", "parameters": {"type": "object"}}
WRAPPED = {"type": "function", "function": TOOL}


def said(*pairs):
    return {"conversations": [{"from": role, "value": text} for role, text in pairs]}


def tool_use(call):
    return said(("human", "Q"), ("function_call", call), ("observation", "7"), ("gpt", "A"))


def test_alpaca():
    assert turns(ALPACA) == QA
    assert turns({"instruction": "Q", "output": "A"}) == QA
    assert turns({**ALPACA, "input": "in"}) == [("user", "Q\nin"), ("assistant", "A")]
    assert turns({**ALPACA, "instruction": "", "input": "in"}) == [("user", "in"), ("assistant", "A")]
    assert turns({**ALPACA, "input": None}) == QA
    whole = {**ALPACA, "system": "S", "history": [["q1", "a1"], ["q2", "a2"]]}
    expected = [
        ("system", "S"),
        ("user", "q1"),
        ("assistant", "a1"),
        ("user", "q2"),
        ("assistant", "a2"),
        *QA,
    ]
    assert turns(whole) == expected
    assert turns({**whole, "history": json.dumps(whole["history"])}) == expected
    assert turns({**ALPACA, "system": None, "history": None}) == QA


def test_alpaca_with_named_columns():
    row = {"q": "Q", "more": "in", "a": "A", "who": "S"}
    columns = {"prompt": "q", "query": "more", "response": "a", "system": "who"}
    assert turns(row, columns=columns) == [("system", "S"), ("user", "Q\nin"), ("assistant", "A")]


def test_sharegpt():
    assert turns(said(("human", "Q"), ("gpt", "A"))) == QA
    with_system = {**said(("human", "Q"), ("gpt", "A")), "system": "column"}
    assert turns(with_system) == [("system", "column"), *QA]
    both = {**said(("system", "turn"), ("human", "Q"), ("gpt", "A")), "system": "column"}
    assert turns(both) == [("system", "turn"), *QA]
    text = {"conversations": json.dumps(said(("human", "Q"), ("gpt", "A"))["conversations"])}
    assert turns(text) == QA


def test_sharegpt_calls_and_observations():
    row = {
        **said(("human", "Q"), ("function_call", CALL), ("observation", "7"), ("gpt", "A")),
        "tools": json.dumps([TOOL]),
    }
    conversation = read(row)
    assert [(m.role, m.content) for m in conversation.messages] == [
        ("user", "Q"),
        ("assistant", CALL),
        ("tool", "7"),
        ("assistant", "A"),
    ]
    assert conversation.messages[1].calls == ({"name": "f", "arguments": {"x": 1}},)
    assert conversation.tools == (WRAPPED,)
    assert read({**row, "tools": [WRAPPED]}).tools == (WRAPPED,)
    assert read({**row, "tools": ""}).tools == read({**row, "tools": "[]"}).tools == ()


def test_tags_are_configurable():
    row = {"talk": [{"who": "customer", "what": "Q"}, {"who": "agent", "what": "A"}]}
    tags = {"role_tag": "who", "content_tag": "what", "user_tag": "customer", "assistant_tag": "agent"}
    assert turns(row, formatting="sharegpt", columns={"messages": "talk"}, tags=tags) == QA


def test_messages():
    row = {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}
    assert turns(row) == QA
    assert turns({"conversations": row["messages"]}) == QA
    parts = [{"type": "text", "text": "Q"}]
    assert turns({"messages": [{"role": "user", "content": parts}, row["messages"][1]]}) == QA


def test_tool_calls_of_messages():
    calls = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}]
    row = {
        "messages": [
            {"role": "user", "content": "Q", "tool_calls": None},
            {"role": "assistant", "content": None, "tool_calls": calls},
            {"role": "tool", "content": "7", "tool_call_id": "1"},
            {"role": "assistant", "content": "A"},
        ],
        "tools": [WRAPPED],
    }
    assert turns(row) == [("user", "Q"), ("assistant", CALL), ("tool", "7"), ("assistant", "A")]
    row["messages"][1]["content"] = "Let me see."
    message = read(row).messages[1]
    assert (message.content, message.words) == (f"Let me see.\n{CALL}", "Let me see.")
    row["messages"][1] = {"role": "assistant", "content": "", "tool_calls": calls * 2}
    assert json.loads(read(row).messages[1].content) == [json.loads(CALL)] * 2


def test_nulls_that_columnar_files_fill_in_are_no_arguments_but_spelt_nulls_are():
    filled = {"function": {"name": "f", "arguments": {"x": 1, "other": None}}}
    row = {
        "messages": [
            {"role": "user", "content": "Q"},
            {"role": "assistant", "content": None, "tool_calls": [filled]},
        ]
    }
    assert read(row, columnar=True).messages[1].calls[0]["arguments"] == {"x": 1}
    spelt = '{"name": "f", "arguments": {"x": null}}'
    call = read(said(("human", "Q"), ("function_call", spelt), ("observation", "7"), ("gpt", "A"))).messages[
        1
    ]
    assert call.calls[0]["arguments"] == {"x": None}


def test_prompt_completion():
    assert turns({"prompt": "Q", "completion": "A"}) == QA
    prompt = [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}]
    completion = [{"role": "assistant", "content": "A"}]
    assert turns({"prompt": prompt, "completion": completion}) == [("system", "S"), *QA]
    assert turns({"prompt": prompt, "completion": completion, "system": "column"})[0] == ("system", "S")


REASONS = [
    ({**ALPACA, "output": None}, "output is null"),
    ({**ALPACA, "output": ""}, "empty response"),
    ({**ALPACA, "output": 5}, "output is a number, not text"),
    ({**ALPACA, "output": ["a"]}, "output is a list, not text"),
    ({**ALPACA, "output": b"a"}, "output is a binary value, not text"),
    ({**ALPACA, "instruction": " "}, "empty prompt"),
    ({**ALPACA, "history": [["q"]]}, "history is not a list"),
    ({"conversations": None}, "conversations is null, not a list"),
    ({"conversations": []}, "conversations has no turns"),
    ({"conversations": ["x"]}, "a turn is text, not an object"),
    ({"conversations": "not json"}, "conversations is text, not a list"),
    (said(("human", "Q")), "no assistant turn"),
    (said(("gpt", "A")), "assistant after start"),
    (said(("human", "Q"), ("gpt", None)), "a turn of role assistant has no 'value'"),
    (said(("robot", "Q"), ("gpt", "A")), "unknown role 'robot'"),
    ({"conversations": [{"value": "Q"}]}, "a turn has no 'from'"),
    (
        tool_use("{bad"),
        "function_call turn is not valid",
    ),
    (tool_use("[]"), "holds no call"),
    (
        tool_use("5"),
        "not a call with a name",
    ),
    ({**said(("human", "Q"), ("gpt", "A")), "tools": "{bad"}, "tools is not valid JSON"),
    ({**said(("human", "Q"), ("gpt", "A")), "tools": [{"x": 1}]}, "function without a name"),
    (
        {
            "messages": [
                {"role": "user", "content": [{"type": "image"}]},
                {"role": "assistant", "content": "A"},
            ]
        },
        "a turn holds image",
    ),
    ({"prompt": "Q", "completion": None}, "completion is null"),
]


@pytest.mark.parametrize(("row", "reason"), REASONS)
def test_rows_that_cannot_be_used_say_why(row, reason):
    with pytest.raises(RowError, match=reason):
        read(row)


def test_missing_field_is_told_apart_from_null():
    layout = detect_layout(Source("s", "s"), ALPACA)
    with pytest.raises(RowError, match="output is missing"):
        to_conversation({"instruction": "Q"}, layout)


def test_declared_format_that_does_not_fit_is_an_error():
    with pytest.raises(DataError, match="and formatting 'sharegpt': no known format"):
        read(ALPACA, formatting="sharegpt")
    with pytest.raises(DataError, match="no known format"):
        read(said(("human", "Q"), ("gpt", "A")), formatting="alpaca")


def test_row_id_is_of_the_content_and_nothing_else():
    same = [
        read(ALPACA),
        read({**ALPACA, "system": "", "other": 5}),
        read(said(("human", "Q"), ("gpt", "A"))),
        read({"prompt": "Q", "completion": "A"}),
    ]
    ids = {conversation.row_id for conversation in same}
    assert len(ids) == 1
    assert len(ids.pop()) == 32
    others = [
        {**ALPACA, "output": "B"},
        {**ALPACA, "system": "S"},
        {**ALPACA, "instruction": "QA", "output": "x"},
    ]
    assert len({read(row).row_id for row in [ALPACA, *others]}) == 4
    with_tools = {**said(("human", "Q"), ("gpt", "A")), "tools": [TOOL]}
    assert read(with_tools).row_id != same[0].row_id


@settings(deadline=None)
@given(
    values=st.lists(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False)
        | st.text()
        | st.lists(st.integers()),
        min_size=1,
    )
)
def test_original_columns_keep_every_value(values):
    seen = ColumnTypes()
    for value in values:
        seen.see({"x": value})
    [column] = seen.columns()
    made = column.array(values).to_pylist()
    assert len(made) == len(values)
    for value, kept in zip(values, made, strict=True):
        back = json.loads(kept) if column.kind == "json" and kept is not None else kept
        assert back == value
        if column.kind in ("boolean", "text"):
            assert type(kept) is type(value)


def test_kinds_of_original_columns():
    cases = {
        "text": ["a", None],
        "integer": [1, 2**63 - 1, None],
        "number": [1, 0.5],
        "boolean": [True, None],
        "json": [True, 1],
    }
    more = {"json": [["a"], {"b": 1}, 2**64, "\ud800"], "text": [None, None]}
    for kinds in (cases, more):
        for kind, values in kinds.items():
            seen = ColumnTypes()
            for value in values:
                seen.see({"x": value})
            [column] = seen.columns()
            assert column.kind == kind
            assert column.field.metadata[b"encoding"] == kind.encode()
            assert column.field.name == "original_x"


# Prompts and completions that are lists of turns


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


ASKED = [turn("user", "q1"), turn("assistant", "NO"), turn("user", "q2")]


def test_answers_inside_a_prompt_carry_no_labels(tmp_path):
    data = [{"prompt": ASKED, "completion": [turn("assistant", "YES")]}]
    table, [row], said = rows_of(tmp_path, data)
    assert stretches(row, tmp_path) == [
        (
            "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\nNO<|im_end|>\n"
            "<|im_start|>user\nq2<|im_end|>\n<|im_start|>assistant\n",
            False,
        ),
        ("YES<|im_end|>", True),
        ("\n", False),
    ]
    note = "an answer inside the prompt is not trained on"
    assert table.summary["notes"] == {note: 1}
    assert f"pool: 1 rows: {note}" in said


def test_every_answer_of_a_completion_carries_labels(tmp_path):
    completion = [turn("assistant", "YES"), turn("user", "q3"), turn("assistant", "YES, TOO")]
    _, [row], _ = rows_of(tmp_path, [{"prompt": ASKED, "completion": completion}])
    assert learnt(row, tmp_path) == ["YES<|im_end|>", "YES, TOO<|im_end|>"]


def test_a_completion_in_words_after_a_prompt_of_turns(tmp_path):
    weighted = [ASKED[0], turn("assistant", "NO", weight=0), ASKED[2]]
    data = [{"prompt": weighted, "completion": "YES"}]
    _, [row], _ = rows_of(tmp_path, data)
    assert learnt(row, tmp_path) == ["YES<|im_end|>"]
    assert row["note"] == "an answer inside the prompt is not trained on"


def test_turns_as_json_text_are_turns():
    prompt = json.dumps([turn("system", "S"), turn("user", "Q")])
    completion = json.dumps([turn("assistant", "A")])
    assert turns({"prompt": prompt, "completion": completion}) == [("system", "S"), *QA]
    assert turns({"prompt": prompt, "completion": "A", "system": "column"}) == [("system", "S"), *QA]
    assert turns({"prompt": "Q", "completion": f" {completion}\n"}) == QA
    listed = read({"prompt": json.loads(prompt), "completion": json.loads(completion)})
    assert read({"prompt": prompt, "completion": completion}).row_id == listed.row_id


@pytest.mark.parametrize(
    "text", ['[{"name": "x"}]', "[]", "[1, 2]", "[not JSON", '{"role": "user"}', '["role"]']
)
def test_other_json_in_a_prompt_is_text(text):
    assert turns({"prompt": text, "completion": text}) == [("user", text), ("assistant", text)]


def test_turns_as_json_text_in_a_csv_file(tmp_path):
    import csv

    with (tmp_path / "pool.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", "completion"])
        writer.writerow([json.dumps(ASKED), json.dumps([turn("assistant", "YES")])])
    scan = scan_sources(DataSettings(("pool.csv",), str(tmp_path), "chatml", 4096, None))
    [(_, row)] = scan.rows()
    made = to_conversation(row, scan.sources[0].layout)
    assert [(each.role, each.content, each.trained) for each in made.messages] == [
        ("user", "q1", True),
        ("assistant", "NO", False),
        ("user", "q2", True),
        ("assistant", "YES", True),
    ]
