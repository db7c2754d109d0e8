"""Columns beside the conversation that other tools give a meaning to, and what the model can take."""

from __future__ import annotations

import json

import pytest
from data_fixtures import PLAIN, chat, learnt, rows_of, stretches

from dataflex_pipeline.errors import DataError

# Columns beside the conversation


IN_WORDS = (
    "prompt and completion are plain texts, and are written as one user and one assistant turn of the chat "
    "template (template: plain adds no marks, only a line break between them)"
)


def test_answers_labelled_bad_are_refused(tmp_path):
    data = [
        {"prompt": "Is fire cold?", "completion": "Yes.", "label": False},
        {"prompt": "Is ice cold?", "completion": "Yes.", "label": True},
        {"prompt": "Is ice cold?", "completion": "Yes."},
    ]
    table, [bad, good, plain], _ = rows_of(tmp_path, data)
    assert not bad["valid"]
    assert bad["reason"].startswith("label is false: the answer is marked as a bad one")
    assert good["valid"]
    assert good["row_id"] == plain["row_id"]
    note = "label is not used further: the answer is trained on as it is"
    assert (good["note"], plain["note"]) == (f"{note}; {IN_WORDS}", IN_WORDS)
    assert table.summary["notes"] == {note: 1, IN_WORDS: 2}


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
    assert row["valid"]
    assert row["note"] is None
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
    beside = {"weight": 0.3, "image": "cat.jpg", "parallel_tool_calls": False, "labels": [1], "mask": "Bot"}
    _table, [row], _ = rows_of(tmp_path, [{**PLAIN, **beside}])
    assert row["valid"]
    assert row["note"].split("; ") == [
        "column image is not used: only text is trained on",
        "column labels is not used: rows are tokenised and labelled here",
        "column mask is not used: answers are what is trained on",
        "column weight is not used: what a row weighs is up to the method",
        "parallel_tool_calls is not used: it has no meaning in training",
    ]


def test_thoughts_beside_an_alpaca_answer_are_noted(tmp_path):
    _, [row], _ = rows_of(tmp_path, [{"instruction": "Q", "output": "A", "reasoning": "Because."}])
    assert row["note"] == "column reasoning is not used: only the answer is trained on"


def test_chat_template_kwargs_of_a_row_reach_the_template(tmp_path):
    template = (
        "{{ 'mood: ' + mood + '\n' if mood is defined else '' }}{% for m in messages %}"
        "{{ '<|' + m.role + '|>' + m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    kinds = [{"mood": "glad"}, '{"mood": "glad"}', {"mood": "sad"}, {}, None, {"temper": 1}]
    data = [chat(("u", "Q", {}), ("a", "A", {}), chat_template_kwargs=value) for value in kinds]
    _table, rows, _ = rows_of(tmp_path, data, template)
    texts = ["".join(text for text, _ in stretches(row, tmp_path)) for row in rows]
    plain = "<|user|>Q</s><|assistant|>A</s>"
    assert texts == [f"mood: glad\n{plain}"] * 2 + [f"mood: sad\n{plain}"] + [plain] * 3
    assert rows[0]["row_id"] == rows[1]["row_id"]
    assert rows[3]["row_id"] == rows[4]["row_id"]
    assert len({row["row_id"] for row in rows}) == 4
    assert [row["note"] for row in rows] == [None] * 5 + [
        "temper of chat_template_kwargs is not read by the chat template"
    ]


def test_half_a_surrogate_pair_in_a_variable_or_a_tool_refuses_the_row(tmp_path):
    template = (
        "{{ mood | default('') }}{% for t in tools or [] %}{{ t.function }}{% endfor %}"
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    tool = {"name": "w", "description": "\ud800"}
    data = [
        {**PLAIN, "chat_template_kwargs": '{"mood": "\\ud800"}'},
        {**PLAIN, "chat_template_kwargs": '{"\\ud800": 1}'},
        {**PLAIN, "tools": json.dumps([tool])},
        PLAIN,
    ]
    _, rows, _ = rows_of(tmp_path, data, template)
    told = "a text is not valid Unicode (it holds half of a surrogate pair)"
    assert [row["reason"] for row in rows] == [told, None, None, None]
    assert rows[1]["note"] == "\\ud800 of chat_template_kwargs is not read by the chat template"


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
    assert table.summary["longest"] == 64
    assert rows[1]["valid"]


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


def test_plain_prompts_and_completions_are_said_to_go_through_the_template(tmp_path):
    data = [{"prompt": "Once upon", "completion": " a time"}]
    table, [row], said = rows_of(tmp_path / "a", data)
    whole = "<|im_start|>user\nOnce upon<|im_end|>\n<|im_start|>assistant\n"
    assert stretches(row, tmp_path / "a") == [(whole, False), (" a time<|im_end|>", True), ("\n", False)]
    assert table.summary["notes"] == {IN_WORDS: 1}
    assert f"pool: 1 rows: {IN_WORDS}" in said
    table, [row], _ = rows_of(tmp_path / "b", data, "plain")
    assert stretches(row, tmp_path / "b")[:2] == [("Once upon\n", False), (" a time</s>", True)]
    assert table.summary["notes"] == {}
    listed = [{"prompt": [{"role": "user", "content": "Q"}], "completion": "A"}]
    table, _, _ = rows_of(tmp_path / "c", listed)
    assert table.summary["notes"] == {}


def test_columns_that_steer_other_tools_are_noted(tmp_path):
    steering = {
        "add_generation_prompt": True,
        "chat_template": "{{ messages }}",
        "train_on_inputs": True,
        "tool_choice": {"type": "auto"},
    }
    empty = dict.fromkeys(steering)
    data = [chat(("u", "Q", {}), ("a", "A", {}), **more) for more in (steering, empty, {})]
    table, rows, _ = rows_of(tmp_path, data)
    assert table.summary["notes"] == {
        "column add_generation_prompt is not used: every row ends with an answer": 1,
        "column chat_template is not used: rows are written with the configured template, or the "
        "tokenizer's own": 1,
        "column train_on_inputs is not used: only answers are trained on": 1,
        "column tool_choice is not used: it has no meaning in training": 1,
    }
    assert len({row["row_id"] for row in rows}) == 1
    assert [row["note"] for row in rows[1:]] == [None, None]
