"""One part of what gpu.sh measures on a GPU, and the table of measurements beside predictions.

    python benchmarks/gpu.py kernels --folder gpu-results
    python benchmarks/gpu.py table --folder gpu-results

Predictions are for an H200 and a random 7 B Llama (LoRA on all linear layers, rows of 2,048 tokens, bf16).
They were made without a GPU: bytes and FLOPs of every operation counted on meta tensors of the real shapes,
at 4.3 TB/s and 700 (bf16), 350 (TF32) and 45 (fp32) TFLOP/s. A GPU of less memory takes the 1 B shape, for
which only the ratios compare. ``--tiny`` runs every piece on any machine with tiny shapes: that it runs is
all it shows.

kernels     attention with and without a mask; small products in fp32, TF32 and bf16; sketch; Adam's update
memory      MiB per token that gradients hold, in both precisions of the adapter, and checkpointed
recovery    a batch that does not fit, and that the next one still gives the right gradients
ratios      rates of losses and gradients to a training step's, r = 16 and 128, in both precisions
equality    the same batch twice; one batch or two halves; a column of padding or none
loading     a model to the device through the machine's memory, and straight; writing a part
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import throughput
import torch
from made_up import llama_settings, random_llama, random_updates, trainable, with_adapter
from surroundings import surroundings
from torch.nn.functional import scaled_dot_product_attention as attention

from dataflex_pipeline import accelerators
from dataflex_pipeline.gradients.capture import GradientCapture
from dataflex_pipeline.gradients.projection import make_projection
from dataflex_pipeline.gradients.stream import ProjectedGradients, projected_batch
from dataflex_pipeline.models.base import free_memory, placement

Figures = dict[str, float]
MIB, TERA = 1 << 20, 1e12
ROOM_FOR_7B = 60 << 30
"""Bytes of memory from which on the 7 B shape is taken."""
DIM = 4096

PREDICTED: dict[str, str] = {
    "attention, masked / causal, times": "3 to 4",
    "bmm r=128 fp32, TFLOP/s": "45",
    "bmm r=128 TF32, TFLOP/s": "250 or more",
    "bmm r=128 bf16 to fp32, TFLOP/s": "500 or more",
    "sketch sorted, us": "about 80",
    "sketch scattered, us": "about 30",
    "Adam's update, bytes per element at 4.3 TB/s": "68",
    "MiB per token, adapter in fp32": "8.6",
    "MiB per token, adapter in bf16": "5.4",
    "MiB per token, adapter in bf16, checkpointed": "0.5",
    "a batch that does not fit is told": "1",
    "gradients after it, largest relative difference": "0",
    "training step / gradients, r=16 fp32, one length": "1.25",
    "training step / gradients, r=128 fp32, one length": "1.9",
    "training step / gradients, r=16 bf16, one length": "1.07",
    "training step / gradients, r=128 bf16, one length": "1.35",
    "training step / gradients, r=16 fp32, spread": "1.5 masked, 1.25 without masks",
    "training step / gradients, r=128 fp32, spread": "2.15 masked, 1.9 without masks",
    "training step / gradients, r=16 bf16, spread": "1.07 without masks",
    "training step / gradients, r=128 bf16, spread": "1.35 without masks",
    "the same batch twice, largest relative difference": "0",
    "one batch or two halves, largest relative difference": "below 1e-2 in bf16",
    "padding or none, largest relative difference": "below 1e-2 in bf16",
    "loading through the machine's memory, s": "12 to 25 for 7 B",
    "loading straight, s": "4 to 8 for 7 B",
    "writing a part, s": "0.5 to 1",
}
"""Figure -> what was predicted, in words."""


def device() -> str:
    """Return where the figures are taken."""
    return accelerators.with_index(accelerators.kind() or "cpu")


def size(tiny: bool) -> str:
    """Return the shape that fits."""
    if tiny:
        return "tiny"
    return "7b" if torch.accelerator.get_memory_info()[1] >= ROOM_FOR_7B else "1b"


def timed(work: Callable[[], Any], repeat: int = 50) -> float:
    """Return the median seconds of a piece of work, after one call that does not count."""
    seconds = []
    for _ in range(repeat + 1):
        began = time.perf_counter()
        work()
        if accelerators.kind() is not None:
            torch.accelerator.synchronize()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


def kernels(tiny: bool) -> Figures:
    """Measure single operations of a 7 B model's layers at 8 rows of 2,048 tokens."""
    rows, heads, length, head, width = (2, 2, 32, 16, 64) if tiny else (8, 32, 2048, 128, 4096)
    where, repeat = device(), 3 if tiny else 50
    found: Figures = {}
    q, k, v = (
        torch.randn(rows, heads, length, head, device=where, dtype=torch.bfloat16, requires_grad=True)
        for _ in range(3)
    )
    mask = torch.ones(rows, 1, length, length, dtype=torch.bool, device=where).tril()
    causal = timed(lambda: attention(q, k, v, is_causal=True).sum().backward(), repeat)
    masked = timed(lambda: attention(q, k, v, attn_mask=mask).sum().backward(), repeat)
    found["attention, masked / causal, times"] = masked / causal
    for rank in (16, 128):
        found |= _products(rows, rank, length, width, where, repeat)
    numel = 4096 if tiny else 128 * width
    block = torch.randn(rows, numel, device=where)
    into = torch.zeros(rows, DIM, device=where)
    sketch: Any = make_projection("countsketch", DIM, 0)
    sketch.add_sorted("x", block, into)
    found["sketch sorted, us"] = 1e6 * timed(lambda: sketch.add_sorted("x", block, into), repeat)
    bucket, sign = sketch.buckets("y", numel, torch.device(where))
    index = bucket.long().expand(rows, numel)
    found["sketch scattered, us"] = 1e6 * timed(lambda: into.scatter_add_(1, index, block * sign), repeat)
    model = with_adapter(random_llama(llama_settings(64, 1, 64), where), 8)
    name, update = next(iter(random_updates(model).items()))
    gradient = torch.randn(rows, *trainable(model)[name].shape, device=where)
    seconds = timed(lambda: update.apply_(gradient), repeat)
    found["Adam's update, bytes per element at 4.3 TB/s"] = seconds * 4.3 * TERA / gradient.numel()
    return found


