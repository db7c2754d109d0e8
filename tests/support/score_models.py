"""Tiny random models of three families with byte tokenizers, and features computed over prepared rows."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import torch
from data_fixtures import CHATML, byte_tokenizer, rows_of

from dataflex_pipeline.api import FeatureInput, Need, Silent
from dataflex_pipeline.config.fields import Config
from dataflex_pipeline.features.build import build_feature
from dataflex_pipeline.features.plan import plan_feature

VOCABULARY = 272
FAMILIES = ("llama", "gemma2", "gpt2")
ROWS = [
    {
        "messages": [
            {"role": "user", "content": f"What is {n} plus {n}?"},
            {"role": "assistant", "content": f"It is {2 * n}, of course." * (1 + n % 3)},
        ]
    }
    for n in range(8)
] + [
    {
        "messages": [
            {"role": "system", "content": "Sei kurz."},
            {"role": "user", "content": "Wie heisst die Hauptstadt von Österreich?"},
            {"role": "assistant", "content": "Wien."},
            {"role": "user", "content": "Und von 中国?"},
            {"role": "assistant", "content": "北京, wie jeder weiss."},
        ]
    },
]


def configuration(family: str, **more: object):
    """Return the configuration of a tiny model: rotary, soft-capped, or of learned positions."""
    from transformers import Gemma2Config, GPT2Config, LlamaConfig

    common = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
    }
    made = {
        "llama": lambda: LlamaConfig(**common | more),
        "gemma2": lambda: Gemma2Config(**common, head_dim=16, final_logit_softcapping=3.0),
        "gpt2": lambda: GPT2Config(
            vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=512, initializer_range=0.2
        ),
    }
    return made[family]()


def save_model(folder: Path, family: str, template: str | None = None, seed: int = 0) -> Path:
    """Save a tiny random model of a family with a byte tokenizer that knows ChatML's marks."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(configuration(family)).save_pretrained(folder)
    byte_tokenizer(folder, template, extra=CHATML)
    return folder


def load(folder: Path):
    """Return a model as plain transformers loads it, with eager attention as soft-capping needs it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def computed(
    folder: Path, rows, need: Need, model: Path, said=None, rows_per_part: int = 4, **settings
) -> pa.Table:
    """Compute a feature over a prepared table."""
    config = Config(**{"model_name_or_path": str(model), "template": "chatml", "device": "cpu"} | settings)
    given = FeatureInput(rows, rows.fingerprint, None, None)
    plan = plan_feature(need, config, lambda _: given, rows_per_part)
    built = build_feature(folder / "features", plan, said or Silent())
    return pa.Table.from_batches(list(built.table.blocks()), built.table.schema)


def prepared(folder: Path, data=ROWS, **more):
    """Prepare rows with ChatML and byte tokens; return the table and its rows."""
    table, rows, _ = rows_of(folder, data, **more)
    return table, rows
