"""Per-sample gradients, exact and projected, beside plain training passes over the same rows, in one run.

    python benchmarks/gradients.py --rows 64 --json gradients.json
    python benchmarks/gradients.py --model FOLDER --rank 16
    python benchmarks/gradients.py --model 7b --device cuda --dtype bfloat16 --rank 128

Without ``--model`` a random-initialised Llama is made (--hidden, --layers, --vocabulary); the rows are random
tokens with a spread of lengths, the last half of each labelled. ``--rank 0`` trains all weights instead of a
LoRA adapter. Measured:

- ``plain``: forward and backward of the batches, logits of all positions, parameter gradients thrown away;
- ``plain, labelled logits``: the same with the capture's own loss, logits only where there are labels;
- ``exact``: per-sample gradients, Adam-preconditioned, their products with the directions of --groups target
  groups, norms beside: what less and nice do by default;
- ``target``: the directions themselves, from the same rows as a target: whole gradients, lengths, sums;
- ``capture``: per-sample gradients, Adam-preconditioned, projected by countsketch, norms beside;
- ``policy``: policy gradients, the rows taken as answers, four of each target row: projected and summed;
- ``one by one``: the usual recipe on --subset rows: batch size 1, all gradients concatenated, Adam, dense
  projection generated block by block.

All but the last take turns, repetition by repetition, over the same batches (--tokens padded tokens each, the
best of those given); each is its fastest repetition, in seconds of this process's CPU time on a CPU (other
programs do not count) and of wall time on a GPU. Opening a model, where a few tokens are tried, is once per
table and is measured by itself. Peak memory is what the process (or the GPU) held at most
beyond the model, measured in a pass of its own.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
import torch
from made_up import (
    Batch,
    batch_of,
    load_model,
    make_batches,
    parser_of,
    random_rows,
    random_updates,
    spread_lengths,
    trainable,
    with_adapter,
)
from measuring import fastest, peak_mib, seconds_of
from surroundings import publish, surroundings
from torch.nn.functional import cross_entropy

from dataflex_pipeline.gradients.adam import AdamUpdate
from dataflex_pipeline.gradients.capture import GradientCapture
from dataflex_pipeline.gradients.directions import DirectionSums, RowGradients, add_rows, rows_in_flight
from dataflex_pipeline.gradients.influence import Influences, influence_batch
from dataflex_pipeline.gradients.policy import WeightedAnswers, summed_gradients
from dataflex_pipeline.gradients.projection import make_projection
from dataflex_pipeline.gradients.stream import ProjectedGradients, projected_batch
from dataflex_pipeline.models.batches import Sequences

SAMPLES = 4
"""Answers per target row."""


def plain(model: Any, batches: list[Batch]) -> None:
    """Run forward and backward of each batch, as training does."""
    for ids, labels, mask in batches:
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
        nll = cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none")
        (nll.sum(1) / (labels[:, 1:] != -100).sum(1)).sum().backward()
        model.zero_grad()


def plain_labelled(model: Any, batches: list[Batch]) -> None:
    """Do the same with logits only where there are labels."""
    from dataflex_pipeline.models.batches import logits_only_at

    with logits_only_at(model) as choose:
        for ids, labels, mask in batches:
            wanted = torch.zeros_like(mask, dtype=torch.bool)
            wanted[:, :-1] = labels[:, 1:] != -100
            choose(wanted)
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[0].float()
            nll = cross_entropy(logits, labels[:, 1:][wanted[:, :-1]], reduction="none")
            weight = 1.0 / wanted.sum(1)
            (nll * weight[wanted.nonzero()[:, 0]]).sum().backward()
            model.zero_grad()


def one_by_one(model: Any, rows: list[Batch], updates: dict[str, AdamUpdate], dim: int) -> None:
    """Run the usual recipe: one row, all gradients end to end, dense projection of the whole."""
    projection = make_projection("rademacher", dim, 0)
    parameters = trainable(model)
    for ids, labels, mask in rows:
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[0, :-1].float()
        cross_entropy(logits, labels[0, 1:]).backward()
        flat = torch.cat([updates[n].apply_(p.grad.float()[None]).flatten() for n, p in parameters.items()])
        into = torch.zeros(1, dim, device=flat.device)
        projection.add("all", flat[None], into)
        model.zero_grad()


def exact(model: Any, batches: list[Batch], updates: dict[str, AdamUpdate], groups: int) -> None:
    """Take the inner products of the rows' updates with random directions."""
    stream = torch.Generator().manual_seed(0)
    directions = {
        name: torch.randn(groups, p.numel(), generator=stream).to(p.device)
        for name, p in trainable(model).items()
    }
    consumer = Influences([directions], updates)
    with GradientCapture(model, consumer, print, verify=False) as capture:
        for batch in batches:
            influence_batch(capture, consumer, *batch)


def target(model: Any, sequences: Sequences, groups: int, tokens: int) -> None:
    """Add the rows up to the directions of groups."""
    parameters = trainable(model)
    device = next(iter(parameters.values())).device
    numel, count = sum(p.numel() for p in parameters.values()), len(sequences.lengths)
    consumer = RowGradients(parameters, rows_in_flight(numel, count), device)
    sums = DirectionSums.empty(parameters, device, [f"{group}" for group in range(groups)])
    rows = WeightedAnswers(sequences, np.arange(count), np.ones(count))
    slots = {row: row % groups for row in range(count)}
    with GradientCapture(model, consumer, print, verify=False) as capture:
        add_rows(model, capture, consumer, rows, slots, sums, tokens)


