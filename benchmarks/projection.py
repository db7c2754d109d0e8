"""Noise of a random projection in the scores of less: exact ones beside those of sketches of K dimensions.

    dataflex warmup --run RUN component_name=less
    python benchmarks/projection.py runs/RUN --json projection.json --figure projection-noise.svg

takes the gradients of pool and target at the end of the run's warm-up once, and of each row the exact inner
product with the target's direction as well as its countsketches (--dims, --seeds of each). For each K: the
rank correlation of the scores with the exact ones, and the share of the exact best 1, 5 and 10 % of the rows
that is among the best by the sketch; means over the seeds with the smallest and largest.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from surroundings import publish, surroundings

from dataflex_pipeline import Run
from dataflex_pipeline.api import FeatureInput, Silent
from dataflex_pipeline.features.capturing import load
from dataflex_pipeline.gradients.adam import AdamUpdate
from dataflex_pipeline.gradients.directions import DirectionSums, RowGradients, add_rows, rows_in_flight
from dataflex_pipeline.gradients.influence import Influences
from dataflex_pipeline.gradients.policy import WeightedAnswers
from dataflex_pipeline.gradients.projection import Projection, make_projection
from dataflex_pipeline.models.batches import Sequences, padded
from dataflex_pipeline.models.room import Room
from dataflex_pipeline.store.parts import PartedTable

SHARES = (0.01, 0.05, 0.1)


class Several(Influences):
    """Takes exact inner products, and several projections of the same updates."""

    def __init__(
        self,
        directions: Mapping[str, torch.Tensor],
        updates: Mapping[str, AdamUpdate] | None,
        projections: list[Projection],
    ) -> None:
        super().__init__([directions], updates)
        self.projections = projections
        self.sketches: list[torch.Tensor] = []

    def begin(self, rows: int, device: torch.device | str) -> None:
        """Start a batch of so many rows."""
        super().begin(rows, device)
        self.sketches = [torch.zeros(rows, each.dim, device=device) for each in self.projections]

    def __call__(self, name: str, rows: slice, gradient: torch.Tensor) -> None:
        """Add one parameter's gradients."""
        gradient = gradient.contiguous()
        super().__call__(name, rows, gradient)  # turns them into updates
        for projection, sums in zip(self.projections, self.sketches, strict=True):
            projection.add(name, gradient.view(len(gradient), -1), sums[rows])


