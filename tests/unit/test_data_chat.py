"""Chat templates by name against the families' published formats, written out by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from data_fixtures import byte_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from dataflex_pipeline.data.chat.day import DAY
from dataflex_pipeline.data.chat.labelled import ChatFormat, Piece
from dataflex_pipeline.data.chat.templates import TEMPLATES, named_template
from dataflex_pipeline.data.conversation import Conversation, Message, RowError, check_conversation
from dataflex_pipeline.errors import ConfigError

SYSTEM, USER, BOT, TOOL = "system", "user", "assistant", "tool"
TWO_TURNS = [(USER, "Hi"), (BOT, "Hello!"), (USER, "Bye?"), (BOT, "Bye.")]
WITH_SYSTEM = [(SYSTEM, "Be kind."), *TWO_TURNS]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather now",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALL = {"name": "weather", "arguments": {"city": "Bern"}}
CALLING = Conversation(
    (
        Message(USER, "Weather?"),
        Message(BOT, json.dumps(CALL), (CALL,)),
        Message(TOOL, '{"t": 7}'),
        Message(BOT, "7 degrees."),
    ),
    (WEATHER,),
)
WEATHER_JSON = (
    '{"type": "function", "function": {"name": "weather", "description": "Weather now", '
    '"parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}}'
)
ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request."
)
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the user's questions."
)
QWEN = "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
CHATML_TURNS = (
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n"
    "<|im_start|>user\nBye?<|im_end|>\n<|im_start|>assistant\nBye.<|im_end|>\n"
)
LLAMA3_TURNS = (
    "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nHello!<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nBye?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nBye.<|eot_id|>"
)
GEMMA_REST = (
    "<start_of_turn>model\nHello!<end_of_turn>\n<start_of_turn>user\nBye?<end_of_turn>\n"
    "<start_of_turn>model\nBye.<end_of_turn>\n"
)
PHI3_TURNS = (
    "<|user|>\nHi<|end|>\n<|assistant|>\nHello!<|end|>\n<|user|>\nBye?<|end|>\n<|assistant|>\nBye.<|end|>\n"
)
PHI4_TURNS = (
    "<|im_start|>user<|im_sep|>Hi<|im_end|><|im_start|>assistant<|im_sep|>Hello!<|im_end|>"
    "<|im_start|>user<|im_sep|>Bye?<|im_end|><|im_start|>assistant<|im_sep|>Bye.<|im_end|>"
)

# name -> (text of two turns, text of the same with a system prompt, labelled texts of both)
PUBLISHED = {
    "llama3": (
        "<s>" + LLAMA3_TURNS,
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>" + LLAMA3_TURNS,
        ["Hello!<|eot_id|>", "Bye.<|eot_id|>"],
    ),
    "chatml": (
        CHATML_TURNS,
        "<|im_start|>system\nBe kind.<|im_end|>\n" + CHATML_TURNS,
        ["Hello!<|im_end|>", "Bye.<|im_end|>"],
    ),
    "qwen": (
        QWEN + CHATML_TURNS,
        "<|im_start|>system\nBe kind.<|im_end|>\n" + CHATML_TURNS,
        ["Hello!<|im_end|>", "Bye.<|im_end|>"],
    ),
    "alpaca": (
        f"{ALPACA}\n\n### Instruction:\nHi\n\n### Response:Hello!</s>"
        "\n\n### Instruction:\nBye?\n\n### Response:Bye.</s>",
        "Be kind.\n\n### Instruction:\nHi\n\n### Response:Hello!</s>"
        "\n\n### Instruction:\nBye?\n\n### Response:Bye.</s>",
        ["Hello!</s>", "Bye.</s>"],
    ),
    "llama2": (
        "<s>[INST] Hi [/INST] Hello! </s><s>[INST] Bye? [/INST] Bye. </s>",
        "<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nHi [/INST] Hello! </s><s>[INST] Bye? [/INST] Bye. </s>",
        [" Hello! </s>", " Bye. </s>"],
    ),
    "mistral": (
        "<s>[INST] Hi[/INST] Hello!</s>[INST] Bye?[/INST] Bye.</s>",
        "<s>[INST] Be kind.\n\nHi[/INST] Hello!</s>[INST] Bye?[/INST] Bye.</s>",
        [" Hello!</s>", " Bye.</s>"],
    ),
    "gemma": (
        "<s><start_of_turn>user\nHi<end_of_turn>\n" + GEMMA_REST,
        "<s><start_of_turn>user\nBe kind.\n\nHi<end_of_turn>\n" + GEMMA_REST,
        ["Hello!<end_of_turn>", "Bye.<end_of_turn>"],
    ),
    "phi3": (PHI3_TURNS, "<|system|>\nBe kind.<|end|>\n" + PHI3_TURNS, ["Hello!<|end|>", "Bye.<|end|>"]),
    "phi4": (
        PHI4_TURNS,
        "<|im_start|>system<|im_sep|>Be kind.<|im_end|>" + PHI4_TURNS,
        ["Hello!<|im_end|>", "Bye.<|im_end|>"],
    ),
    "zephyr": (
        "<|user|>\nHi</s>\n<|assistant|>\nHello!</s>\n<|user|>\nBye?</s>\n<|assistant|>\nBye.</s>\n",
        "<|system|>\nBe kind.</s>\n<|user|>\nHi</s>\n<|assistant|>\nHello!</s>\n"
        "<|user|>\nBye?</s>\n<|assistant|>\nBye.</s>\n",
        ["Hello!</s>", "Bye.</s>"],
    ),
    "vicuna": (
        f"{VICUNA} USER: Hi ASSISTANT: Hello!</s>USER: Bye? ASSISTANT: Bye.</s>",
        "Be kind. USER: Hi ASSISTANT: Hello!</s>USER: Bye? ASSISTANT: Bye.</s>",
        [" Hello!</s>", " Bye.</s>"],
    ),
    "deepseek": (
        "<s>User: Hi\n\nAssistant: Hello!</s>User: Bye?\n\nAssistant: Bye.</s>",
        "<s>Be kind.\n\nUser: Hi\n\nAssistant: Hello!</s>User: Bye?\n\nAssistant: Bye.</s>",
        [" Hello!</s>", " Bye.</s>"],
    ),
    "deepseek3": (
        "<s><｜User｜>Hi<｜Assistant｜>Hello!<｜end▁of▁sentence｜><｜User｜>Bye?<｜Assistant｜>Bye.<｜end▁of▁sentence｜>",
        "<s>Be kind.<｜User｜>Hi<｜Assistant｜>Hello!<｜end▁of▁sentence｜>"
        "<｜User｜>Bye?<｜Assistant｜>Bye.<｜end▁of▁sentence｜>",
        ["Hello!<｜end▁of▁sentence｜>", "Bye.<｜end▁of▁sentence｜>"],
    ),
    "default": (
        "Human: Hi</s>\nAssistant:Hello!</s>\nHuman: Bye?</s>\nAssistant:Bye.</s>\n",
        "System: Be kind.</s>\nHuman: Hi</s>\nAssistant:Hello!</s>\nHuman: Bye?</s>\nAssistant:Bye.</s>\n",
        ["Hello!</s>", "Bye.</s>"],
    ),
    "plain": (
        "Hi\nHello!</s>\nBye?\nBye.</s>\n",
        "Be kind.\nHi\nHello!</s>\nBye?\nBye.</s>\n",
        ["Hello!</s>", "Bye.</s>"],
    ),
}
GLM4_TURNS = "\nHi<|assistant|>\nHello!<|user|>\nBye?<|assistant|>\nBye.<|user|>"
QWEN3_TURNS = CHATML_TURNS.replace(
    "<|im_start|>assistant\n", "<|im_start|>assistant\n<think>\n\n</think>\n\n"
)
PUBLISHED |= {
    "glm4": (
        "[gMASK]<sop><|user|>" + GLM4_TURNS,
        "[gMASK]<sop><|system|>\nBe kind.<|user|>" + GLM4_TURNS,
        ["\nHello!<|user|>", "\nBye.<|user|>"],
    ),
    "mistral_tekken": (
        "<s>[INST]Hi[/INST]Hello!</s>[INST]Bye?[/INST]Bye.</s>",
        "<s>[INST]Be kind.\n\nHi[/INST]Hello!</s>[INST]Bye?[/INST]Bye.</s>",
        ["Hello!</s>", "Bye.</s>"],
    ),
    "qwen3": (
        QWEN3_TURNS,
        "<|im_start|>system\nBe kind.<|im_end|>\n" + QWEN3_TURNS,
        ["<think>\n\n</think>\n\nHello!<|im_end|>", "<think>\n\n</think>\n\nBye.<|im_end|>"],
    ),
    "qwen3_nothink": (
        CHATML_TURNS,
        "<|im_start|>system\nBe kind.<|im_end|>\n" + CHATML_TURNS,
        ["Hello!<|im_end|>", "Bye.<|im_end|>"],
    ),
}
PUBLISHED |= {"gemma2": PUBLISHED["gemma"], "gemma3": PUBLISHED["gemma"], "phi": PUBLISHED["phi3"]}


def conversation(*turns: tuple[str, str]) -> Conversation:
    return Conversation(tuple(Message(role, text) for role, text in turns))


def labelled(pieces: list[Piece]) -> list[str]:
    return [piece.text for piece in pieces if piece.labelled]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return byte_tokenizer(tmp_path_factory.mktemp("bytes"))


def own_template(tmp_path, text: str, **more) -> ChatFormat:
    return ChatFormat(byte_tokenizer(tmp_path, chat_template=text, **more), None)


def test_every_template_has_a_published_form():
    assert PUBLISHED.keys() == TEMPLATES.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_template_writes_the_published_form(tokenizer, name):
    chat = ChatFormat(tokenizer, named_template(name))
    plain, with_system, responses = PUBLISHED[name]
    for turns, expected in ((TWO_TURNS, plain), (WITH_SYSTEM, with_system)):
        pieces = chat.pieces(conversation(*turns))
        assert "".join(piece.text for piece in pieces) == expected
        assert chat.render(conversation(*turns).messages) == expected
        assert labelled(pieces) == responses
        assert labelled(chat.pieces(conversation(*turns), mask_history=True)) == responses[-1:]


@pytest.mark.parametrize("name", PUBLISHED)
def test_stop_text_ends_every_response(tokenizer, name):
    stop = named_template(name).stop or "</s>"
    assert all(text.endswith(stop) for text in PUBLISHED[name][2])
    assert tokenizer.decode(ChatFormat(tokenizer, named_template(name)).stop_ids) == stop


def test_default_systems_in_the_table_are_those_that_the_templates_write(tokenizer):
    for name, template in TEMPLATES.items():
        text = ChatFormat(tokenizer, template).render(conversation(*TWO_TURNS).messages)
        assert text.startswith(template.system), name


def test_qwen_writes_tools_as_qwen_2_5(tokenizer):
    pieces = ChatFormat(tokenizer, named_template("qwen")).pieces(CALLING)
    assert "".join(piece.text for piece in pieces) == (
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.\n\n"
        "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
        "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
        f"{WEATHER_JSON}\n</tools>\n\nFor each function call, return a json object with function name and "
        "arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n"
        '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\nWeather?<|im_end|>\n"
        '<|im_start|>assistant\n<tool_call>\n{"name": "weather", "arguments": {"city": "Bern"}}\n</tool_call>'
        "<|im_end|>\n"
        '<|im_start|>user\n<tool_response>\n{"t": 7}\n</tool_response><|im_end|>\n'
        "<|im_start|>assistant\n7 degrees.<|im_end|>\n"
    )
    assert labelled(pieces) == [
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Bern"}}\n</tool_call><|im_end|>',
        "7 degrees.<|im_end|>",
    ]


def test_qwen_puts_several_results_into_one_user_turn(tokenizer):
    messages = (
        Message(USER, "Both?"),
        Message(BOT, "[...]", (CALL, CALL), "Let me see."),
        Message(TOOL, "7"),
        Message(TOOL, "8"),
        Message(BOT, "7 and 8."),
    )
    text = ChatFormat(tokenizer, named_template("qwen")).render(messages)
    call = '\n<tool_call>\n{"name": "weather", "arguments": {"city": "Bern"}}\n</tool_call>'
    assert text == (
        f"{QWEN}<|im_start|>user\nBoth?<|im_end|>\n<|im_start|>assistant\nLet me see.{call}{call}<|im_end|>\n"
        "<|im_start|>user\n<tool_response>\n7\n</tool_response>\n<tool_response>\n8\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n7 and 8.<|im_end|>\n"
    )


def test_llama3_writes_tools_as_llama_3_1(tokenizer):
    pieces = ChatFormat(tokenizer, named_template("llama3")).pieces(CALLING)
    pretty = json.dumps(WEATHER, indent=4)
    assert "".join(piece.text for piece in pieces) == (
        "<s><|start_header_id|>system<|end_header_id|>\n\nEnvironment: ipython\n"
        "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nGiven the following functions, please respond with a "
        "JSON for a function call with its proper arguments that best answers the given prompt.\n\n"
        'Respond in the format {"name": function name, "parameters": '
        "dictionary of argument name and its value}.Do not use variables."
        f"\n\n{pretty}\n\nWeather?<|eot_id|>"
        '<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "weather", "parameters": {"city": "Bern"}}'
        '<|eot_id|><|start_header_id|>ipython<|end_header_id|>\n\n{"t": 7}<|eot_id|>'
        "<|start_header_id|>assistant<|end_header_id|>\n\n7 degrees.<|eot_id|>"
    )
    assert labelled(pieces)[0] == '{"name": "weather", "parameters": {"city": "Bern"}}<|eot_id|>'


def test_mistral_writes_tools_as_version_3(tokenizer):
    pieces = ChatFormat(tokenizer, named_template("mistral")).pieces(CALLING)
    assert "".join(piece.text for piece in pieces) == (
        f"<s>[AVAILABLE_TOOLS] [{WEATHER_JSON}][/AVAILABLE_TOOLS][INST] Weather?[/INST]"
        '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Bern"}, "id": "call00000"}]</s>'
        '[TOOL_RESULTS] {"content": {"t": 7}, "call_id": "call00000"}[/TOOL_RESULTS] 7 degrees.</s>'
    )


@pytest.mark.parametrize(("name", "file"), [("qwen", "qwen2_5"), ("llama3", "llama3"), ("gemma3", "gemma3")])
def test_template_equals_the_one_that_trl_carries(tmp_path, tokenizer, name, file):
    import trl

    path = Path(trl.__file__).parent / "chat_templates" / f"{file}.jinja"
    if not path.is_file():
        pytest.skip(f"this version of trl carries no {path.name}")
    theirs = own_template(tmp_path, path.read_text(encoding="utf-8"))
    ours = ChatFormat(tokenizer, named_template(name))
    rows = [conversation(*TWO_TURNS), conversation(*WITH_SYSTEM), *([CALLING] if name == "qwen" else [])]
    for row in rows:
        assert ours.pieces(row) == theirs.pieces(row)


def test_families_without_tools_get_them_in_the_system_prompt(tokenizer):
    text = ChatFormat(tokenizer, named_template("vicuna")).render(CALLING.messages, CALLING.tools)
    function = json.dumps(WEATHER["function"])
    assert text == (
        f"{VICUNA}\n\nYou can call these tools, each described by a JSON object:\n{function}\n"
        'To call one, answer with {"name": <name of the tool>, "arguments": {<its arguments>}} '
        "and nothing else. "
        f'USER: Weather? ASSISTANT: {json.dumps(CALL)}</s>USER: {{"t": 7}} ASSISTANT: 7 degrees.</s>'
    )


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_template_takes_tools_and_their_results(tokenizer, name):
    pieces = ChatFormat(tokenizer, named_template(name)).pieces(CALLING)
    whole = "".join(piece.text for piece in pieces)
    assert "Weather now" in whole
    assert '{"t": 7}' in whole
    assert len(labelled(pieces)) == 2
    assert "weather" in labelled(pieces)[0]


def test_labels_are_the_response_with_its_end_and_nothing_else(tmp_path):
    tokens = ("<|im_start|>", "<|im_end|>")
    chat = ChatFormat(byte_tokenizer(tmp_path, extra=tokens), named_template("chatml"))
    [(ids, labels)] = chat.encode([chat.pieces(conversation(*TWO_TURNS))])
    start, end = chat.tokenizer.convert_tokens_to_ids(list(tokens))
    newline = chat.tokenizer("\n")["input_ids"]

    def turn(role: str, text: str, learnt: bool) -> list[tuple[int, int]]:
        head = [start, *chat.tokenizer(f"{role}\n")["input_ids"]]
        body = [*chat.tokenizer(text)["input_ids"], end]
        pairs = [(each, -100) for each in head] + [(each, each if learnt else -100) for each in body]
        return [*pairs, (newline[0], -100)]

    expected = [
        pair
        for role, text, learnt in (
            ("user", "Hi", False),
            ("assistant", "Hello!", True),
            ("user", "Bye?", False),
            ("assistant", "Bye.", True),
        )
        for pair in turn(role, text, learnt)
    ]
    assert list(zip(ids, labels, strict=True)) == expected


def test_responses_begin_at_a_token_of_their_own(tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: n for n, char in enumerate([*letters, ":A"])}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[(":", "A")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")
    chat = ChatFormat(fast, named_template("alpaca"))
    assert vocab[":A"] in fast("### Response:A")["input_ids"]  # tokenised whole, prompt and response merge
    [(ids, labels)] = chat.encode([chat.pieces(conversation((USER, "Q"), (BOT, "A")))])
    assert vocab[":A"] not in ids
    assert next(label for label in labels if label != -100) == vocab["A"]


def test_dummy_prefix_comes_once_per_row(tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = [chr(code) for code in range(33, 127)] + ["\u2581", "\n"]
    inner = Tokenizer(models.BPE(vocab={char: n for n, char in enumerate(letters)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    inner.decoder = decoders.Metaspace(prepend_scheme="always")
    inner.add_special_tokens(["</s>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")
    assert fast.convert_ids_to_tokens(fast("Hi")["input_ids"]) == ["\u2581", "H", "i"]
    chat = ChatFormat(fast, named_template("vicuna"))
    turns = conversation((SYSTEM, "S"), (USER, "U"), (BOT, "A"))
    [(ids, labels)] = chat.encode([chat.pieces(turns)])
    assert (
        "".join(chat.tokenizer.convert_ids_to_tokens(ids))
        == "\u2581S\u2581USER:\u2581U\u2581ASSISTANT:\u2581A</s>"
    )
    learnt = [label for label in labels if label != -100]
    assert fast.convert_ids_to_tokens(learnt) == ["\u2581", "A", "</s>"]


@pytest.mark.parametrize(
    ("adds", "name"), [(True, "chatml"), (True, "llama3"), (False, "llama3"), (False, "chatml")]
)
def test_beginning_of_sequence_comes_exactly_once(tmp_path, adds, name):
    from tokenizers.processors import TemplateProcessing

    fast = byte_tokenizer(tmp_path)
    if adds:
        fast.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", fast.bos_token_id)]
        )
    chat = ChatFormat(fast, named_template(name))
    [(ids, labels)] = chat.encode([chat.pieces(conversation(*TWO_TURNS))])
    wanted = 1 if adds or name == "llama3" else 0
    assert ids.count(fast.bos_token_id) == wanted
    assert (ids[0] == fast.bos_token_id) is bool(wanted)
    assert labels[0] == -100
    assert len(ids) == len(labels)


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(
    lambda text: text.strip() == text
)


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(sorted(PUBLISHED)), words=st.lists(texts, min_size=4, max_size=4))
def test_any_text_comes_back_from_its_labels(tokenizer, name, words):
    chat = ChatFormat(tokenizer, named_template(name))
    turns = conversation((USER, words[0]), (BOT, words[1]), (USER, words[2]), (BOT, words[3]))
    pieces = chat.pieces(turns)
    [(ids, labels)] = chat.encode([pieces])
    whole = "".join(piece.text for piece in pieces)
    assert whole == chat.render(turns.messages)
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == whole
    stop = named_template(name).stop or "</s>"
    learnt = tokenizer.decode(
        [label for label in labels if label != -100], clean_up_tokenization_spaces=False
    )
    lead = PUBLISHED[name][2][0].partition("Hello!")[0]
    expected = f"{lead}{words[1]}{stop}{lead}{words[3]}{stop}"
    assert learnt.replace(" ", "") == expected.replace(" ", "")


def test_own_template_is_used_and_its_trailing_newline_is_not_learnt(tmp_path):
    chat = own_template(
        tmp_path,
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}",
    )
    pieces = chat.pieces(conversation((USER, "Hi"), (BOT, "Yo")))
    assert pieces == [
        Piece("<user>Hi</user>\n<assistant>", False),
        Piece("Yo</assistant>", True),
        Piece("\n", False),
    ]


def test_newline_that_is_the_only_end_of_turn_is_learnt(tmp_path):
    chat = own_template(tmp_path, "{% for m in messages %}{{ m.content }}{{ '\\n' }}{% endfor %}")
    assert labelled(chat.pieces(conversation((USER, "Hi"), (BOT, "Yo")))) == ["Yo\n"]


FORGETFUL = (
    "{% for m in messages %}{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('#')[-1] }}"
    "{% else %}{{ m.content }}{% endif %}|{% endfor %}"
)


def test_template_that_rewrites_history_makes_the_row_invalid_and_names_the_way_out(tmp_path):
    chat = own_template(tmp_path, FORGETFUL)
    turns = conversation((USER, "a"), (BOT, "thought#b"), (USER, "c"), (BOT, "thought#d"))
    with pytest.raises(RowError, match="mask_history: true"):
        chat.pieces(turns)
    assert labelled(chat.pieces(turns, mask_history=True)) == ["thought#d|"]


def test_template_whose_generation_prompt_differs_makes_the_row_invalid(tmp_path):
    chat = own_template(
        tmp_path,
        "{% for m in messages %}{{ m.content }}|{% endfor %}{% if add_generation_prompt %}<think>{% endif %}",
    )
    with pytest.raises(RowError, match="choose a named template"):
        chat.pieces(conversation((USER, "a"), (BOT, "b")))


def test_template_that_raises_or_leaves_something_out_makes_the_row_invalid(tmp_path):
    raising = own_template(
        tmp_path / "a",
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
        "{% for m in messages %}{% if m.role != 'tool' %}{{ m.content }}|{% endif %}{% endfor %}",
    )
    with pytest.raises(RowError, match="refuses the row: no system here"):
        raising.pieces(conversation(*WITH_SYSTEM))
    with pytest.raises(RowError, match="leaves out a tool turn"):
        raising.pieces(Conversation(CALLING.messages))


def test_today_in_a_template_is_one_fixed_day(tmp_path):
    chat = own_template(
        tmp_path,
        "{{ strftime_now('%d %b %Y') }}{{ date_string }}{% for m in messages %}|{{ m.content }}{% endfor %}",
    )
    assert chat.render(conversation((USER, "a")).messages) == "26 Jul 202426 Jul 2024|a"
    assert any("26 Jul 2024" in line for line in chat.notices())


@pytest.mark.parametrize(
    "form",
    [
        "%Y-%m-%d",
        "%d %B %Y",
        "%A, %-d. %b %y",
        "%H:%M:%S %Z",
        "100%% on %%d %d",
        "%j/%U/%-m/%-H",
        "%F %T %e",
        "%",
    ],
)
def test_every_form_of_the_day_is_written_as_python_writes_it(tmp_path, form):
    """In a loop, through a variable and by its keyword, as templates of model families do."""
    text = (
        "\n  {% if strftime_now is defined %}\n  {% set day = strftime_now(format=form) %}{% endif %}\n"
        "{% for m in messages %}{{ m.content }}{{ day }}|{{ strftime_now(form) }}{% endfor %}"
    )
    written = DAY.strftime(form)
    shown = own_template(tmp_path, text).render([Message("user", "a")], variables={"form": form})
    assert shown == f"\na{written}|{written}"


def test_own_template_that_knows_tools_gets_them(tmp_path):
    chat = own_template(
        tmp_path,
        "{% for tool in tools or [] %}[{{ tool.function.name }}]{% endfor %}{% for m in messages %}"
        "{% if m.tool_calls %}{% set c = m.tool_calls[0].function %}>{{ c.name }}:{{ c.arguments.city }}"
        "{% else %}{{ m.content }}{% endif %}|{% endfor %}",
    )
    assert (
        chat.render(CALLING.messages, CALLING.tools) == '[weather]Weather?|>weather:Bern|{"t": 7}|7 degrees.|'
    )


def test_missing_template_and_unknown_name_say_what_to_choose(tmp_path, tokenizer):
    with pytest.raises(
        ConfigError, match=r"template is not set.*\n.*\nSet template to one of alpaca, chatml"
    ):
        ChatFormat(tokenizer, None)
    with pytest.raises(ConfigError, match="Did you mean 'llama3'"):
        named_template("lama3")
    with pytest.raises(ConfigError, match="No tokenizer can be loaded"):
        ChatFormat.load(str(tmp_path / "nothing"), "llama3")


def test_notice_where_the_marks_are_not_single_tokens(tmp_path, tokenizer):
    [line] = ChatFormat(tokenizer, named_template("llama3")).notices()
    assert line.startswith("template llama3: the tokenizer has no single token for <|start_header_id|>")
    whole = byte_tokenizer(tmp_path, extra=TEMPLATES["llama3"].tokens)
    assert ChatFormat(whole, named_template("llama3")).notices() == []


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([(USER, "a")], "no assistant turn"),
        ([(BOT, "a")], "assistant after start"),
        ([(USER, "a"), (USER, "b"), (BOT, "c")], "user after user"),
        ([(USER, "a"), (BOT, "b"), (USER, "c")], "the last turn is the user's"),
        ([(USER, "a"), (BOT, " \n")], "empty response"),
        ([(USER, " "), (BOT, "a")], "empty prompt"),
        ([(USER, "a"), (SYSTEM, "s"), (BOT, "b")], "system after user"),
        ([(USER, "a"), (BOT, "b\ud800")], "not valid Unicode"),
    ],
)
def test_conversations_out_of_order_are_told(turns, reason):
    with pytest.raises(RowError, match=reason):
        check_conversation(conversation(*turns).messages)
