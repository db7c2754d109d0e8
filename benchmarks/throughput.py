"""Losses and gradients beside a plain training step at the same batch, for Llamas of 1 and 7 B parameters.

    python benchmarks/throughput.py --model 7b --device cuda --json 7b.json
    python benchmarks/throughput.py --model 1b --device cuda --batch 8 --length 512 --lengths one
    python benchmarks/throughput.py --model 7b --rank 128 --vocabulary 152000
    python benchmarks/throughput.py --model tiny --device cpu      (under a minute, to see that it runs)

The model is random-initialised on the device, in bf16 on a GPU and in fp32 on a CPU, with LoRA on all linear
layers; the rows are random tokens of lengths that are spread like those of instruction data up to --length
(``--lengths one``: all of that length), the last half of each labelled. Measured:

- ``training step``: batches of --batch rows on the device already, in order of length, TRL's fused head and
  loss, backward, AdamW on the adapter; in bf16 under autocast on an adapter in fp32, as a round trains;
- ``losses``: features/losses.py from prepared rows to its table;
- ``gradients``: batching, per-sample gradients, Adam update, countsketch to --dim, results fetched from the
  device; what features/gradients.py runs, without making its table.

Both score with the adapter in --adapter, by default the precision of the model, in batches of --tokens padded
tokens, by default --batch x --length.

They take turns. Each turn is opened anew and warmed up twice on the same --warmup batches (there the
gradients compare one row with autograd, as at the start of a run), then timed over --steps batches, the GPU
synchronised before and after. Each figure is the fastest of --repeat turns: wall time on a GPU, CPU seconds
of this process on a CPU. ``bit_equal_when_repeated``: whether both warm-ups gave the same bits (attention
kernels of a GPU may add in another order each time on the way back). ``peak_gib``, on a GPU only, is what was
allocated at most during a turn, the model of ``model_gib`` included.

If a GPU runs out of memory, take a smaller --batch, or --checkpointing, which recomputes activations in
training and gradients alike. ``rows_per_batch`` says which batches scoring made.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from made_up import (
    Batch,
    batch_of,
    load_model,
    make_batches,
    parser_of,
    random_rows,
    random_updates,
    settings_of,
    spread_lengths,
    trainable,
    with_adapter,
)
from measuring import seconds_of
from surroundings import publish, surroundings

from dataflex_pipeline.accelerators import counts_memory
from dataflex_pipeline.config.fields import Config
from dataflex_pipeline.estimate.machine import begin_peak, peak_bytes
from dataflex_pipeline.features.losses import loss_table
from dataflex_pipeline.gradients.capture import GradientCapture
from dataflex_pipeline.gradients.projection import make_projection
from dataflex_pipeline.gradients.stream import ProjectedGradients, projected_batch
from dataflex_pipeline.gradients.taps import checkpointed
from dataflex_pipeline.models.base import precision
from dataflex_pipeline.models.batches import Sequences, length_batches
from dataflex_pipeline.models.token_losses import token_losses
from dataflex_pipeline.training.positions import longest_first

ROWS_PER_BATCH = {"7b": 4}
"""By size; 8 for the others."""
SETTINGS = (
    *("model", "device", "dtype", "adapter", "batch", "length", "lengths", "tokens", "rank", "dim"),
    *("checkpointing", "warmup", "steps", "repeat"),
)


@dataclass(frozen=True)
class Rows:
    """Rows, as scoring and as training take them.

    Attributes:
        table: prepared. batches: the same rows on the device, --batch of them each.
    """

    table: pa.Table
    batches: list[Batch]

    @classmethod
    def made_up(cls, model: Any, count: int, args: argparse.Namespace) -> Rows:
        """Make so many batches."""
        number = count * args.batch
        spread = args.lengths == "spread"
        lengths = spread_lengths(number, args.length) if spread else np.full(number, args.length)
        table = random_rows(lengths, int(model.config.vocab_size))
        sequences = Sequences.of(table)
        groups = longest_first(lengths, number).reshape(count, args.batch)
        return cls(table, [batch_of(model, sequences, group) for group in groups])


Pass = Callable[[Rows], np.ndarray | None]
"""One pass over rows; scoring returns their losses in nats per token, then projections. [rows, 1 or 1 + K]"""


class Turn(NamedTuple):
    """Seconds over the timed rows, most bytes held, losses of the warm-up [rows], whether repeatable."""

    seconds: float
    peak_bytes: int
    losses: Any
    bit_equal: bool


@contextmanager
def training(model: Any, args: argparse.Namespace) -> Iterator[Pass]:
    """Yield training, a step per batch."""
    from trl.trainer.utils import add_fused_lm_head

    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-5)
    base = model.get_base_model()
    add_fused_lm_head(base, outputs=("log_probs", "entropy", "is_top1"))
    kind, mixed = torch.device(args.device).type, args.dtype == "bfloat16"

    def train(rows: Rows) -> None:
        for ids, labels, mask in rows.batches:
            with torch.autocast(kind, torch.bfloat16, enabled=mixed):
                out = model(
                    input_ids=ids, attention_mask=mask, labels=labels, use_cache=False, fused_lm_head=True
                )
            (-out.log_probs.sum() / out.label_mask.sum()).backward()
            optimizer.step()
            optimizer.zero_grad()

    try:
        with checkpointed(model) if args.checkpointing else nullcontext():
            yield train
    finally:
        base.__dict__.pop("forward", None)


@contextmanager
def adapter_in(model: Any, dtype: torch.dtype) -> Iterator[None]:
    """Keep the adapter in a number format while the context lasts."""
    kept = {name: parameter.data for name, parameter in trainable(model).items()}
    try:
        for parameter in trainable(model).values():
            parameter.data = parameter.data.to(dtype)
        yield
    finally:
        for name, parameter in trainable(model).items():
            parameter.data = kept[name]


@contextmanager
def losses(model: Any, args: argparse.Namespace) -> Iterator[Pass]:
    """Yield the losses feature."""
    with torch.inference_mode(), token_losses(model) as opened:

        def score(rows: Rows) -> np.ndarray:
            table = loss_table(opened, rows.table, args.tokens)
            return table.column("loss").to_numpy()[:, None]

        yield score


@contextmanager
def gradients(model: Any, args: argparse.Namespace, say: Callable[[str], None]) -> Iterator[Pass]:
    """Yield the gradients feature up to its table."""
    projection = make_projection("countsketch", args.dim, 0, device=args.device)
    consumer = ProjectedGradients(projection, random_updates(model))
    with GradientCapture(model, consumer, say, checkpointing=args.checkpointing) as capture:

        def score(rows: Rows) -> np.ndarray:
            found = np.empty((rows.table.num_rows, 1 + args.dim))
            sequences = Sequences.of(rows.table)
            n_labels = sequences.n_labels()
            for group in length_batches(sequences.lengths, n_labels, args.tokens, capture.max_labels):
                batch = batch_of(model, sequences, group)
                results = [result.cpu().numpy() for result in projected_batch(capture, consumer, *batch)]
                if not all(np.isfinite(result).all() for result in results):
                    raise SystemExit("A gradient is not finite: these figures would be of no real pass.")
                found[group] = np.column_stack(results[:2])
            return found

        yield score


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Measure everything on one model and one set of rows."""
    model = with_adapter(load_model(args).requires_grad_(False), args.rank)
    warm, timed = (Rows.made_up(model, count, args) for count in (args.warmup, args.steps))
    said: list[str] = []

    @contextmanager
    def scored(opened: AbstractContextManager[Pass]) -> Iterator[Pass]:
        with adapter_in(model, getattr(torch, args.adapter)), opened as run:
            yield run

    work: dict[str, Callable[[], AbstractContextManager[Pass]]] = {
        "training step": lambda: training(model, args),
        "losses": lambda: scored(losses(model, args)),
        "gradients": lambda: scored(gradients(model, args, said.append)),
    }
    scoring = ("losses", "gradients")
    turns: dict[str, list[Turn]] = {name: [] for name in work}
    for _ in range(args.repeat):
        for name, opened in work.items():
            turns[name].append(one_turn(opened, warm, timed, args.device))
    seconds = {name: min(turn.seconds for turn in each) for name, each in turns.items()}
    last = {name: each[-1].losses for name, each in turns.items()}
    return {
        **described(model, timed, args),
        "results": {name: rates(timed, s) | peak(turns[name], args.device) for name, s in seconds.items()},
        "ratios": {f"{name} / training step": seconds["training step"] / seconds[name] for name in scoring},
        "largest_difference_of_losses": float(np.abs(last["losses"] - last["gradients"]).max()),
        "bit_equal_when_repeated": {name: all(turn.bit_equal for turn in turns[name]) for name in scoring},
        "said": [*args.notices, *sorted(set(said))],
        **surroundings(),
    }


