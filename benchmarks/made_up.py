"""Made-up models and rows, and the arguments that describe them, for the benchmarks that run a model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from dataflex_pipeline.errors import ConfigError
from dataflex_pipeline.gradients.adam import AdamUpdate
from dataflex_pipeline.models.base import resolve_device
from dataflex_pipeline.models.batches import Sequences, batch_on, length_batches
from dataflex_pipeline.models.optimizer_states import AdamState
from dataflex_pipeline.models.token_losses import token_losses
from dataflex_pipeline.schemas import PREPARED

Batch = tuple[torch.Tensor, ...]
"""Ids, labels and attention mask, on the device. [B, T] each"""


def llama_settings(hidden: int, layers: int, vocabulary: int) -> dict[str, Any]:
    """Return the settings of a small Llama with heads of 64 dimensions."""
    return {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, hidden // 64),
        "num_key_value_heads": max(1, hidden // 64),
    }


SIZES: dict[str, dict[str, Any]] = {
    "tiny": llama_settings(128, 4, 8192),
    "1b": llama_settings(2048, 16, 128_256) | {"num_key_value_heads": 8, "tie_word_embeddings": True},
    "7b": llama_settings(4096, 32, 32_000)
    | {"intermediate_size": 11_008, "num_attention_heads": 32, "num_key_value_heads": 32},
}
"""By name of ``--model``: 1b has the shape of Llama 3.2 1B, 7b that of Llama 2 7B."""


def parser_of(description: str | None, vocabulary: int = 32_000) -> argparse.ArgumentParser:
    """Return a parser of the arguments that say which model runs where, and where the results go."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model",
        type=_model,
        help=f"{', '.join(SIZES)} (random-initialised) or a folder; default: of --hidden and so on",
    )
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocabulary", type=int, help=f"words; default {vocabulary}, or the named model's")
    parser.set_defaults(usual_vocabulary=vocabulary)
    parser.add_argument("--device", type=_device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--json", type=Path, help="write the results here too")
    return parser


def _model(setting: str) -> str:
    if setting in SIZES or Path(setting).is_dir():
        return setting
    raise argparse.ArgumentTypeError(f"{setting} is neither a folder nor one of {', '.join(SIZES)}")


def _device(setting: str) -> str:
    try:
        return resolve_device(setting)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def settings_of(args: argparse.Namespace) -> dict[str, Any] | None:
    """Return the settings of the random Llama that is asked for; None where ``--model`` is a folder."""
    if args.model is None:
        return llama_settings(args.hidden, args.layers, args.vocabulary or args.usual_vocabulary)
    named = SIZES.get(args.model)
    if named is not None and args.vocabulary is not None:
        return named | {"vocab_size": args.vocabulary}
    return named


def random_llama(settings: dict[str, Any], device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """Return a random-initialised Llama in eval mode, made on its device in its number format."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(LlamaConfig(**settings), dtype=dtype).eval()


def load_model(args: argparse.Namespace) -> Any:
    """Return the model of the arguments ``model`` (or its sizes), ``device`` and ``dtype``, in eval mode."""
    settings, dtype = settings_of(args), getattr(torch, args.dtype)
    if settings is not None:
        return random_llama(settings, args.device, dtype)
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(args.device).eval()


def with_adapter(model: Any, rank: int) -> Any:
    """Put a LoRA adapter on all linear layers, both matrices random, so that neither gradient is 0."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model.eval()


def trainable(model: Any) -> dict[str, torch.nn.Parameter]:
    """Return the parameters that require a gradient, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def random_updates(model: Any) -> dict[str, AdamUpdate]:
    """Return Adam updates from made-up states of the right shapes."""
    return {
        name: AdamUpdate.of(
            AdamState(
                torch.randn_like(p) * 1e-3, torch.rand_like(p) * 1e-6, 100, 1e-4, (0.9, 0.999), 1e-8, 0.0
            ),
            device=p.device,
        )
        for name, p in trainable(model).items()
    }


def spread_lengths(count: int, longest: int) -> np.ndarray:
    """Return lengths spread like those of instruction data (log-normal), in tokens. [count]"""
    drawn = np.exp(np.random.default_rng(0).normal(np.log(longest / 4), 0.7, count))
    return np.clip(drawn, 4, longest).astype(int)


def random_rows(lengths: np.ndarray, vocabulary: int) -> pa.Table:
    """Return prepared rows of random tokens, the last half of each labelled. lengths: in tokens [rows]"""
    rng = np.random.default_rng(1)
    count = len(lengths)
    ids = [rng.integers(0, vocabulary, length).tolist() for length in lengths]
    labels = [[-100] * (len(row) // 2) + row[len(row) // 2 :] for row in ids]
    return pa.table(
        {
            "row": np.arange(count),
            "row_id": [f"{row:032x}" for row in range(count)],
            "source": ["random"] * count,
            "messages": [[]] * count,
            "input_ids": ids,
            "labels": labels,
            "n_tokens": lengths.astype(np.int32),
            "n_response_tokens": np.array([sum(label >= 0 for label in row) for row in labels], np.int32),
            "valid": np.ones(count, bool),
            "reason": pa.nulls(count, pa.string()),
            "note": pa.nulls(count, pa.string()),
        },
        schema=PREPARED,
    )


def batch_of(model: Any, sequences: Sequences, rows: np.ndarray) -> Batch:
    """Return padded rows on the model's device."""
    return batch_on(model, sequences, rows)


def make_batches(model: Any, sequences: Sequences, tokens: int) -> list[Batch]:
    """Return the batches that scoring makes. tokens: padded tokens per batch"""
    with token_losses(model, trained=trainable(model).values()) as losses:
        groups = length_batches(sequences.lengths, sequences.n_labels(), tokens, losses.max_labels)
    return [batch_of(model, sequences, rows) for rows in groups]
