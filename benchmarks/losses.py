"""The losses feature beside a plain batched forward of the same rows, in one run.

    python benchmarks/losses.py --model FOLDER --rows 2000 --json losses.json

Without ``--model`` a random-initialised Llama is made (--hidden, --layers, --vocabulary) and the rows are
random tokens with a spread of lengths, half of each row labelled. Measured, each the fastest of the
repetitions, in turns so that a busy machine hits all alike, in CPU seconds on a CPU and wall time on a GPU:

- ``plain``: what a user would write: batches of --plain-batch rows in the order of the pool, padded to the
  longest, ``model(input_ids, attention_mask)``, cross-entropy over the labels;
- ``plain, same batches``: the same, over the feature's own batches of similar length;
- ``forward only``: the model's forward over the feature's batches, logits of all positions, no loss;
- ``feature``: features/losses.py, including making the result table; opening a model, where a few tokens are
  tried, is once per table and is measured by itself.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import numpy as np
import torch
from made_up import batch_of, load_model, parser_of, random_rows, spread_lengths
from measuring import fastest
from surroundings import publish, surroundings

from dataflex_pipeline.features.losses import loss_table
from dataflex_pipeline.models.batches import Sequences, length_batches
from dataflex_pipeline.models.token_losses import token_losses


def plain(model: Any, sequences: Sequences, batches: list[np.ndarray]) -> np.ndarray:
    """Return each row's mean loss from full logits, batch by batch. [rows]"""
    result = np.zeros(len(sequences.lengths))
    for rows in batches:
        ids, labels, mask = batch_of(model, sequences, rows)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
        nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none")
        result[rows] = (nll.sum(1) / (labels[:, 1:] != -100).sum(1)).cpu().numpy()
    return result


def forward_only(model: Any, sequences: Sequences, batches: list[np.ndarray]) -> None:
    """Run the model over the batches."""
    for rows in batches:
        ids, _, mask = batch_of(model, sequences, rows)
        model(input_ids=ids, attention_mask=mask, use_cache=False)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Measure everything on one model and one set of rows."""
    model = load_model(args)
    rows = random_rows(spread_lengths(args.rows, args.longest), int(model.config.vocab_size))
    sequences = Sequences.of(rows)
    own = length_batches(sequences.lengths, sequences.n_labels(), args.tokens, sys.maxsize)
    in_order = [
        np.arange(i, min(i + args.plain_batch, args.rows)) for i in range(0, args.rows, args.plain_batch)
    ]
    found: dict[str, np.ndarray] = {}
    with torch.inference_mode():
        with token_losses(model) as opened:
            found["feature"] = loss_table(opened, rows, args.tokens).column("loss").to_numpy()
        found["plain"] = plain(model, sequences, in_order)

        def feature() -> None:
            with token_losses(model) as opened:
                loss_table(opened, rows, args.tokens)

        def opened() -> None:
            with token_losses(model):
                pass

        seconds = fastest(
            {
                "plain": lambda: plain(model, sequences, in_order),
                "plain, same batches": lambda: plain(model, sequences, own),
                "forward only": lambda: forward_only(model, sequences, own),
                "feature": feature,
                "opening": opened,
            },
            args.repeat,
            args.device,
        )
    opening = seconds.pop("opening")
    seconds["feature"] -= opening
    tokens = int(sequences.lengths.sum())
    return {
        "rows": args.rows,
        "tokens": tokens,
        "parameters": sum(p.numel() for p in model.parameters()),
        "opening_seconds": opening,
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
    parser = parser_of(__doc__)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--longest", type=int, default=512, help="tokens of the longest row")
    parser.add_argument("--tokens", type=int, default=16384, help="score_batch_tokens")
    parser.add_argument("--plain-batch", type=int, default=8, help="rows per batch of the plain forward")
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    publish(measure(args), args.json)


if __name__ == "__main__":
    main()