def best_tokens(model: Any, sequences: Sequences, args: argparse.Namespace) -> int:
    """Return the batch size, in padded tokens, at which a plain pass is fastest."""
    if len(args.tokens) == 1:
        return int(args.tokens[0])
    seconds = {}
    for tokens in args.tokens:
        batches = make_batches(model, sequences, tokens)
        plain(model, batches[-1:])
        seconds[tokens] = seconds_of(lambda batches=batches: plain(model, batches), args.device)
    return min(seconds, key=lambda tokens: seconds[tokens])


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Measure everything on one model and one set of rows."""
    model = load_model(args)
    if args.rank:
        model = with_adapter(model, args.rank)
    lengths = spread_lengths(args.rows, args.longest)
    sequences = Sequences.of(random_rows(lengths, int(model.config.vocab_size)))
    tokens = best_tokens(model, sequences, args)
    batches = make_batches(model, sequences, tokens)
    updates = random_updates(model)
    consumer = ProjectedGradients(make_projection("countsketch", args.dim, 0), updates)
    said: list[str] = []

    def captured() -> None:
        with GradientCapture(model, consumer, said.append, verify=False) as capture:
            for batch in batches:
                projected_batch(capture, consumer, *batch)

    def opened() -> None:
        with GradientCapture(model, consumer, said.append, verify=False):
            pass

    plain_gradients = ProjectedGradients(make_projection("countsketch", args.dim, 0))
    numbers = np.arange(args.rows) // SAMPLES
    answers = WeightedAnswers(sequences, numbers, np.random.default_rng(0).normal(size=args.rows))

    def policy() -> None:
        with GradientCapture(model, plain_gradients, said.append, verify=False) as capture:
            shape = (int(numbers[-1]) + 1, args.dim)
            summed_gradients(model, capture, plain_gradients, answers, shape, tokens)

    work = {
        "plain": lambda: plain(model, batches),
        "plain, labelled logits": lambda: plain_labelled(model, batches),
        "exact": lambda: exact(model, batches, updates, args.groups),
        "target": lambda: target(model, sequences, args.groups, tokens),
        "capture": captured,
        "policy": policy,
        "opening": opened,
    }
    began = time.perf_counter()
    captured()  # makes the buckets
    first_pass = time.perf_counter() - began
    policy()
    seconds = fastest(work, args.repeat, args.device)
    opening = seconds.pop("opening")
    seconds |= {name: seconds[name] - opening for name in ("exact", "target", "capture", "policy")}
    peaks = {name: peak_mib(function, args.device) for name, function in work.items()}
    middle = np.argsort(sequences.lengths)[len(sequences.lengths) // 2 :][: args.subset]
    singles = [batch_of(model, sequences, np.array([row])) for row in middle]
    alone = seconds_of(lambda: one_by_one(model, singles, updates, args.dim), args.device)
    rates = {name: args.rows / s for name, s in seconds.items()} | {"one by one": len(singles) / alone}
    total = int(sequences.lengths.sum())
    return {
        "settings": {k: v for k, v in vars(args).items() if k != "json"},
        "rows": args.rows,
        "tokens": total,
        "tokens_per_batch": tokens,
        "trainable_parameters": sum(p.numel() for p in trainable(model).values()),
        "parameters": sum(p.numel() for p in model.parameters()),
        "first_pass_wall_seconds": first_pass,
        "opening_seconds": opening,
        "rows_per_second": rates,
        "tokens_per_second": {name: total / s for name, s in seconds.items()},
        "peak_mib_beyond_the_model": peaks,
        "ratios": {
            "exact / plain": rates["exact"] / rates["plain"],
            "exact / plain, labelled logits": rates["exact"] / rates["plain, labelled logits"],
            "exact / capture": rates["exact"] / rates["capture"],
            "capture / plain": rates["capture"] / rates["plain"],
            "capture / plain, labelled logits": rates["capture"] / rates["plain, labelled logits"],
            "policy / plain": rates["policy"] / rates["plain"],
            "policy / plain, labelled logits": rates["policy"] / rates["plain, labelled logits"],
            "capture / one by one": rates["capture"] / rates["one by one"],
        },
        "said": said,
        "threads": torch.get_num_threads(),
        **surroundings(),
    }


def main() -> None:
    """Read the command line and print, or write, the results as JSON."""
    parser = parser_of(__doc__, vocabulary=8192)
    parser.add_argument("--rank", type=int, default=16, help="LoRA rank; 0: all weights are trained")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--longest", type=int, default=512, help="tokens of the longest row")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048], help="padded tokens of a batch")
    parser.add_argument("--dim", type=int, default=4096, help="proj_dim")
    parser.add_argument("--groups", type=int, default=1, help="directions of the target")
    parser.add_argument("--subset", type=int, default=1, help="rows of the one-by-one recipe")
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    publish(measure(args), args.json)


if __name__ == "__main__":
    main()
