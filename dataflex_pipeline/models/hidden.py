"""Last hidden states, averaged over the positions of a row with weights that rise along it.

    e = (sum over t = 1..T of t h_t) / (sum over t = 1..T of t)

with h_t the last hidden state of token t, after the model's final norm (transformers' ``last_hidden_state``),
of a row of T tokens. In a causal model later states have seen more of the row, and weigh more. No logits are
made. Sums are taken in float32, whatever the model computes in.

Sources: Muennighoff, SGPT: GPT Sentence Embeddings for Semantic Search (2022), section 3.1.1; Ivison et al.,
Large-Scale Data Selection for Instruction Tuning (2025), who select by it (RDS+).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from dataflex_pipeline.errors import ConfigError
from dataflex_pipeline.models.batches import Sequences, padded
from dataflex_pipeline.models.room import Room
from dataflex_pipeline.schemas import IGNORED

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def weighted_states(
    model: PreTrainedModel | PeftModel, rows: Sequence[Sequence[int]], room: Room
) -> np.ndarray:
    """Return the weighted mean of each row's last hidden states. [rows, H] float32

    Args:
        model: a causal LM in eval mode, with an adapter or without.
        rows: token ids, at least one each.
        room: padded tokens per batch.

    Raises:
        ConfigError: the model has no body apart from its head.
    """
    body = body_of(model)
    lengths = np.array([len(ids) for ids in rows], dtype=np.int64)
    ids = np.concatenate([np.asarray(each, dtype=np.int64) for each in rows] or [np.zeros(0, np.int64)])
    starts = np.concatenate([[0], np.cumsum(lengths)])
    sequences = Sequences(ids, np.full_like(ids, IGNORED), starts)
    found = np.zeros((len(rows), hidden_size(model.config)), dtype=np.float32)

    def work(batch: np.ndarray) -> None:
        found[batch] = _batch_states(body, sequences, batch)

    room.settle(sequences, partial(_batch_states, body), next(body.parameters()).device)
    room.each_batch(lengths, np.zeros_like(lengths), 1, work)
    return found


def body_of(model: PreTrainedModel | PeftModel) -> torch.nn.Module:
    """Return the part of a causal LM that makes the hidden states, the adapter's layers in it.

    Raises:
        ConfigError: it has none apart from its head.
    """
    causal = model.get_base_model() if hasattr(model, "peft_config") else model
    body: torch.nn.Module = causal.base_model
    if body is causal:
        raise ConfigError(
            f"embed_method: model was set, and a {type(causal).__name__} has no body apart from its head.",
            "Its last hidden states cannot be told from its logits.",
            "Set embed_model to another causal language model, or embed_method to sentence-transformers.",
        )
    return body


def hidden_size(config: PreTrainedConfig) -> int:
    """Return the length of a model's last hidden state, of its text part where it has several."""
    text = config.get_text_config()
    return int(getattr(text, "word_embed_proj_dim", None) or text.hidden_size)


def text_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[Sequence[int]]:
    """Return the token ids of texts as the tokenizer writes them for the model; none of an empty text.

    Args:
        tokenizer: of the model. texts: what is embedded.
    """
    filled = [text for text in texts if text]
    found = tokenizer(filled, return_attention_mask=False, verbose=False)["input_ids"] if filled else []
    ids = iter(found)
    return [next(ids) if text else [] for text in texts]


def _batch_states(body: torch.nn.Module, sequences: Sequences, rows: np.ndarray) -> np.ndarray:
    """Return the weighted means of one batch. [B, H] float32"""
    import torch

    device = next(body.parameters()).device
    ids, _, attention = (torch.from_numpy(array).to(device) for array in padded(sequences, rows))
    states = body(input_ids=ids, attention_mask=attention, use_cache=False).last_hidden_state  # [B, T, H]
    places = torch.arange(1, ids.shape[1] + 1, device=device, dtype=torch.float32)  # [T]
    weights = places * attention  # [B, T]
    weights = weights / weights.sum(1, keepdim=True)
    means = torch.einsum("bt,bth->bh", weights, states.float())
    found: np.ndarray = means.cpu().numpy()
    return found