def _products(rows: int, rank: int, length: int, width: int, where: str, repeat: int) -> Figures:
    """Measure the product that a row's gradient of lora_B is, in TFLOP/s."""
    left = torch.randn(rows, rank, length, device=where)
    right = torch.randn(rows, length, width, device=where)
    flops = 2 * rows * rank * length * width
    matmul = torch.backends.cuda.matmul
    found = {f"bmm r={rank} fp32, TFLOP/s": flops / timed(lambda: left @ right, repeat) / TERA}
    if not where.startswith("cuda"):
        return found
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    found[f"bmm r={rank} TF32, TFLOP/s"] = flops / timed(lambda: left @ right, repeat) / TERA
    matmul.fp32_precision = before
    halves = left.bfloat16(), right.bfloat16()
    seconds = timed(lambda: torch.bmm(*halves, out_dtype=torch.float32), repeat)
    found[f"bmm r={rank} bf16 to fp32, TFLOP/s"] = flops / seconds / TERA
    return found


def _arguments(tiny: bool, *more: str) -> argparse.Namespace:
    length, batch, dim = ("32", "2", "64") if tiny else ("2048", "4", str(DIM))
    few = ("--warmup", "1", "--steps", "2", "--repeat", "1") if tiny else ("--steps", "3", "--repeat", "2")
    given = ("--model", size(tiny), "--device", device(), "--length", length, "--batch", batch, "--dim", dim)
    return throughput.arguments([*given, *few, *more])


def _model(args: argparse.Namespace, rank: int = 16) -> Any:
    return with_adapter(throughput.load_model(args).requires_grad_(False), rank)


