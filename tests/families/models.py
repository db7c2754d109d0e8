"""Tiny random models of many families: their configurations, and folders with weights and a tokenizer.

Two layers (four where a family alternates kinds of layers), hidden sizes of 32 or 64, 64 token ids. Weights
are drawn wide (0.2) and every vector (norms, biases) away from its neutral value; soft caps, windows, chunks
and multipliers are small enough to matter for rows of 3 to 15 tokens, so that a figure tells whether they
were applied.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tiny_training import VOCABULARY, save_tokenizer

KINDS = ("lora", "full")
SEED = 0
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
        refused: kind of fine-tuning -> what of it cannot be done ("training" or "scoring"), which is then
            refused by name.
        quick: belongs to ``make test``; all others to ``make test-families``.
    """

    title: str
    model_type: str
    settings: Mapping[str, Any]
    balancing: bool = False
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
HYBRID = {"layer_types": ["linear_attention", "full_attention"]}


def _family(title: str, model_type: str, *parts: Mapping[str, Any], **rest: Any) -> Family:
    """Return a family whose settings are `BASE` and the parts."""
    settings: dict[str, Any] = {**BASE}
    for part in parts:
        settings |= part
    return Family(title, model_type, settings, **rest)


NAMED = (
    _family("Llama", "llama", quick=True),
    _family("Qwen2", "qwen2"),
    _family("Qwen3", "qwen3", HEADS),
    _family(
        "Gemma 2",
        "gemma2",
        {**GEMMA, "attn_logit_softcapping": 1.0, "final_logit_softcapping": 3.0},
        quick=True,
    ),
    _family("Gemma 3 (text)", "gemma3_text", GEMMA, {"sliding_window_pattern": 2}),
    _family("Mistral", "mistral", {"sliding_window": 4}),
    _family("Phi-3", "phi3", quick=True),
    _family("GLM-4", "glm4", HEADS),
    _family("Granite", "granite", MULTIPLIERS),
    _family("OLMo 2", "olmo2"),
    Family(
        "GPT-2",
        "gpt2",
        {
            **SPECIAL,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 64,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        },
        quick=True,
    ),
    _family("GPT-NeoX, Pythia", "gpt_neox", quick=True),
    _family("Falcon", "falcon", {"new_decoder_architecture": False, "multi_query": True}),
    Family("BLOOM", "bloom", {**SPECIAL, "hidden_size": 32, "n_layer": 2, "n_head": 4}, quick=True),
    _family("Mixtral", "mixtral", LOCAL_FOUR, quick=True),
    _family("Qwen3-MoE", "qwen3_moe", HEADS, SOME_OF_FOUR, {"moe_intermediate_size": 16}, quick=True),
    _family("DeepSeek-V3", "deepseek_v3", DEEPSEEK, LATENT),
    _family("GPT-OSS", "gpt_oss", HEADS, LOCAL_FOUR, {"sliding_window": 4}, quick=True),
    Family(
        "Mamba", "mamba", {**SPECIAL, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}, quick=True
    ),
    _family("Falcon-H1", "falcon_h1", STATE_SPACE, {"mamba_d_ssm": 64, "lm_head_multiplier": 0.5}),
)
"""The families of `tests/test_families.py`."""

BALANCED = (
    _family(
        "Mixtral, with its balancing loss",
        "mixtral",
        LOCAL_FOUR,
        balancing=True,
        quick=True,
    ),
    _family("OLMoE, with its balancing loss", "olmoe", SOME_OF_FOUR, balancing=True),
    _family(
        "Qwen3-MoE, with its balancing loss",
        "qwen3_moe",
        HEADS,
        SOME_OF_FOUR,
        {"moe_intermediate_size": 16},
        balancing=True,
    ),
    _family("GraniteMoE, with its balancing loss", "granitemoe", LOCAL_FOUR, MULTIPLIERS, balancing=True),
    _family(
        "GPT-OSS, with its balancing loss",
        "gpt_oss",
        HEADS,
        LOCAL_FOUR,
        {"sliding_window": 4},
        balancing=True,
    ),
)
"""Mixtures of experts trained with their load-balancing loss."""

