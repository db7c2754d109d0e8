"""What a family of models is here, and the settings that several share.

Two layers (four where a family alternates kinds of layers), hidden sizes of 32 or 64, 64 token ids. Weights
are drawn wide (0.2) and every vector (norms, biases) away from its neutral value; soft caps, windows, chunks
and multipliers are small enough to matter for rows of 3 to 15 tokens, so that a figure tells whether they
were applied.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tiny_training import VOCABULARY

WIDE = 0.2
"""Standard deviation of the weights; 0.1 is added to vectors."""
BALANCING = 0.02
"""router_aux_loss_coef of every mixture of experts here, ten times the usual."""


@dataclass(frozen=True)
class Family:
    """A family of models and how this package takes it.

    Attributes:
        title: as people call it. model_type: transformers' name.
        settings: of its configuration.
        balancing: its training adds the model's load-balancing loss, times `BALANCING`.
        asked: the run's configuration asks for that loss; otherwise the model's own does.
        refused: kind of fine-tuning -> words of the refusal, which names the model_type too; a kind that is
            not there has to work.
        quick: belongs to ``make test``; all others to ``make test-families``.
    """

    title: str
    model_type: str
    settings: Mapping[str, Any]
    balancing: bool = False
    asked: bool = False
    refused: Mapping[str, str] = field(default_factory=dict)
    quick: bool = False


SPECIAL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": WIDE,
}
BASE: dict[str, Any] = {
    **SPECIAL,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
HEADS = {"head_dim": 8}
EXPERTS = {"router_aux_loss_coef": BALANCING}
SOME_OF_FOUR = {"num_experts": 4, "num_experts_per_tok": 2, **EXPERTS}
LOCAL_FOUR = {"num_local_experts": 4, "num_experts_per_tok": 2, **EXPERTS}
MULTIPLIERS = {
    "embedding_multiplier": 3.0,
    "logits_scaling": 2.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.3,
}
GEMMA = {**HEADS, "query_pre_attn_scalar": 8, "sliding_window": 4}
DEEPSEEK = {
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
STATE_SPACE = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 2,
    "mamba_chunk_size": 4,
}
LINEAR_ATTENTION = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
WINDOW = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
HYBRID = {"layer_types": ["linear_attention", "full_attention"]}


def family(title: str, model_type: str, *parts: Mapping[str, Any], **rest: Any) -> Family:
    """Return a family whose settings are `BASE` and the parts."""
    settings: dict[str, Any] = {**BASE}
    for part in parts:
        settings |= part
    return Family(title, model_type, settings, **rest)