def _gradients(model: Any, batches: list[throughput.Batch], *, checkpointing: bool = False) -> np.ndarray:
    """Return the projected gradients of batches, without the comparison with autograd. [rows, K]"""
    torch.manual_seed(0)  # the same Adam states each time
    consumer = ProjectedGradients(make_projection("countsketch", DIM, 0), random_updates(model))
    found = []
    with GradientCapture(
        model, consumer, lambda line: None, checkpointing=checkpointing, verify=False
    ) as capture:
        for batch in batches:
            found.append(projected_batch(capture, consumer, *batch)[1].float().cpu().numpy())
    return np.concatenate(found)


def memory(tiny: bool) -> Figures:
    """Measure what gradients hold per token, from one and two rows: what every batch holds drops out."""
    args = _arguments(tiny, "--lengths", "one")
    model = _model(args)
    found: Figures = {}
    cases = [("float32", False), ("bfloat16", False), ("bfloat16", True)]
    for adapter, checkpointing in cases if args.dtype == "bfloat16" else [("float32", False)]:
        peaks = []
        with throughput.adapter_in(model, getattr(torch, adapter)):
            for rows in (1, 1, 2):  # the first makes the sketch's tables
                args.batch = rows
                batches = throughput.Rows.made_up(model, 1, args).batches
                free_memory()
                throughput.begin_peak(args.device)
                _gradients(model, batches, checkpointing=checkpointing)
                peaks.append(throughput.peak_bytes(args.device))
        short = {"float32": "fp32", "bfloat16": "bf16"}[adapter]
        name = f"MiB per token, adapter in {short}" + (", checkpointed" if checkpointing else "")
        found[name] = (peaks[2] - peaks[1]) / args.length / MIB
    return found


def recovery(tiny: bool) -> Figures:
    """Let a batch not fit, in the middle of its backward pass, and repeat a smaller one."""
    args = _arguments(tiny, "--lengths", "one")
    model = _model(args)
    args.batch = 1
    small = throughput.Rows.made_up(model, 1, args).batches
    before = _gradients(model, small)
    told = _too_much(model, args)
    free_memory()
    after = _gradients(model, small)
    return {
        "a batch that does not fit is told": float(told),
        "gradients after it, largest relative difference": _difference(after, before),
    }


def _too_much(model: Any, args: argparse.Namespace) -> bool:
    """Run batches of ever more rows until one does not fit; where memory is not counted, pretend it."""
    if not accelerators.counts_memory(args.device):

        def fail(_gradient: torch.Tensor) -> None:
            raise torch.OutOfMemoryError("pretended")

        hook = next(iter(trainable(model).values())).register_hook(fail)
        rows = [2]
    else:
        hook, rows = None, [8 * 2**doubled for doubled in range(6)]
    told = False
    for args.batch in rows:
        ids, labels, _ = throughput.Rows.made_up(model, 1, args).batches[0]
        try:
            model(input_ids=ids, labels=labels, use_cache=False).loss.backward()
        except torch.OutOfMemoryError:
            told = True
            break
    if hook is not None:
        hook.remove()
    model.zero_grad()
    return told


def ratios(tiny: bool) -> Figures:
    """Measure the rates of scoring beside a training step's, as throughput.py does."""
    found: Figures = {}
    for lengths in ("one", "spread"):
        for rank in ("16", "128"):
            for adapter, short in (("float32", "fp32"), ("bfloat16", "bf16")):
                more = ("--lengths", lengths, "--rank", rank, "--adapter", adapter)
                if tiny and adapter == "bfloat16":
                    continue  # on a base in fp32
                results = throughput.measure(_arguments(tiny, *more))["results"]
                rate = {name: each["tokens_per_second"] for name, each in results.items()}
                case = f"r={rank} {short}, {'one length' if lengths == 'one' else 'spread'}"
                for name in ("gradients", "losses"):
                    found[f"training step / {name}, {case}"] = rate["training step"] / rate[name]
                free_memory()
    return found


