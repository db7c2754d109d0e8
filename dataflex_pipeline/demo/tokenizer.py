"""The demo's tokenizer: byte-level BPE with a chat template.

Every byte is a token, so any text (Chinese included) encodes without an unknown token and decodes back
exactly. Digits stand alone, so that arithmetic rows do not depend on which numbers were merged.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BOS, EOS, PAD = "<|begin|>", "<|end|>", "<|pad|>"
ROLES = ("system", "user", "assistant", "tool")
SPECIAL = (BOS, EOS, PAD, *(f"<|{role}|>" for role in ROLES))

# One turn is <|role|>content<|end|>. Tools are listed as JSON in a system turn of their own in front.
CHAT_TEMPLATE = (
    "{{- bos_token }}"
    "{%- if tools %}{{- '<|system|>Tools: ' + (tools | tojson) + eos_token }}{%- endif %}"
    "{%- for message in messages %}"
    "{%- if message['role'] not in ['system', 'user', 'assistant', 'tool'] %}"
    "{{- raise_exception('unknown role ' + message['role'] + ': use system, user, assistant or tool') }}"
    "{%- endif %}"
    "{{- '<|' + message['role'] + '|>' + (message['content'] or '') }}"
    "{%- if message['tool_calls'] %}{{- message['tool_calls'] | tojson }}{%- endif %}"
    "{{- eos_token }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"
)


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train the merges; the same texts in the same order give the same tokenizer.

    Args:
        texts: what to learn merges from.
        vocab_size: tokens in all: 256 bytes, the special ones, and the merges.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(bpe: Tokenizer, folder: Path, max_length: int) -> Any:
    """Write the tokenizer's files with the chat template inside, and return the loaded tokenizer."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=list(SPECIAL[3:]),
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=max_length,
    ).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)
