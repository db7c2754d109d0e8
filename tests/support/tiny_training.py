"""A tiny random Llama, a pool and plans over it: what the training tests train."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa

from dataflex_pipeline.api import Silent
from dataflex_pipeline.config.fields import Config
from dataflex_pipeline.schemas import GROUP, INDEX, PREPARED
from dataflex_pipeline.store.parts import PartedTable, PartsWriter
from dataflex_pipeline.training import RoundPlan, train_round

VOCABULARY = 64
GLOBAL_BATCH = 4
STEPS = 3


def make_model(folder: Path, seed: int = 0, tied: bool = False) -> Path:
    """Save a two-layer Llama with random weights and a word-level tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return save_tokenizer(folder)


def save_tokenizer(folder: Path) -> Path:
    """Save a word-level tokenizer of `VOCABULARY` words."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="</s>")),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
    )
    tokenizer.save_pretrained(folder)
    return folder


def make_pool(folder: Path, rows: int = 40, seed: int = 1, group: bool = False) -> PartedTable:
    """Write a prepared table of random rows with prompts and responses of different lengths."""
    rng = np.random.default_rng(seed)
    ids, labels = [], []
    for _ in range(rows):
        prompt, response = rng.integers(2, 8), rng.integers(1, 9)
        tokens = rng.integers(3, VOCABULARY, prompt + response).tolist()
        ids.append(tokens)
        labels.append([-100] * int(prompt) + tokens[prompt:])
    columns = {
        "row": np.arange(rows),
        "row_id": [f"{seed}-{i:04d}" for i in range(rows)],
        "source": ["test"] * rows,
        "messages": [[{"role": "user", "content": "?"}]] * rows,
        "input_ids": ids,
        "labels": labels,
        "n_tokens": [len(x) for x in ids],
        "n_response_tokens": [sum(t != -100 for t in x) for x in labels],
        "valid": [True] * rows,
        "reason": [None] * rows,
        "note": [None] * rows,
    }
    schema = PREPARED.append(GROUP) if group else PREPARED
    if group:
        columns["group"] = ["g"] * rows
    writer = PartsWriter(folder, schema, {"kind": "test", "seed": seed})
    table = pa.table({name: pa.array(columns[name], schema.field(name).type) for name in schema.names})
    half = rows // 2
    writer.write(0, table.slice(0, half))
    writer.write(1, table.slice(half))
    return writer.finish(2, {})


def make_index(number: int, steps: int, pool_rows: int, weights: np.ndarray | None = None) -> pa.Table:
    """Return an index of random rows for a round."""
    n = steps * GLOBAL_BATCH
    rows = np.random.default_rng(100 + number).integers(0, pool_rows, n)
    return pa.table(
        {
            "position": np.arange(n),
            "row": rows,
            "row_id": [f"1-{i:04d}" for i in rows],
            "weight": np.ones(n, np.float32) if weights is None else weights.astype(np.float32),
            "probability": np.full(n, 1 / pool_rows),
            "score": pa.nulls(n, pa.float64()),
        },
        schema=INDEX,
    )


def make_config(model: Path, **settings: object) -> Config:
    """Return a configuration for the tiny model on a CPU."""
    defaults: dict[str, object] = {
        "model_name_or_path": str(model),
        "device": "cpu",
        "lora_rank": 4,
        "learning_rate": 5e-3,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "warmup_step": STEPS,
        "update_step": STEPS,
        "update_times": 3,
        "logging_steps": 2,
        "cutoff_len": 32,
    }
    return Config(**(defaults | settings))


def make_plan(
    run: Path,
    number: int,
    config: Config,
    pool: PartedTable,
    index: pa.Table | None = None,
    steps: int = STEPS,
) -> RoundPlan:
    """Return the plan of a round of ``steps`` steps in the run folder."""
    folder = run / f"round-{number:02d}"
    return RoundPlan(
        round=number,
        first_step=number * steps,
        last_step=(number + 1) * steps,
        horizon=config.horizon,
        global_batch=GLOBAL_BATCH,
        index=make_index(number, steps, pool.n_rows) if index is None else index,
        previous=None if number == 0 else run / f"round-{number - 1:02d}" / "checkpoint",
        work=folder / "training",
        checkpoint=folder / "checkpoint",
        ingredients={"round": number, "learning_rate": config.learning_rate},
    )


class Listener(Silent):
    """Keeps what was said."""

    def __init__(self):
        self.lines: list[str] = []

    def say(self, line):
        self.lines.append(line)


def make_world(root: Path):
    """A model, a pool and a target."""
    model = make_model(root / "model")
    return model, make_pool(root / "pool"), make_pool(root / "target", rows=13, seed=2, group=True)


def train(run, numbers, config, pool, target=None, progress=None, **plan):
    """Train some rounds and return the last result."""
    result = None
    for number in numbers:
        result = train_round(
            config, make_plan(run, number, config, pool, **plan), pool, target, progress or Silent()
        )
    return result


def states(checkpoint: Path):
    """Everything that the next step depends on, as comparable values."""
    import torch
    from safetensors.torch import load_file
    from transformers.trainer_pt_utils import safe_globals

    weights = {}
    for path in sorted(checkpoint.glob("*model*.safetensors")):
        weights |= load_file(path)
    with safe_globals():
        rng = torch.load(checkpoint / "rng_state.pth", weights_only=True)
    return {
        "weights": weights,
        "optimizer": torch.load(checkpoint / "optimizer.pt", weights_only=True),
        "scheduler": torch.load(checkpoint / "scheduler.pt", weights_only=True),
        "rng": rng,
    }


def assert_same(a, b, where="state"):
    """Compare nested values bit for bit."""
    import torch

    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for number, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{number}]")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, np.ndarray):
        assert np.array_equal(a, b), where
    else:
        assert a == b, where


def joined_index(pool: PartedTable, rounds: int):
    """The indices of several rounds as one round's."""
    tables = [make_index(number, STEPS, pool.n_rows) for number in range(rounds)]
    whole = pa.concat_tables(tables)
    return whole.set_column(0, whole.schema.field(0), pa.array(np.arange(len(whole))))


def log_of(run: Path, number: int):
    return [
        json.loads(x) for x in (run / f"round-{number:02d}" / "training_log.jsonl").read_text().splitlines()
    ]
