"""Tiny models and padded batches for the tests of the gradients, and the reference: autograd, row by row."""

from __future__ import annotations

import numpy as np
import torch

VOCABULARY = 97


def llama(**changes):
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
    }
    return AutoModelForCausalLM.from_config(LlamaConfig(**settings | changes)).eval()


def gpt2():
    from transformers import AutoModelForCausalLM, GPT2Config

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=2
    )
    return AutoModelForCausalLM.from_config(config).eval()


def family(name):
    """Return a model of another family, its vectors (norms, biases) drawn at random."""
    from transformers import (
        AutoModelForCausalLM,
        CohereConfig,
        Gemma2Config,
        Gemma3nTextConfig,
        MambaConfig,
        OPTConfig,
        Qwen3MoeConfig,
    )

    common = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    opt = {"ffn_dim": 64, "max_position_embeddings": 64, "word_embed_proj_dim": 32}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 16}
    gemma3n = {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.0] * 4,
        "head_dim": 16,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 4,
    }
    configs = {
        "gemma2": lambda: Gemma2Config(**common, head_dim=16, final_logit_softcapping=3.0),
        "cohere": lambda: CohereConfig(**common, logit_scale=0.3),
        "qwen3_moe": lambda: Qwen3MoeConfig(**common, **experts),
        "opt": lambda: OPTConfig(**{k: common[k] for k in list(common)[:2]}, **opt, num_attention_heads=2),
        "gemma3n": lambda: Gemma3nTextConfig(**common | gemma3n),
        "mamba": lambda: MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2),
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(configs[name]()).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=0.5, std=0.2)
    return model


def lora(model, rank=4, **changes):
    """Put LoRA on every linear layer, with a B that is not zero."""
    from peft import LoraConfig, get_peft_model

    settings = {"r": rank, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    model = get_peft_model(model, LoraConfig(**settings | changes))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def random_rows(count=5, seed=0, longest=14):
    """Return (ids, labels) rows of different lengths; some positions, the first among them, unlabelled."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        ids = rng.integers(0, VOCABULARY, rng.integers(4, longest + 1))
        labels = np.where(rng.random(len(ids)) < 0.4, -100, ids)
        labels[-1] = ids[-1]
        rows.append((torch.from_numpy(ids), torch.from_numpy(labels)))
    return rows


def pad(rows, side="right"):
    """Return ids, labels and mask of a batch, each row padded with its own last token. [B, T] each"""
    width = max(len(ids) for ids, _ in rows)
    batch = torch.zeros(3, len(rows), width, dtype=torch.long)
    batch[1] = -100
    for row, (ids, labels) in enumerate(rows):
        span = slice(0, len(ids)) if side == "right" else slice(width - len(ids), width)
        batch[0, row] = ids[-1]
        batch[0, row, span], batch[1, row, span], batch[2, row, span] = ids, labels, 1
    return tuple(batch)


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def reference(model, rows):
    """Return transformers' own loss of each row alone and autograd's gradients of it."""
    losses, gradients = [], []
    for ids, labels in rows:
        loss = model(input_ids=ids[None], labels=labels[None], use_cache=False).loss
        found = torch.autograd.grad(loss, list(trainable(model).values()), allow_unused=True)
        pairs = zip(trainable(model).items(), found, strict=True)
        gradients.append({n: torch.zeros_like(p) if g is None else g for (n, p), g in pairs})
        losses.append(loss.item())
    return losses, gradients


class Collect:
    """A consumer that keeps everything, and refuses to be given anything twice."""

    def __init__(self):
        self.rows = {}

    def __call__(self, name, rows, gradient):
        for row in range(rows.start, rows.stop):
            assert (row, name) not in self.rows
            self.rows[row, name] = gradient[row - rows.start].clone()
