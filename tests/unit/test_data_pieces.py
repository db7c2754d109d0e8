"""Added tokens that swallow white space, and tokenizers that put a space before texts: ids as of a whole."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dataflex_pipeline.data.chat.labelled import ChatFormat
from dataflex_pipeline.data.chat.templates import named_template
from dataflex_pipeline.data.conversation import Conversation, Message, RowError

MARKS = ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "</s>")
TURNS = (
    Message("user", "Two plus two?"),
    Message("assistant", "Four."),
    Message("user", " Plus one? "),
    Message("assistant", " Five.\n"),
)


def tokenizer_of(kind: str, **flags):
    """One token per character; the kinds are those of Llama (three ages), GPT-2 and one that adds a space."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    if kind.startswith("bytes"):
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    else:
        letters = [chr(code) for code in range(33, 127)] + ["\u2581", "\n", "\t", "é"]
    inner = Tokenizer(models.BPE(vocab={char: n for n, char in enumerate(letters)}, merges=[]))
    if kind.startswith("bytes"):
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=kind == "bytes with a space")
        inner.decoder = decoders.ByteLevel()
    elif kind == "prepended":
        inner.normalizer = normalizers.Sequence(
            [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        )
    else:
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=False)
    inner.add_special_tokens([AddedToken(text, special=True, **flags) for text in MARKS])
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")


KINDS = ("bytes", "bytes with a space", "prepended", "always", "first", "never")
FLAGS = [
    dict(zip(("rstrip", "lstrip", "normalized"), values, strict=True))
    for values in product((False, True), repeat=3)
]


def cut(chat: ChatFormat, turns=TURNS):
    pieces = chat.pieces(Conversation(tuple(turns)))
    [(ids, labels)] = chat.encode([pieces])
    return pieces, ids, labels


@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["phi3", "zephyr"])
def test_ids_are_those_of_the_whole_text(kind, flags, name):
    tokenizer = tokenizer_of(kind, **flags)
    pieces, ids, labels = cut(ChatFormat(tokenizer, named_template(name)))
    whole = "".join(piece.text for piece in pieces)
    assert ids == tokenizer(whole, add_special_tokens=False)["input_ids"]
    assert len(labels) == len(ids)


def test_labels_of_phi_3_token_by_token():
    """As Phi-3-mini: marks swallow the white space that follows them, and a space is put before each text."""
    tokenizer = tokenizer_of("prepended", rstrip=True, normalized=False)
    _, ids, labels = cut(
        ChatFormat(tokenizer, named_template("phi3")),
        TURNS[:1] + (Message("assistant", "4."),) * 1 + TURNS[2:],
    )
    tokens = tokenizer.convert_ids_to_tokens(ids)
    learnt = [label != -100 for label in labels]
    assert "".join(tokens) == (
        "<|user|>\u2581Two\u2581plus\u2581two?<|end|><|assistant|>\u25814.<|end|>"
        "<|user|>\u2581Plus\u2581one?\u2581<|end|><|assistant|>\u2581Five.\n<|end|>"
    )
    assert "".join(token for token, carries in zip(tokens, learnt, strict=True) if carries) == (
        "\u25814.<|end|>\u2581Five.\n<|end|>"
    )
    assert [label for label in labels if label != -100] == [
        token for token, carries in zip(ids, learnt, strict=True) if carries
    ]


def test_own_template_over_several_turns_gives_the_ids_of_apply_chat_template():
    tokenizer = tokenizer_of("bytes", rstrip=True, normalized=False)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    )
    _, ids, labels = cut(ChatFormat(tokenizer, None))
    turns = [{"role": turn.role, "content": turn.content} for turn in TURNS]
    assert ids == tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
    assert tokenizer.decode([label for label in labels if label != -100]) == "Four.<|end|>Five.\n<|end|>"


spaced = st.text(st.sampled_from("ab. \n\té"), min_size=1, max_size=6).filter(str.strip)


NORMALISED = {"rstrip": True, "lstrip": False, "normalized": True}
"""Marks that such a tokenizer knows behind a space only, and that swallow the white space behind them."""


@example(kind="prepended", flags=NORMALISED, words=["a", "a", "a", "a "], name="phi3")
@example(kind="prepended", flags=NORMALISED, words=["a", "a ", "a", "a "], name="zephyr")
@example(kind="prepended", flags=NORMALISED | {"lstrip": True}, words=["a", "a ", " a", "a\n"], name="phi3")
@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    flags=st.sampled_from(FLAGS),
    words=st.lists(spaced, min_size=4, max_size=4),
    name=st.sampled_from(["phi3", "zephyr"]),
)
def test_any_text_has_the_ids_of_the_whole(kind, flags, words, name):
    tokenizer = tokenizer_of(kind, **flags)
    roles = ("user", "assistant", "user", "assistant")
    turns = [Message(role, text) for role, text in zip(roles, words, strict=True)]
    pieces, ids, labels = cut(ChatFormat(tokenizer, named_template(name)), turns)
    assert ids == tokenizer("".join(piece.text for piece in pieces), add_special_tokens=False)["input_ids"]
    assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))


PHI3_OWN = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
"""The shape of Phi-3's own template: the end of text stands behind the last turn only."""


def test_an_end_of_text_behind_the_last_turn_only_is_learnt_there_only():
    tokenizer = tokenizer_of("bytes", rstrip=True, normalized=False)
    tokenizer.chat_template = PHI3_OWN
    pieces, ids, labels = cut(ChatFormat(tokenizer, None), [*TURNS[:3], Message("assistant", "Five.")])
    assert [piece.text for piece in pieces if piece.labelled] == ["Four.<|end|>", "Five.<|end|>\n</s>"]
    turns = [
        {"role": turn.role, "content": turn.content} for turn in (*TURNS[:3], Message("assistant", "Five."))
    ]
    assert ids == tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
    learnt = [tokenizer.convert_ids_to_tokens(label) for label in labels if label != -100]
    assert learnt == ["F", "o", "u", "r", ".", "<|end|>", "F", "i", "v", "e", ".", "<|end|>", "</s>"]
    [last] = [
        piece for piece in ChatFormat(tokenizer, None).pieces(Conversation(TURNS[:2])) if piece.labelled
    ]
    assert last.text == "Four.<|end|>\n</s>"


def test_an_end_that_only_the_last_turn_has_is_no_end_of_the_others():
    tokenizer = tokenizer_of("bytes")
    tokenizer.chat_template = PHI3_OWN.replace("<|end|>", "")
    with pytest.raises(RowError, match="writes earlier turns otherwise once later ones follow"):
        ChatFormat(tokenizer, None).pieces(Conversation(TURNS))
