"""The benefit of selection: methods side by side on the demo, same steps, several seeds, random as baseline.

    python benchmarks/selection.py --methods random loss delta_loss less --seeds 1 2 3 --json selection.json

Each run is `dataflex round N` of the quickstart with another method and seed (runs in --runs, resumed when
there). Reported after the last round, per method the mean and the range over the seeds: the target's loss
(nats per token), exact match of greedy answers on held-out rows of the target skill, and the share of that
skill among the selected rows (its share of the pool is what random picks).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from surroundings import publish, surroundings

from dataflex_pipeline.demo import Demo, ensure_demo
from dataflex_pipeline.demo.corpus import Row
from dataflex_pipeline.demo.make import exact_match


def run(method: str, seed: int, last: int, runs: Path, settings: list[str]) -> Path:
    """Run one method with one seed up to round ``last``; return the run folder."""
    name = f"{method}-seed{seed}"
    command = [
        sys.executable,
        "-m",
        "dataflex_pipeline",
        "round",
        str(last),
        "--run",
        name,
        "--method",
        method,
    ]
    subprocess.run([*command, f"runs_dir={runs}", f"seed={seed}", *settings], check=True, stdout=sys.stderr)
    return runs / name


def share_of_skill(folder: Path, last: int, skill: str) -> float:
    """Return the share of the target skill among the rows selected in rounds 1..last."""
    pool = pq.read_table(folder / "pool", columns=["row", "original_skill"], partitioning=None)
    skills = pool.column("original_skill").to_pylist()
    rows = [
        row
        for number in range(1, last + 1)
        for row in pq.read_table(folder / f"round-{number:02d}" / "index.parquet", partitioning=None)[
            "row"
        ].to_pylist()
    ]
    return sum(skills[row] == skill for row in rows) / len(rows)


def held_out_match(demo: Demo, checkpoint: Path) -> float:
    """Return the share of held-out rows that the model of a checkpoint answers exactly."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = AutoModelForCausalLM.from_pretrained(demo.model)
    model = PeftModel.from_pretrained(base, checkpoint).eval()
    tokenizer = AutoTokenizer.from_pretrained(demo.model)
    rows = [Row(**json.loads(line)) for line in demo.test.read_text(encoding="utf-8").splitlines()]
    return exact_match(model, tokenizer, rows)


def measure(demo: Demo, folder: Path, last: int) -> dict[str, float]:
    """Return the figures of one run."""
    checkpoint = folder / f"round-{last:02d}" / "checkpoint"
    marker = json.loads((checkpoint / "COMPLETE.json").read_text())
    return {
        "target_loss": marker["result"]["metrics"]["eval_loss"],
        "exact_match": held_out_match(demo, checkpoint),
        "share_of_target_skill": share_of_skill(folder, last, demo.target_skill),
    }


def spread(values: list[float]) -> dict[str, float]:
    """Return mean, smallest and largest."""
    return {"mean": sum(values) / len(values), "min": min(values), "max": max(values)}


def main() -> None:
    """Read the command line, run what is missing, and print the results as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["random", "loss", "delta_loss", "less"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--json", type=Path, help="write the results here too")
    parser.add_argument("settings", nargs="*", help="key=value, for every run")
    args = parser.parse_args()
    demo = ensure_demo(args.runs, lambda text: print(text, file=sys.stderr))
    results: dict[str, Any] = {}
    for method in args.methods:
        found = []
        for seed in args.seeds:
            folder = run(method, seed, args.rounds, args.runs, args.settings)
            found.append(measure(demo, folder, args.rounds))
        results[method] = {name: spread([each[name] for each in found]) for name in found[0]}
    publish({"rounds": args.rounds, "seeds": args.seeds, "results": results, **surroundings()}, args.json)


if __name__ == "__main__":
    main()
