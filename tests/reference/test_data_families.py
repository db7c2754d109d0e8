"""Named templates of Qwen 3, GLM 4 and Mistral Nemo with tools and reasoning; what is said of others."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from data_fixtures import byte_tokenizer, chat, learnt, rows_of, stretches

from dataflex_pipeline.data.chat.labelled import ChatFormat, Piece
from dataflex_pipeline.data.chat.templates import named_template
from dataflex_pipeline.data.conversation import Conversation, Message, RowError

USER, BOT, TOOL, SYSTEM = "user", "assistant", "tool", "system"
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
WEATHER_JSON = json.dumps(WEATHER)
CALLS = tuple({"name": "weather", "arguments": {"city": city}} for city in ("Bern", "Rome"))
QUIET = (
    Message(USER, "Weather?"),
    Message(BOT, json.dumps(CALLS), CALLS),
    Message(TOOL, "7"),
    Message(TOOL, "8"),
    Message(BOT, "7 and 8."),
)
QWEN_TOOLS = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
    f"{WEATHER_JSON}\n</tools>\n\nFor each function call, return a json object with function name and "
    "arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n'
)
QWEN_CALLS = "\n".join(
    f'<tool_call>\n{{"name": "weather", "arguments": {{"city": "{city}"}}}}\n</tool_call>'
    for city in ("Bern", "Rome")
)
QWEN_RESULTS = (
    "<|im_start|>user\n<tool_response>\n7\n</tool_response>\n<tool_response>\n8\n</tool_response><|im_end|>\n"
)


def talk() -> tuple[Message, ...]:
    """The same with what the assistant thought."""
    asks = replace(QUIET[1], reasoning="Ask twice.")
    return (QUIET[0], asks, *QUIET[2:4], replace(QUIET[4], reasoning="Easy."))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return byte_tokenizer(tmp_path_factory.mktemp("bytes"))


def written(tokenizer, name: str, conversation: Conversation) -> tuple[str, list[str]]:
    pieces = ChatFormat(tokenizer, named_template(name)).pieces(conversation)
    return "".join(piece.text for piece in pieces), [piece.text for piece in pieces if piece.labelled]


def test_qwen3_writes_reasoning_tools_and_results(tokenizer):
    text, labelled = written(
        tokenizer, "qwen3", Conversation((Message(SYSTEM, "Be kind."), *talk()), (WEATHER,))
    )
    calling = f"<think>\nAsk twice.\n</think>\n\n{QWEN_CALLS}<|im_end|>"
    answer = "<think>\nEasy.\n</think>\n\n7 and 8.<|im_end|>"
    assert text == (
        f"<|im_start|>system\nBe kind.\n\n{QWEN_TOOLS}<|im_start|>user\nWeather?<|im_end|>\n"
        f"<|im_start|>assistant\n{calling}\n{QWEN_RESULTS}<|im_start|>assistant\n{answer}\n"
    )
    assert labelled == [calling, answer]


def test_qwen3_nothink_writes_tools_and_no_block_of_reasoning(tokenizer):
    text, labelled = written(tokenizer, "qwen3_nothink", Conversation(QUIET, (WEATHER,)))
    assert text == (
        f"<|im_start|>system\n{QWEN_TOOLS}<|im_start|>user\nWeather?<|im_end|>\n"
        f"<|im_start|>assistant\n{QWEN_CALLS}<|im_end|>\n{QWEN_RESULTS}"
        "<|im_start|>assistant\n7 and 8.<|im_end|>\n"
    )
    assert labelled == [f"{QWEN_CALLS}<|im_end|>", "7 and 8.<|im_end|>"]


@pytest.mark.parametrize("name", ["qwen3", "qwen3_nothink"])
def test_words_before_a_call_stand_on_a_line_of_their_own(tokenizer, name):
    turns = (Message(USER, "Q"), Message(BOT, "", CALLS, "Let me see."), *QUIET[2:4], Message(BOT, "A"))
    _, labelled = written(tokenizer, name, Conversation(turns, (WEATHER,)))
    assert labelled[0].endswith(f"Let me see.\n{QWEN_CALLS}<|im_end|>")


@pytest.mark.parametrize(
    ("content", "written_as"),
    [
        ("<think>\nSum.\n</think>\n\n2.", "<think>\nSum.\n</think>\n\n2."),
        ("<think>Sum.</think>2.", "<think>\nSum.\n</think>\n\n2."),
        ("2.", "<think>\n\n</think>\n\n2."),
    ],
)
def test_qwen3_takes_reasoning_from_the_content_too(tokenizer, content, written_as):
    _, labelled = written(tokenizer, "qwen3", Conversation((Message(USER, "1+1?"), Message(BOT, content))))
    assert labelled == [f"{written_as}<|im_end|>"]


@pytest.mark.parametrize(("name", "file"), [("qwen3", "qwen3"), ("qwen3_nothink", "qwen3_instruct_2507")])
def test_qwen3_equals_the_templates_that_trl_carries(tmp_path, tokenizer, name, file):
    import trl

    path = Path(trl.__file__).parent / "chat_templates" / f"{file}.jinja"
    if not path.is_file():
        pytest.skip(f"this version of trl carries no {path.name}")
    own = byte_tokenizer(tmp_path, chat_template=path.read_text(encoding="utf-8"))
    theirs, ours = ChatFormat(own, None), ChatFormat(tokenizer, named_template(name))
    turns = (Message(SYSTEM, "Be kind."), Message(USER, "Hi"))
    calls = Conversation(QUIET if name == "qwen3_nothink" else talk(), (WEATHER,))
    for row in (Conversation((*turns, Message(BOT, "Hello!"))), calls):
        assert ours.pieces(row) == theirs.pieces(row)
    if name == "qwen3":
        off = {"enable_thinking": False}
        row = Conversation((*turns, Message(BOT, "Hello!")), variables=off)
        assert ours.pieces(row) == theirs.pieces(row)
        assert ours.pieces(row)[1] == Piece("Hello!<|im_end|>", True)


def test_glm4_writes_tools_calls_and_results_and_learns_who_speaks_next(tokenizer):
    one = (Message(USER, "Weather?"), Message(BOT, "", CALLS[:1]), Message(TOOL, "7"), Message(BOT, "7."))
    text, labelled = written(
        tokenizer, "glm4", Conversation((*one, Message(USER, "Bye?"), Message(BOT, "Bye.")), (WEATHER,))
    )
    pretty = json.dumps(WEATHER["function"], indent=4)
    assert text == (
        f"[gMASK]<sop><|system|>\n# 可用工具\n\n## weather\n\n{pretty}\n"
        "在调用上述函数时，请使用 Json 格式表示调用的参数。"
        '<|user|>\nWeather?<|assistant|>weather\n{"city": "Bern"}<|observation|>\n7'
        "<|assistant|>\n7.<|user|>\nBye?<|assistant|>\nBye.<|user|>"
    )
    assert labelled == ['weather\n{"city": "Bern"}<|observation|>', "\n7.<|user|>", "\nBye.<|user|>"]


def test_glm4_refuses_a_result_without_a_call(tokenizer):
    turns = (Message(USER, "Q"), Message(BOT, "A"), Message(TOOL, "7"), Message(BOT, "B"))
    with pytest.raises(RowError, match="only after a call of it"):
        written(tokenizer, "glm4", Conversation(turns))


def test_mistral_tekken_writes_tools_without_spaces(tokenizer):
    text, labelled = written(tokenizer, "mistral_tekken", Conversation(QUIET, (WEATHER,)))
    calls = ", ".join(
        f'{{"name": "weather", "arguments": {{"city": "{city}"}}, "id": "call0000{n}"}}'
        for n, city in enumerate(("Bern", "Rome"))
    )
    assert text == (
        f"<s>[AVAILABLE_TOOLS][{WEATHER_JSON}][/AVAILABLE_TOOLS][INST]Weather?[/INST][TOOL_CALLS][{calls}]</s>"
        '[TOOL_RESULTS]{"content": 7, "call_id": "call00000"}[/TOOL_RESULTS]'
        '[TOOL_RESULTS]{"content": 8, "call_id": "call00001"}[/TOOL_RESULTS]7 and 8.</s>'
    )
    assert labelled == [f"[TOOL_CALLS][{calls}]</s>", "7 and 8.</s>"]


# What is said of a model's own template

GLM4_OWN = (
    "[gMASK]<sop>{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
NO_GENERATION_PROMPT = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{{ eos_token }}{% endfor %}"
)
ENDLESS = (
    "the chat template writes {} after an answer, so that no end token is learnt and the model does not "
    "learn to stop; choose the named template of the model's family (dataflex methods --templates lists them)"
)
HEADER = (
    "the chat template does not read add_generation_prompt: '<|assistant|>' before each answer carries "
    "labels like the answer itself; choose the named template of the model's family (dataflex methods "
    "--templates lists them)"
)
PLAIN_ROW = chat(("u", "Q", {}), ("a", "A", {}))


@pytest.mark.parametrize(
    ("template", "line"),
    [
        (GLM4_OWN, ENDLESS.format("nothing")),
        (GLM4_OWN.replace("m.content", "m.content + '\n'"), ENDLESS.format("only '\\n'")),
        (GLM4_OWN.replace("m.content", "m.content + '###'"), ENDLESS.format("only '###'")),
        (NO_GENERATION_PROMPT, HEADER),
    ],
)
def test_what_a_template_does_to_labels_is_said_and_kept(tmp_path, template, line):
    table, [row], said = rows_of(tmp_path, [PLAIN_ROW], template)
    assert line in said
    assert table.summary["notices"] == [line]
    assert row["valid"]


def test_the_header_carries_labels_where_the_generation_prompt_is_ignored(tmp_path):
    _, [row], _ = rows_of(tmp_path, [PLAIN_ROW], NO_GENERATION_PROMPT)
    assert learnt(row, tmp_path) == ["<|assistant|>A</s>"]


@pytest.mark.parametrize(
    "end",
    ["{{ eos_token }}", "<|im_end|>", "<|im_end|>{{ '\n' }}", "{{ eos_token }}{{ '\n' }}"],
)
def test_nothing_is_said_of_a_template_that_ends_answers(tmp_path, end):
    template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}" + end + "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    table, _, said = rows_of(tmp_path, [PLAIN_ROW], template)
    assert table.summary["notices"] == []
    assert said == ["pool: 1 of 1 rows valid, " + said[0].split(", ")[-1]]


# Where an answer ends


@pytest.mark.parametrize("content", [">", "|>", "end|>", "<|im_end|>", "im_end|>"])
def test_an_answer_that_is_a_tail_of_the_end_marker_learns_no_more_than_any_other(tmp_path, content):
    _, [row], _ = rows_of(tmp_path, [chat(("u", "Q", {}), ("a", content, {}))])
    assert stretches(row, tmp_path) == [
        ("<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n", False),
        (f"{content}<|im_end|>", True),
        ("\n", False),
    ]


def test_a_newline_that_is_all_that_ends_an_answer_is_learnt_after_any_answer(tmp_path):
    template = (
        "{% for m in messages %}{{ m.reasoning_content if m.reasoning_content else '' }}"
        "{{ m.content + '\n' }}"
        "{% endfor %}"
    )
    data = [
        chat(("u", "Q", {}), ("a", "Two.", {"reasoning_content": "Two. "})),
        chat(("u", "Q", {}), ("a", "Two. \n", {})),
    ]
    _, rows, _ = rows_of(tmp_path, data, template)
    assert [learnt(row, tmp_path) for row in rows] == [["Two. Two.\n"], ["Two. \n\n"]]
