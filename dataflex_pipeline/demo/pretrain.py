"""The demo model and its tokenizer: a small Llama, trained from nothing in about a minute on two cores.

Loss: mean negative log-likelihood over the answer tokens (the end token included) of a batch, in nats.
Batches mix all rows of one length bucket: padding stays small, and the buckets are so wide that no batch is
made of one skill only (sorting by exact length does that, and the model then learns far less).

The tokenizer is a byte-level BPE with a chat template. Every byte is a token, so any text (Chinese
included) encodes without an unknown token and decodes back exactly. Digits stand alone, so that arithmetic
rows do not depend on which numbers were merged.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dataflex_pipeline.demo.corpus import stream
from dataflex_pipeline.schemas import IGNORED
from dataflex_pipeline.seeds import derive_seed

if TYPE_CHECKING:
    import torch

    Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
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


@dataclass(frozen=True)
class ModelSettings:
    """The model and its pre-training.

    Attributes:
        vocab_size, hidden, layers, heads, intermediate: the Llama's shape; head size is hidden / heads.
        max_length: positions, in tokens.
        initializer_range: deviation of the first weights; three times the usual 0.02 because the layers are
            narrow, which saves about half of the steps.
        steps, batch_rows: optimizer steps and rows in each.
        bucket_tokens: rows whose lengths fall into one bucket of this width share batches.
        learning_rate: peak of the cosine schedule after a linear warm-up over ``warmup`` of the steps.
        threads: torch threads while training; the weights depend on it in the last bit.
        seed: of the weights and of the order of batches.
    """

    vocab_size: int = 1024
    hidden: int = 128
    layers: int = 4
    heads: int = 4
    intermediate: int = 384
    max_length: int = 4096
    initializer_range: float = 0.06
    steps: int = 600
    batch_rows: int = 32
    bucket_tokens: int = 24
    learning_rate: float = 3e-3
    warmup: float = 0.05
    threads: int = 2
    seed: int = 20


def new_model(settings: ModelSettings, pad_id: int, bos_id: int, eos_id: int) -> Any:
    """Make the untrained model, fp32, from the seed."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=settings.vocab_size,
        hidden_size=settings.hidden,
        intermediate_size=settings.intermediate,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        max_position_embeddings=settings.max_length,
        initializer_range=settings.initializer_range,
        tie_word_embeddings=False,
        pad_token_id=pad_id,
        bos_token_id=bos_id,
        eos_token_id=eos_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(settings.seed, "demo", "weights"))
        return LlamaForCausalLM(config).float()


@contextlib.contextmanager
def fixed_threads(count: int) -> Iterator[None]:
    """Run with exactly ``count`` torch threads: sums are split by thread, so bits depend on the number."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def batches(
    rows: Sequence[tuple[list[int], list[int]]], settings: ModelSettings, pad_id: int
) -> Iterator[Batch]:
    """Yield padded batches of rows of similar length, in a seeded order.

    Args:
        rows: (input ids, labels) of each row.

    Yields:
        input ids, attention mask, labels, each int64 [B, T].
    """
    rng, size = stream(settings.seed, "batches"), settings.batch_rows
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i][0]) // settings.bucket_tokens, rng.random()))
    groups = [order[start : start + size] for start in range(0, len(order), size)]
    rng.shuffle(groups)
    for group in groups:
        yield padded([rows[i] for i in group], pad_id)


def padded(rows: Sequence[tuple[list[int], list[int]]], pad_id: int) -> Batch:
    """Pad rows on the right to their longest.

    Returns:
        input ids, attention mask, labels, each int64 [B, T].
    """
    import torch

    longest = max(len(ids) for ids, _ in rows)
    ids = [tokens + [pad_id] * (longest - len(tokens)) for tokens, _ in rows]
    mask = [[1] * len(tokens) + [0] * (longest - len(tokens)) for tokens, _ in rows]
    labels = [marks + [IGNORED] * (longest - len(marks)) for _, marks in rows]
    return torch.tensor(ids), torch.tensor(mask), torch.tensor(labels)


def learning_rate(step: int, settings: ModelSettings) -> float:
    """Give the rate of step 0 <= step < steps: linear warm-up, then cosine to zero."""
    warm = max(1, round(settings.warmup * settings.steps))
    if step < warm:
        return settings.learning_rate * (step + 1) / warm
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warm) / (settings.steps - warm)))


def pretrain(
    model: Any,
    rows: Sequence[tuple[list[int], list[int]]],
    settings: ModelSettings,
    report: Callable[[str], None],
) -> float:
    """Train the model in place on the rows, once through.

    Returns:
        Mean loss of the last tenth of the steps, nats per answer token.
    """
    import torch

    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    losses: list[float] = []
    model.train()
    for step, (ids, mask, labels) in enumerate(batches(rows, settings, model.config.pad_token_id)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings)
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if (step + 1) % max(1, settings.steps // 10) == 0:
            report(f"pre-training: step {step + 1} of {settings.steps}, loss {losses[-1]:.3f} nats per token")
    model.eval()
    tail = losses[-max(1, len(losses) // 10) :]
    return sum(tail) / len(tail)