FURTHER = (
    _family("OLMoE", "olmoe", SOME_OF_FOUR),
    _family("GraniteMoE", "granitemoe", LOCAL_FOUR, MULTIPLIERS),
    _family(
        "Granite 4 (hybrid)",
        "granitemoehybrid",
        LOCAL_FOUR,
        MULTIPLIERS,
        STATE_SPACE,
        {"shared_intermediate_size": 16, "layer_types": ["mamba", "attention"]},
    ),
    _family(
        "Llama 4 (text)",
        "llama4_text",
        HEADS,
        LOCAL_FOUR,
        {
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 48,
            "interleave_moe_layer_step": 2,
            "num_hidden_layers": 4,
            "attention_chunk_size": 8,
            "floor_scale": 4,
        },
    ),
    _family(
        "Jamba",
        "jamba",
        SOME_OF_FOUR,
        {
            "num_hidden_layers": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
        },
    ),
    _family(
        "Qwen3-Next",
        "qwen3_next",
        HEADS,
        SOME_OF_FOUR,
        LINEAR_ATTENTION,
        HYBRID,
        {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    ),
    _family("MiniMax", "minimax", HEADS, LOCAL_FOUR, HYBRID, {"block_size": 4}),
    _family(
        "RecurrentGemma",
        "recurrent_gemma",
        {
            "logits_soft_cap": 3.0,
            "attention_window_size": 4,
            "block_types": ["recurrent", "attention"],
            "lru_width": 32,
            "w_init_variance_scale": 1.0,
        },
    ),
    Family(
        "xLSTM",
        "xlstm",
        {
            **SPECIAL,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_heads": 4,
            "output_logit_soft_cap": 3.0,
            "chunk_size": 16,
        },
    ),
    _family(
        "ModernBERT decoder",
        "modernbert-decoder",
        {"local_attention": 8, "cls_token_id": 1, "sep_token_id": 2},
    ),
    _family(
        "Gemma 3n (text)",
        "gemma3n_text",
        HEADS,
        {
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 8,
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "laurel_rank": 4,
            "sliding_window": 4,
            "final_logit_softcapping": 3.0,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0],
        },
    ),
    Family(
        "Mamba 2",
        "mamba2",
        {
            **SPECIAL,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_heads": 8,
            "head_dim": 8,
            "state_size": 8,
            "n_groups": 2,
            "chunk_size": 4,
        },
    ),
    _family("OPT", "opt", {"ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": WIDE, "dropout": 0.0}),
    _family(
        "StableLM", "stablelm", {"use_parallel_residual": True, "qk_layernorm": True, "use_qkv_bias": True}
    ),
    _family("Cohere", "cohere", {"logit_scale": 0.3}),
    _family("Nemotron", "nemotron"),
    _family("StarCoder2", "starcoder2", {"sliding_window": 4}),
    Family("MPT", "mpt", {**SPECIAL, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64}),
    _family("Phi", "phi", {"partial_rotary_factor": 0.5}),
    _family("GLM-4 MoE", "glm4_moe", HEADS, DEEPSEEK, {"n_group": 1}),
    _family("Bamba", "bamba", STATE_SPACE, {"attn_layer_indices": [1]}),
)
"""Further families of the table and the long target."""

ALL = (*NAMED, *BALANCED, *FURTHER)


def make_family(family: Family, folder: Path) -> Path:
    """Save a random model of the family, with a word-level tokenizer; an existing folder is left alone.

    Returns:
        The folder, as ``model_name_or_path`` takes it.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    place = folder / family.title.replace(" ", "-").lower()
    if place.exists():
        return place
    torch.manual_seed(SEED)
    config = AutoConfig.for_model(family.model_type, **family.settings)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(place)
    save_tokenizer(place)
    return place
