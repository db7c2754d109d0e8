"""Tiny random models whose linear layers are named, owned or used in some special way."""

from __future__ import annotations

from gradient_models import VOCABULARY

COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
STATE_SPACE = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
SMALL = {"moe_intermediate_size": 16, "head_dim": 16}
PLAIN = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2}
FAMILIES = {
    "llama": COMMON,
    "phi3": COMMON,
    "gpt_neox": COMMON,
    "bloom": {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 2},
    "gpt2": {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
    | {"bos_token_id": 1, "eos_token_id": 2},
    "falcon": {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
    "mixtral": COMMON | {"num_local_experts": 4},
    "qwen3_moe": COMMON | EXPERTS | SMALL | {"mlp_only_layers": [0]},
    "olmoe": COMMON | EXPERTS,
    "gpt_oss": COMMON | LOCAL | {"head_dim": 16, "rope_scaling": None},
    "granitemoe": COMMON | LOCAL,
    "granitemoehybrid": COMMON
    | LOCAL
    | STATE_SPACE
    | {"shared_intermediate_size": 32, "layer_types": ["mamba", "attention"]},
    "deepseek_v3": COMMON
    | {"num_key_value_heads": 2, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1}
    | {"moe_intermediate_size": 16, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
    | {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "v_head_dim": 16, "qk_nope_head_dim": 8},
    "llama4_text": COMMON
    | {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 64, "head_dim": 16}
    | {"interleave_moe_layer_step": 2, "attention_chunk_size": 32},
    "jamba": COMMON
    | EXPERTS
    | {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}
    | {"mamba_d_state": 8, "mamba_dt_rank": 4},
    "qwen3_next": COMMON
    | EXPERTS
    | SMALL
    | {"shared_expert_intermediate_size": 16, "layer_types": ["linear_attention", "full_attention"]}
    | {"linear_num_value_heads": 2, "linear_num_key_heads": 1}
    | {"linear_key_head_dim": 16, "linear_value_head_dim": 16},
    "mamba": PLAIN | {"state_size": 8},
    "mamba2": PLAIN | {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1, "expand": 2},
    "falcon_h1": COMMON | STATE_SPACE | {"mamba_d_ssm": 64, "head_dim": 16},
    "gemma3n_text": COMMON
    | {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8, "head_dim": 16}
    | {"intermediate_size": [64, 64], "layer_types": ["sliding_attention", "full_attention"]}
    | {"laurel_rank": 4, "num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.0, 0.0]},
}


def family(name):
    """Return a tiny random model."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **FAMILIES[name])).eval()
    for parameter, value in model.named_parameters():
        if parameter.endswith("correct_output_scale"):  # zeros when fresh, which shuts off what follows
            torch.nn.init.ones_(value)
    return model
