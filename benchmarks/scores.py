"""The features of rds and ifd beside plain forward passes of the same rows, in one run.

    python benchmarks/scores.py --model FOLDER --rows 2000 --json scores.json

Model and rows as for benchmarks/losses.py. Measured, each the fastest of the repetitions, in turns so that a
busy machine hits all alike, in CPU seconds on a CPU and wall time on a GPU:

- ``forward``: the model's forward over batches of similar length, logits of all positions, nothing else;
- ``forward, responses``: the same over the responses by themselves, behind a beginning of eight tokens;
- ``rds``: weighted means of the last hidden states (models/hidden.py);
- ``ifd``: losses of the rows and of their responses alone (features/losses.py, response_losses.py).

Ratios above 1 are faster than the plain passes: rds beside ``forward``, ifd beside both plain passes.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import numpy as np
import torch
from losses import forward_only
from made_up import load_model, parser_of, random_rows, spread_lengths
from measuring import fastest
from surroundings import publish, surroundings

from dataflex_pipeline.features.losses import mean_losses
from dataflex_pipeline.features.responses import mean_losses_alone, responses_alone
from dataflex_pipeline.models.batches import (
    Sequences,
    label_budget,
    length_batches,
)
from dataflex_pipeline.models.hidden import weighted_states
from dataflex_pipeline.models.room import Room
from dataflex_pipeline.models.token_losses import token_losses

BEGINNING = list(range(5, 13))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Measure everything on one model and one set of rows."""
    model = load_model(args)
    rows = random_rows(spread_lengths(args.rows, args.longest), int(model.config.vocab_size))
    whole = Sequences.of(rows)
    alone = responses_alone(whole, BEGINNING).sequences
    batches = {
        name: length_batches(each.lengths, each.n_labels(), args.tokens, label_budget(model))
        for name, each in (("whole", whole), ("alone", alone))
    }
    ids = rows.column("input_ids").to_pylist()

    def ifd() -> None:
        with token_losses(model) as per_token:
            losses = partial(mean_losses, per_token, max_tokens=args.tokens)
            losses(whole)
            mean_losses_alone(whole, BEGINNING, losses)

    with torch.inference_mode():
        seconds = fastest(
            {
                "forward": lambda: forward_only(model, whole, batches["whole"]),
                "forward, responses": lambda: forward_only(model, alone, batches["alone"]),
                "rds": lambda: weighted_states(model, ids, Room(args.tokens)),
                "ifd": ifd,
            },
            args.repeat,
            args.device,
        )
    return {
        "rows": args.rows,
        "tokens": int(whole.lengths.sum()),
        "response_tokens": int(np.sum(whole.n_labels())),
        "parameters": sum(p.numel() for p in model.parameters()),
        "results": {name: {"seconds": s, "rows_per_second": args.rows / s} for name, s in seconds.items()},
        "ratios": {
            "rds / forward": seconds["forward"] / seconds["rds"],
            "ifd / both forwards": (seconds["forward"] + seconds["forward, responses"]) / seconds["ifd"],
            "ifd / two forwards of whole rows": 2 * seconds["forward"] / seconds["ifd"],
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
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    publish(measure(args), args.json)


if __name__ == "__main__":
    main()