def one_turn(
    opened: Callable[[], AbstractContextManager[Pass]], warm: Rows, timed: Rows, device: str
) -> Turn:
    """Open one kind of pass, warm it up and time it; what it holds on the device is free again afterwards."""
    begin_peak(device)
    with opened() as run:
        found, again = run(warm), run(warm)
        seconds = seconds_of(lambda: run(timed), device)
    losses = None if found is None else found[:, 0]
    return Turn(seconds, peak_bytes(device), losses, np.array_equal(found, again))


def peak(turns: list[Turn], device: str) -> dict[str, float]:
    """Return the most memory of the turns; nothing on a CPU, where only the whole process is known."""
    return {"peak_gib": max(t.peak_bytes for t in turns) / 2**30} if counts_memory(device) else {}


def rates(rows: Rows, seconds: float) -> dict[str, float]:
    """Return the figures of one kind of pass."""
    tokens = int(rows.table.column("n_tokens").to_numpy().sum())
    return {
        "seconds_per_batch": seconds / len(rows.batches),
        "rows_per_second": rows.table.num_rows / seconds,
        "tokens_per_second": tokens / seconds,
    }


def described(model: Any, rows: Rows, args: argparse.Namespace) -> dict[str, Any]:
    """Return what was run: settings, sizes, number formats, rows per batch."""
    adapter = trainable(model).values()
    scoring = make_batches(model, Sequences.of(rows.table), args.tokens)
    return {
        "settings": {name: vars(args)[name] for name in SETTINGS},
        "llama": settings_of(args),
        "model_gib": sum(p.nbytes for p in model.parameters()) / 2**30,
        "parameters": sum(p.numel() for p in model.parameters()),
        "trainable_parameters": sum(p.numel() for p in adapter),
        "dtypes": {"weights": str(model.dtype), "adapter": sorted({str(p.dtype) for p in adapter})},
        "rows_per_batch": {"training": args.batch, "scoring": sorted({len(ids) for ids, _, _ in scoring})},
        "clock": "wall" if args.device != "cpu" else "CPU seconds of this process",
        "threads": torch.get_num_threads(),
    }


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the settings of a command line, by default this process' own, with what follows from them."""
    parser = parser_of(__doc__)
    parser.set_defaults(model="tiny", dtype=None)
    parser.add_argument("--batch", type=int, help="rows per batch; default 4 for 7b, else 8")
    parser.add_argument("--length", type=int, help="most tokens of a row; default 2048 on a GPU, 64 on a CPU")
    parser.add_argument("--lengths", default="spread", choices=["spread", "one"])
    parser.add_argument("--tokens", type=int, help="padded tokens of a scoring batch")
    parser.add_argument("--adapter", choices=["float32", "bfloat16"], help="number format to score with")
    parser.add_argument("--rank", type=int, default=16, help="LoRA rank")
    parser.add_argument("--dim", "--proj-dim", type=int, default=4096, help="dimensions of the projection")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations in the backward")
    parser.add_argument("--warmup", type=int, default=2, help="batches before each timing")
    parser.add_argument("--steps", type=int, help="batches per timing; default 10 on a GPU, 8 on a CPU")
    parser.add_argument("--repeat", type=int, default=3, help="turns")
    args = parser.parse_args(given)
    on_gpu = args.device != "cpu"
    wanted = precision(Config(bf16=True), args.device)
    args.notices = wanted.notices if args.dtype is None else ()
    args.dtype = args.dtype or wanted.dtype
    args.batch = args.batch or ROWS_PER_BATCH.get(args.model, 8)
    args.length = args.length or (2048 if on_gpu else 64)
    args.tokens = args.tokens or args.batch * args.length
    args.adapter = args.adapter or args.dtype
    args.steps = args.steps or (10 if on_gpu else 8)
    return args


def main() -> None:
    """Print, or write, the results as JSON."""
    args = arguments()
    publish(measure(args), args.json)


if __name__ == "__main__":
    main()
