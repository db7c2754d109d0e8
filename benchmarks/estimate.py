"""`dataflex estimate` beside what then happened: seconds and bytes per stage, on the embedded demo.

    python benchmarks/estimate.py --methods loss less --rounds 2 --json estimate.json

For each method: the estimate in one process, and right after it `dataflex round N` in another, so that both
see about the same load. Seconds are those of the run's own history, of features and score table together;
the whole is the wall time of the process. The aim is a factor of 1.5.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from surroundings import publish, surroundings

from dataflex_pipeline.demo import ensure_demo

REPOSITORY = Path(__file__).resolve().parents[1]
TABLES = {
    "pool": "prepare pool",
    "target": "prepare target",
    "features": "features",
    "scores": "score",
    "probabilities": "select",
    "index.parquet": "select",
    "checkpoint": "train",
}
"""Names below a run folder, and the stages whose bytes they are."""
PREDICTED = ("prepare pool", "prepare target", "score", "select", "train")


def dataflex(*arguments: str) -> tuple[str, float]:
    """Run a command in a process of its own; return its standard output and the seconds."""
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "dataflex_pipeline", *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    return done.stdout, time.perf_counter() - began


def predicted(stages: Sequence[dict[str, Any]]) -> tuple[dict[str, float], dict[str, float]]:
    """Return predicted seconds by stage and round, and bytes by stage."""
    seconds: dict[str, float] = {}
    sizes: dict[str, float] = {}
    for each in stages:
        feature = each["stage"] not in PREDICTED
        if each["stage"] != "start":
            kind = "features" if feature else each["stage"]
            sizes[kind] = sizes.get(kind, 0.0) + each["disk_bytes"]
        name = "score" if feature and each["round"] else each["stage"]
        label = name if each["round"] is None else f"{name}, round {each['round']}"
        seconds[label] = seconds.get(label, 0.0) + (each["seconds"] or 0.0)
    return seconds, sizes


def actual(run: Path) -> tuple[dict[str, float], dict[str, float]]:
    """Return the seconds that a run noted, and the bytes that it left, by the same names."""
    seconds: dict[str, float] = {}
    for line in (run / "history.jsonl").read_text().splitlines():
        note = json.loads(line)
        if "seconds" in note:
            label = f"{note['stage']}, round {note['round']}" if "round" in note else note["stage"]
            seconds[label] = seconds.get(label, 0.0) + note["seconds"]
    sizes: dict[str, float] = {}
    for path in run.rglob("*"):
        parts = path.relative_to(run).parts
        name = parts[1] if parts[0].startswith("round-") and len(parts) > 1 else parts[0]
        if path.is_file() and name in TABLES:
            sizes[TABLES[name]] = sizes.get(TABLES[name], 0.0) + path.stat().st_size
    return seconds, sizes


def compare(method: str, rounds: int, runs: Path) -> dict[str, Any]:
    """Estimate a run of the demo, make it, and put both side by side."""
    settings = [f"runs_dir={runs}", f"update_times={rounds}", "--method", method, "--run", method]
    told, estimating = dataflex("estimate", *settings, "--json")
    content = json.loads(told)
    _, wall = dataflex("round", str(rounds), *settings)
    seconds, sizes = predicted(content["stages"])
    happened, left = actual(runs / method)
    lines = [
        {"stage": name, "predicted_seconds": seconds[name], "actual_seconds": happened[name]}
        | {"predicted/actual": seconds[name] / happened[name]}
        for name in seconds
        if name in happened
    ]
    whole = content["total"]["seconds"]
    lines.append({"stage": "the whole command", "predicted_seconds": whole, "actual_seconds": wall})
    lines[-1]["predicted/actual"] = whole / wall
    disk = [
        {"stage": name, "predicted_bytes": sizes[name], "actual_bytes": left[name]}
        | {"predicted/actual": sizes[name] / left[name]}
        for name in sizes
        if left.get(name)
    ]
    return {"method": method, "estimating_seconds": estimating, "seconds": lines, "disk": disk}


def main() -> None:
    """Read the command line and print, or write, the results as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["loss", "less"])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the results here too")
    args = parser.parse_args()
    demo = ensure_demo(REPOSITORY / "runs", print)
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(demo.folder, Path(folder) / demo.folder.name)
        found = [compare(method, args.rounds, Path(folder)) for method in args.methods]
    publish({"runs": found, **surroundings()}, args.json)


if __name__ == "__main__":
    main()
