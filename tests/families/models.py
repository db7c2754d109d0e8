"""The families that are tried, and folders with a tiny random model of each."""

from __future__ import annotations

from pathlib import Path

from tiny_training import save_tokenizer

from families.further import FURTHER
from families.settings import (
    DEEPSEEK,
    GEMMA,
    HEADS,
    LATENT,
    LOCAL_FOUR,
    MULTIPLIERS,
    SOME_OF_FOUR,
    SPECIAL,
    STATE_SPACE,
    Family,
    family,
)

KINDS = ("lora", "full")
SEED = 0

NAMED = (
    family("Llama", "llama", quick=True),
    family("Qwen2", "qwen2"),
    family("Qwen3", "qwen3", HEADS),
    family(
        "Gemma 2",
        "gemma2",
        {**GEMMA, "attn_logit_softcapping": 1.0, "final_logit_softcapping": 3.0},
        quick=True,
    ),
    family("Gemma 3 (text)", "gemma3_text", GEMMA, {"sliding_window_pattern": 2}),
    family("Mistral", "mistral", {"sliding_window": 4}),
    family("Phi-3", "phi3", quick=True),
    family("GLM-4", "glm4", HEADS),
    family("Granite", "granite", MULTIPLIERS),
    family("OLMo 2", "olmo2"),
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
    family("GPT-NeoX, Pythia", "gpt_neox", quick=True),
    family("Falcon", "falcon", {"new_decoder_architecture": False, "multi_query": True}),
    Family("BLOOM", "bloom", {**SPECIAL, "hidden_size": 32, "n_layer": 2, "n_head": 4}, quick=True),
    family("Mixtral", "mixtral", LOCAL_FOUR, quick=True),
    family("Qwen3-MoE", "qwen3_moe", HEADS, SOME_OF_FOUR, {"moe_intermediate_size": 16}, quick=True),
    family("DeepSeek-V3", "deepseek_v3", DEEPSEEK, LATENT),
    family("GPT-OSS", "gpt_oss", HEADS, LOCAL_FOUR, {"sliding_window": 4}, quick=True),
    Family(
        "Mamba", "mamba", {**SPECIAL, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}, quick=True
    ),
    family("Falcon-H1", "falcon_h1", STATE_SPACE, {"mamba_d_ssm": 64, "lm_head_multiplier": 0.5}),
)
"""The families of `tests/reference/test_families.py`."""

BALANCED = (
    family(
        "Mixtral, with its balancing loss",
        "mixtral",
        LOCAL_FOUR,
        balancing=True,
        quick=True,
    ),
    family("OLMoE, with its balancing loss", "olmoe", SOME_OF_FOUR, balancing=True),
    family(
        "Qwen3-MoE, asked for its balancing loss",
        "qwen3_moe",
        HEADS,
        SOME_OF_FOUR,
        {"moe_intermediate_size": 16, "router_aux_loss_coef": 0.5},
        balancing=True,
        asked=True,
    ),
    family("GraniteMoE, with its balancing loss", "granitemoe", LOCAL_FOUR, MULTIPLIERS, balancing=True),
    family(
        "GPT-OSS, with its balancing loss",
        "gpt_oss",
        HEADS,
        LOCAL_FOUR,
        {"sliding_window": 4},
        balancing=True,
    ),
)
"""Mixtures of experts trained with their load-balancing loss."""

NO_BALANCING = dict.fromkeys(KINDS, "gives no load-balancing loss that it could weigh")
REFUSED = (
    family("Llama, asked for a balancing loss", "llama", asked=True, refused=NO_BALANCING, quick=True),
    family(
        "Llama 4 (text), asked for a balancing loss",
        "llama4_text",
        HEADS,
        LOCAL_FOUR,
        {"num_experts_per_tok": 1, "intermediate_size_mlp": 48},
        asked=True,
        refused=NO_BALANCING,
    ),
)
"""What transformers' models do not have, and is refused where it is asked for."""

ALL = (*NAMED, *BALANCED, *REFUSED, *FURTHER)


def make_family(one: Family, folder: Path) -> Path:
    """Save a random model of the family, with a word-level tokenizer; an existing folder is left alone.

    Returns:
        The folder, as ``model_name_or_path`` takes it.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    place = folder / one.title.replace(" ", "-").lower()
    if place.exists():
        return place
    torch.manual_seed(SEED)
    config = AutoConfig.for_model(one.model_type, **one.settings)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(place)
    save_tokenizer(place)
    return place
