"""The losses feature beside a plain batched forward of the same rows, in one run.

    python benchmarks/losses.py --model FOLDER --rows 2000 --json losses.json

Without ``--model`` a random-initialised Llama is made (--hidden, --layers, --vocabulary) and the rows are
random tokens with a spread of lengths, half of each row labelled. Measured, each the fastest of the
repetitions, in turns so that a busy machine hits all alike:

- ``plain``: what a user would write: batches of --plain-batch rows in the order of the pool, padded to the
  longest, ``model(input_ids, attention_mask)``, cross-entropy over the labels;
- ``plain, same batches``: the same, over the feature's own batches of similar length;
- ``forward only``: the model's forward over the feature's batches, logits of all positions, no loss;
- ``feature``: features/losses.py, including making the result table.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from surroundings import publish, surroundings

from dataflex_pipeline.features.losses import loss_table
from dataflex_pipeline.models.batches import Sequences, length_batches, logits_only_at, padded
from dataflex_pipeline.schemas import PREPARED


def random_llama(hidden: int, layers: int, vocabulary: int) -> Any:
    """Return a random-initialised Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 64),
        num_key_value_heads=max(1, hidden // 64),
    )
    return LlamaForCausalLM(config)


def random_rows(count: int, vocabulary: int, longest: int) -> pa.Table:
    """Return prepared rows: lengths spread like instruction data (log-normal), the last half labelled."""
    rng = np.random.default_rng(0)
    lengths = np.clip(np.exp(rng.normal(np.log(longest / 4), 0.7, count)), 4, longest).astype(int)
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
        },
        schema=PREPARED,
    )


def plain(model: Any, sequences: Sequences, batches: list[np.ndarray]) -> np.ndarray:
    """Return each row's mean loss from full logits, batch by batch. [rows]"""
    result = np.zeros(len(sequences.lengths))
    for rows in batches:
        ids, labels, mask = (torch.from_numpy(array).to(model.device) for array in padded(sequences, rows))
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
        nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none")
        result[rows] = (nll.sum(1) / (labels[:, 1:] != -100).sum(1)).cpu().numpy()
    return result


def forward_only(model: Any, sequences: Sequences, batches: list[np.ndarray]) -> None:
    """Run the model over the batches."""
    for rows in batches:
        ids, _, mask = (torch.from_numpy(array).to(model.device) for array in padded(sequences, rows))
        model(input_ids=ids, attention_mask=mask, use_cache=False)


def fastest(work: dict[str, Callable[[], Any]], repeat: int) -> dict[str, float]:
    """Return the fewest seconds of each piece of work; the pieces take turns."""
    seconds = dict.fromkeys(work, float("inf"))
    for _ in range(repeat):
        for name, function in work.items():
            began = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name] = min(seconds[name], time.perf_counter() - began)
    return seconds


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Measure everything on one model and one set of rows."""
    device = args.device
    dtype = getattr(torch, args.dtype)
    if args.model:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype)
    else:
        model = random_llama(args.hidden, args.layers, args.vocabulary).to(dtype)
    model = model.to(device).eval()
    rows = random_rows(args.rows, int(model.config.vocab_size), args.longest)
    sequences = Sequences.of(rows)
    n_labels = sequences.n_labels()
    own = length_batches(sequences.lengths, n_labels, args.tokens, (1 << 28) // model.config.vocab_size)
    in_order = [
        np.arange(i, min(i + args.plain_batch, args.rows)) for i in range(0, args.rows, args.plain_batch)
    ]
    found: dict[str, np.ndarray] = {}
    with torch.inference_mode():
        with logits_only_at(model) as choose:
            found["feature"] = loss_table(model, choose, rows, args.tokens).column("loss").to_numpy()
        found["plain"] = plain(model, sequences, in_order)

        def feature() -> None:
            with logits_only_at(model) as choose:
                loss_table(model, choose, rows, args.tokens)

        seconds = fastest(
            {
                "plain": lambda: plain(model, sequences, in_order),
                "plain, same batches": lambda: plain(model, sequences, own),
                "forward only": lambda: forward_only(model, sequences, own),
                "feature": feature,
            },
            args.repeat,
        )
    tokens = int(sequences.lengths.sum())
    return {
        "rows": args.rows,
        "tokens": tokens,
        "parameters": sum(p.numel() for p in model.parameters()),
        "largest_difference": float(np.abs(found["feature"] - found["plain"]).max()),
        "results": {
            name: {"seconds": s, "rows_per_second": args.rows / s, "tokens_per_second": tokens / s}
            for name, s in seconds.items()
        },
        "ratios": {
            f"feature / {name}": seconds[name] / seconds["feature"] for name in seconds if name != "feature"
        },
        "threads": torch.get_num_threads(),
        **surroundings(),
    }


def main() -> None:
    """Read the command line and print, or write, the results as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", help="folder of a model; default a random-initialised Llama")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--longest", type=int, default=512, help="tokens of the longest row")
    parser.add_argument("--tokens", type=int, default=16384, help="score_batch_tokens")
    parser.add_argument("--plain-batch", type=int, default=8, help="rows per batch of the plain forward")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the results here too")
    args = parser.parse_args()
    publish(measure(args), args.json)


if __name__ == "__main__":
    main()