def equality(tiny: bool) -> Figures:
    """Measure how far batches that should give the same gradients are apart."""
    args = _arguments(tiny, "--lengths", "one")
    args.batch = 4
    model = _model(args)
    with throughput.adapter_in(model, getattr(torch, args.adapter)):
        whole = throughput.Rows.made_up(model, 1, args).batches
        first = _gradients(model, whole)
        again = _gradients(model, whole)
        halves = [tuple(tensor[part] for tensor in whole[0]) for part in (slice(0, 2), slice(2, 4))]
        split = _gradients(model, halves)
        ids, labels, mask = whole[0]
        longer = tuple(
            torch.nn.functional.pad(tensor, (0, 1), value=filled)
            for tensor, filled in ((ids, 0), (labels, -100), (mask, 0))
        )
        padded = _gradients(model, [longer])
    return {
        "the same batch twice, largest relative difference": _difference(again, first),
        "one batch or two halves, largest relative difference": _difference(split, first),
        "padding or none, largest relative difference": _difference(padded, first),
    }


def _difference(found: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest distance of a row from what it should be, as a share of its length."""
    apart = np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)
    return float(apart.max())


def loading(tiny: bool) -> Figures:
    """Measure how long a model takes to the device on two ways, and how long a part takes to the disk."""
    from transformers import AutoModelForCausalLM

    args, where = _arguments(tiny), device()
    dtype = getattr(torch, args.dtype)
    found: Figures = {}
    with tempfile.TemporaryDirectory() as folder:
        random_llama(throughput.settings_of(args), where, dtype).save_pretrained(folder)
        free_memory()
        ways: dict[str, Callable[[], Any]] = {
            "straight": lambda: AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **placement(where)),
            "through the machine's memory": lambda: AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype
            ).to(where),
        }
        for way, load in ways.items():
            found[f"loading {way}, s"] = timed(load, 1)
            free_memory()
        vectors = np.random.default_rng(0).normal(size=(1024, DIM)).astype(np.float16)
        table = pa.table({"gradient": pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), DIM)})
        path = Path(folder) / "part.parquet"
        found["writing a part, s"] = timed(lambda: pq.write_table(table, path, compression="zstd"), 3)
    return found


PARTS: dict[str, Callable[[bool], Figures]] = {
    "kernels": kernels,
    "memory": memory,
    "recovery": recovery,
    "ratios": ratios,
    "equality": equality,
    "loading": loading,
}


def show(folder: Path) -> None:
    """Print predictions beside measurements, and write all of it to gpu.json."""
    parts = {
        part: json.loads(path.read_text()) for part in PARTS if (path := folder / f"{part}.json").is_file()
    }
    figures = {name: value for part in parts.values() for name, value in part["figures"].items()}
    names = [*PREDICTED, *(name for name in figures if name not in PREDICTED)]
    missing = [part for part in PARTS if part not in parts]
    print(
        f"| figure ({', '.join(sorted({part['model'] for part in parts.values()}))}) | predicted | measured |"
    )
    print("|---|---|---|")
    for name in names:
        measured = f"{figures[name]:.3g}" if name in figures else "-"
        print(f"| {name} | {PREDICTED.get(name, '-')} | {measured} |")
    if missing:
        print(f"not finished: {', '.join(missing)}")
    whole = {"figures": figures, "predicted": PREDICTED, "not_finished": missing, **surroundings()}
    (folder / "gpu.json").write_text(json.dumps(whole, indent=2) + "\n")


def main() -> None:
    """Do one part, or show the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=[*PARTS, "table"])
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, on any machine")
    parser.add_argument("--folder", type=Path, default=Path("gpu-results"))
    args = parser.parse_args()
    if args.part == "table":
        show(args.folder)
        return
    if not args.tiny and accelerators.kind() is None:
        raise SystemExit("torch sees no accelerator here; --tiny runs every piece on a CPU.")
    began = time.perf_counter()
    figures = PARTS[args.part](args.tiny)
    found = {"figures": figures, "model": size(args.tiny), "seconds": time.perf_counter() - began}
    (args.folder / f"{args.part}.json").write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