def taken(loaded: Any, consumer: Several, sequences: Sequences) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return the exact cosines of rows [rows], and their unit sketches [rows, K] each."""
    count = len(sequences.lengths)
    cosines = np.zeros(count)
    sketches = [np.zeros((count, each.dim)) for each in consumer.projections]
    with loaded.capturing(consumer) as (capture, _):

        def work(batch: np.ndarray) -> None:
            tensors = [torch.from_numpy(array).to(loaded.device) for array in padded(sequences, batch)]
            consumer.begin(len(batch), loaded.device)
            capture.run(*tensors)
            dots, squares = (each.double().cpu().numpy() for each in consumer.result())
            cosines[batch] = dots[:, 0] / np.sqrt(squares)
            for whole, part in zip(sketches, consumer.sketches, strict=True):
                found = part.double().cpu().numpy()
                whole[batch] = found / np.linalg.norm(found, axis=1, keepdims=True)

        Room(4096).each_batch(sequences.lengths, sequences.n_labels(), capture.max_labels, work)
    return cosines, sketches


def direction(loaded: Any, sequences: Sequences) -> dict[str, torch.Tensor]:
    """Return the mean unit gradient of rows. [1, numel] each"""
    count, parameters = len(sequences.lengths), loaded.trainable
    numel = sum(p.numel() for p in parameters.values())
    consumer = RowGradients(parameters, rows_in_flight(numel, count), loaded.device)
    sums = DirectionSums.empty(parameters, loaded.device, ["target"])
    rows = WeightedAnswers(sequences, np.arange(count), np.ones(count))
    with loaded.capturing(consumer) as (capture, room):
        add_rows(loaded.model, capture, consumer, rows, dict.fromkeys(range(count), 0), sums, room)
    return {name: (tensor / count).float() for name, tensor in sums.tensors.items()}


def usable(table: PartedTable) -> Sequences:
    """Return the rows of a split that can be used."""
    rows = table.rows(0, table.n_rows, ["input_ids", "labels", "valid"])
    return Sequences.of(rows.filter(rows.column("valid")).combine_chunks())


def likeness(exact: np.ndarray, found: np.ndarray) -> dict[str, float]:
    """Return rank correlation, and the shares of the exact best rows that are found."""
    from scipy.stats import spearmanr

    best = {"rank_correlation": float(spearmanr(exact, found).statistic)}
    for share in SHARES:
        count = max(1, round(share * len(exact)))
        tops = [set(np.argsort(-scores, kind="stable")[:count].tolist()) for scores in (exact, found)]
        best[f"best_{share:.0%}"] = len(tops[0] & tops[1]) / count
    return best


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Measure all on one run."""
    run = Run.open(args.run)
    checkpoint = Path(args.run) / "round-00" / "checkpoint"
    pool, target = (PartedTable.open(Path(args.run) / split) for split in ("pool", "target"))
    loaded = load(FeatureInput(pool, pool.fingerprint, checkpoint, "measured"), run.config, Silent())
    kinds = [(dim, seed) for dim in args.dims for seed in range(args.seeds)]
    projections = [make_projection("countsketch", dim, seed, device=loaded.device) for dim, seed in kinds]
    towards = direction(loaded, usable(target))
    _, theirs = taken(loaded, Several(towards, None, projections), usable(target))
    exact, ours = taken(
        loaded, Several(towards, loaded.adam_updates("adam", "torch"), projections), usable(pool)
    )
    found: dict[int, list[dict[str, float]]] = {}
    for (dim, _), mine, other in zip(kinds, ours, theirs, strict=True):
        found.setdefault(dim, []).append(likeness(exact, mine @ other.mean(axis=0)))
    table = {
        dim: {
            key: [float(pick([each[key] for each in values])) for pick in (np.mean, np.min, np.max)]
            for key in values[0]
        }
        for dim, values in found.items()
    }
    return {
        "rows": len(exact),
        "target_rows": len(usable(target).lengths),
        "trained_parameters": sum(p.numel() for p in loaded.trainable.values()),
        "seeds": args.seeds,
        "mean, smallest, largest": table,
        **surroundings(),
    }


def draw(results: Mapping[str, Any], figure_file: Path) -> None:
    """Draw how many of the exact best rows are found, against K, as SVG: points are means, bars the range."""
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.add_subplot()
    table = results["mean, smallest, largest"]
    dims = np.array(list(table), dtype=float)
    for number, share in enumerate(SHARES):
        mean, low, high = np.array([table[dim][f"best_{share:.0%}"] for dim in table]).T
        moved = dims * 1.06 ** (number - 1)  # the ranges beside each other
        axes.errorbar(
            moved, mean, [mean - low, high - mean], marker="o", capsize=3, label=f"best {share:.0%}"
        )
    axes.axhline(1.0, color="0.5", linewidth=1)
    axes.annotate("exact", (dims.min(), 1.0), (0, 3), textcoords="offset points", color="0.35")
    axes.set_xscale("log", base=2)
    axes.set_xticks(dims, [f"{int(dim):,}" for dim in dims])
    axes.minorticks_off()
    axes.set_ylim(0.5, 1.06)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}" if value <= 1 else "")
    axes.set_xlabel("K, dimensions that a gradient is projected to")
    axes.set_ylabel("of the exact best rows found")
    axes.legend(loc="lower right", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    with matplotlib.rc_context({"svg.hashsalt": "dataflex"}):
        figure.savefig(figure_file, format="svg", metadata={"Date": None})


def main() -> None:
    """Read the command line and print, or write, the results as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="folder of a run whose warm-up is done")
    parser.add_argument("--dims", type=int, nargs="+", default=[512, 4096, 16384])
    parser.add_argument("--seeds", type=int, default=3, help="projections of each size")
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--figure", type=Path, help="SVG file to draw")
    args = parser.parse_args()
    results = measure(args)
    publish(results, args.json)
    if args.figure:
        draw(results, args.figure)


if __name__ == "__main__":
    main()
