"""Selection on a real model: methods at equal steps on SmolLM2-135M-Instruct and rows that are given.

    python benchmarks/real.py --source short=alpaca_en.json:80:1-12 --source long=alpaca_en.json:320:40-200 \\
        --target short --methods random perplexity less nice --seeds 1 2 3 --json real.json

The pool is planted: so many rows of every source, each a JSON file of instruction data (an array of records),
cut to answers of FEWEST-MOST words where that is given, and to rows of at most --longest tokens. The target
and the held-out rows are taken from the target's source before the pool is, and before anything runs; the
split and its digest are printed. A seed is that of warm-up, draws and answers; the split stays.

Reported of every method: AUC of the target's source by score (0.5 is chance) and its standard error over the
rows, how many of its rows are among the best k (k: how many there are), their share of the selection, and the
held-out loss (nats per token) after as many steps as every other method, with the paired difference to
random. --rank-only trains the warm-up alone. `NAME=METHOD:key=value,key=value` runs a method with settings of
its own. Folders below --work are kept: a second call goes on where the first was stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import yaml
from smollm2 import ensure_model
from surroundings import publish, surroundings

from dataflex_pipeline import Run
from dataflex_pipeline.api import Silent
from dataflex_pipeline.methods import shipped_methods

Record = dict[str, Any]


class Said(Silent):
    """Progress that prints what a run says."""

    def say(self, text: str) -> None:
        """Print a line to the standard error."""
        print(f"    {text}", file=sys.stderr)


@dataclass(frozen=True)
class Source:
    """Rows of one kind: NAME=FILE:ROWS[:FEWEST-MOST].

    Attributes:
        name, file: of the source. rows: how many of it are planted. fewest, most: words of an answer.
    """

    name: str
    file: Path
    rows: int
    fewest: int = 0
    most: int = sys.maxsize

    @classmethod
    def of(cls, text: str) -> Source:
        """Read a source from the command line."""
        name, _, rest = text.partition("=")
        file, rows, *words = rest.split(":")
        low, high = words[0].split("-") if words else (0, sys.maxsize)
        return cls(name, Path(file), int(rows), int(low), int(high))

    def records(self, tokenizer: Any, longest: int) -> list[Record]:
        """Return the records of the file that are short enough, in its order."""
        listed = json.loads(self.file.read_text(encoding="utf-8"))
        kept = [each for each in listed if self.fewest <= len(answer_of(each).split()) <= self.most]
        return [each for each in kept if len(tokenizer(text_of(each))["input_ids"]) <= longest]


def answer_of(record: Record) -> str:
    """Return the last answer of an alpaca or sharegpt record."""
    if "output" in record:
        return str(record["output"])
    turns: list[dict[str, str]] = record.get("conversations") or record["messages"]
    return str(turns[-1].get("value") or turns[-1].get("content"))


def text_of(record: Record) -> str:
    """Return all that a record says, to count its tokens."""
    turns = record.get("conversations") or record.get("messages") or []
    said = [turn.get("value") or turn.get("content") or "" for turn in turns]
    plain = [value for value in record.values() if isinstance(value, str)]
    return "\n".join([*plain, *said])


@dataclass(frozen=True)
class Contender:
    """A method with its settings: METHOD, or NAME=METHOD:key=value,key=value."""

    name: str
    method: str
    settings: dict[str, Any]

    @classmethod
    def of(cls, text: str) -> Contender:
        """Read a contender from the command line."""
        name, _, rest = text.rpartition("=") if ":" not in text else text.partition("=")
        method, _, listed = rest.partition(":")
        if method not in shipped_methods():
            raise argparse.ArgumentTypeError(
                f"{text}: no method is called {method}; settings of all runs stand behind --json FILE"
            )
        pairs = [pair.split("=") for pair in listed.split(",") if pair]
        return cls(name or method, method, {key: yaml.safe_load(value) for key, value in pairs})


def split(args: argparse.Namespace, folder: Path) -> Record:
    """Write pool, target and held-out rows, unless they are there; return what they are made from and of."""
    described = folder / "split.json"
    names = ("target", "target_rows", "held_out", "longest", "split_seed")
    asked = {name: getattr(args, name) for name in names} | {"sources": [str(each) for each in args.source]}
    if described.exists():
        known: Record = json.loads(described.read_text())
        if known["asked"] != asked:
            raise SystemExit(f"{folder} has another split: {known['asked']}. Give another --work.")
        return known
    folder.mkdir(parents=True, exist_ok=True)
    rows = {}
    for name, records in planted(args).items():
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
        rows[name] = {"rows": len(records), "sha256": hashlib.sha256(text.encode()).hexdigest()[:16]}
    made = {"asked": asked, "made": rows}
    described.write_text(json.dumps(made, indent=2))
    return made


def planted(args: argparse.Namespace) -> dict[str, list[Record]]:
    """Return the records of the target, of the held-out rows and of every source, none of them twice."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    found = {}
    for source in args.source:
        records = source.records(tokenizer, args.longest)
        random.Random(f"{args.split_seed} {source.name}").shuffle(records)
        if source.name == args.target:
            found["target"], records = records[: args.target_rows], records[args.target_rows :]
            found["held_out"], records = records[: args.held_out], records[args.held_out :]
        if len(records) < source.rows:
            raise SystemExit(f"{source.name}: {source.rows} rows are asked for, {len(records)} are there.")
        found[source.name] = records[: source.rows]
    return found


def settings_of(args: argparse.Namespace, data: Path, seed: int) -> dict[str, Any]:
    """Return the settings that all runs of a seed share."""
    own = dict(pair.split("=", 1) for pair in args.settings)
    return {
        "model_name_or_path": str(args.model),
        "dataset": ",".join(str(data / f"{source.name}.jsonl") for source in args.source),
        "eval_dataset": str(data / "target.jsonl"),
        "test_dataset": None if args.rank_only else str(data / "held_out.jsonl"),
        "seed": seed,
        "warmup_step": args.warmup,
        "update_step": 0 if args.rank_only else args.steps,
        "update_times": 1,
        "per_device_train_batch_size": args.batch,
        "learning_rate": args.learning_rate,
        "eval_strategy": "no",
        "plot_loss": False,
        "features_dir": str(args.work / f"features-seed{seed}"),
        **{key: yaml.safe_load(value) for key, value in own.items()},
    }


def warmed(args: argparse.Namespace, data: Path, seed: int) -> Path:
    """Return the folder of a run after its warm-up, the beginning of all methods' runs of that seed."""
    folder = args.work / f"warm-seed{seed}"
    Run(folder, progress=Said(), **settings_of(args, data, seed)).warmup()
    return Path(folder)


def area(scores: np.ndarray, wanted: np.ndarray) -> tuple[float, float]:
    """Return the probability that a wanted row scores above another one, and its standard error over rows.

    Ties count half. The error is DeLong et al. (1988): the variances of the rows' own shares, added up.

    Args:
        scores: [N]. wanted: [N] bool
    """
    mine, others = scores[wanted][:, None], scores[~wanted]
    above = (mine > others) + (mine == others) / 2  # [wanted, others]
    parts = (above.mean(axis=axis) for axis in (0, 1))
    return float(above.mean()), float(np.sqrt(sum(part.var(ddof=1) / len(part) for part in parts)))


def held_out_loss(run: Run, number: Any) -> float:
    """Return the mean loss of the held-out rows in nats per response token."""
    return next(figure.value for figure in run.evaluate(number) if figure.metric == "loss")


def measure(args: argparse.Namespace, data: Path, contender: Contender, seed: int) -> dict[str, float]:
    """Return the figures of one method with one seed; finished ones of the same settings are read back."""
    folder = args.work / f"{contender.name}-seed{seed}"
    own = {f"{contender.method}.{key}": value for key, value in contender.settings.items()}
    settings = settings_of(args, data, seed) | {"component_name": contender.method} | own
    done = folder / "real.json"
    known: Record = json.loads(done.read_text()) if done.exists() else {}
    if known.get("settings") == settings:
        figures: dict[str, float] = known["figures"]
        return figures
    begin_with(warmed(args, data, seed), folder)
    began = time.perf_counter()
    run = Run(folder, progress=Said(), **settings)
    scored = run.score(1, contender.method).to_arrow()
    figures = ranked(scored, folder, args.target) | {"seconds_to_score": time.perf_counter() - began}
    if not args.rank_only:
        chosen = run.select(1).to_arrow()["source"].to_pylist()
        run.train(1)
        figures["share_selected"] = sum(Path(each).stem == args.target for each in chosen) / len(chosen)
        figures["held_out_loss"] = held_out_loss(run, 1)
    done.write_text(json.dumps({"settings": settings, "figures": figures}))
    return figures


def begin_with(warm: Path, folder: Path) -> None:
    """Copy the run of a seed after its warm-up, unless the method's run has begun."""
    if not folder.exists():
        copy = folder.with_name(f".{folder.name}")
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(warm, copy)
        copy.rename(folder)


def ranked(scored: Any, folder: Path, target: str) -> dict[str, float]:
    """Return how a method ranks the rows of the target's source."""
    sources = pq.read_table(folder / "pool", columns=["source"], partitioning=None)["source"].to_pylist()
    wanted = np.array([Path(source).stem == target for source in sources])
    scores = np.nan_to_num(scored["score"].to_numpy(zero_copy_only=False).astype(float), nan=-np.inf)
    ties = np.random.default_rng(0).permutation(len(scores))  # by row, the first source would come first
    best = np.lexsort((ties, -scores))[: wanted.sum()]
    auc, error = area(scores, wanted)
    return {"auc": auc, "auc_error": error, "among_best": int(wanted[best].sum()), "best": len(best)}


def table(results: dict[str, dict[int, dict[str, float]]]) -> str:
    """Return the figures as a table, a method a line: means over the seeds, and differences to random."""
    from scipy.stats import ttest_rel

    lines = [
        "| method | AUC | its error | among best | share selected | held-out loss | minus random (p) |",
        "|" + "---|" * 7,
    ]
    base = results.get("random", {})
    for name, by_seed in results.items():
        cells = []
        for figure, form in (
            ("auc", ".2f"),
            ("auc_error", ".2f"),
            ("among_best", ".1f"),
            ("share_selected", ".2f"),
            ("held_out_loss", ".4f"),
        ):
            values = [each[figure] for each in by_seed.values() if figure in each]
            cells.append(f"{np.mean(values):{form}}" if values else "")
        pairs = [
            (by_seed[seed]["held_out_loss"], base[seed]["held_out_loss"])
            for seed in by_seed
            if seed in base and "held_out_loss" in by_seed[seed]
        ]
        if len(pairs) > 1 and name != "random":
            mine, theirs = np.array(pairs).T
            cells.append(f"{(mine - theirs).mean():+.4f} ({ttest_rel(mine, theirs).pvalue:.2g})")
        else:
            cells.append("")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--model", type=Path, default=Path("models/smollm2-135m"), help="made where it is not there"
    )
    parser.add_argument("--source", type=Source.of, action="append", required=True)
    parser.add_argument("--target", required=True, help="name of the source that is selected towards")
    parser.add_argument("--target-rows", type=int, default=32)
    parser.add_argument("--held-out", type=int, default=64)
    parser.add_argument("--longest", type=int, default=192, help="tokens of a row")
    parser.add_argument("--methods", type=Contender.of, nargs="+", default=[Contender.of("random")])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--split-seed", type=int, default=0)
    parser.add_argument("--warmup", type=int, default=4, help="steps")
    parser.add_argument("--steps", type=int, default=20, help="after the selection")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--rank-only", action="store_true")
    parser.add_argument("--work", type=Path, default=Path("runs/real"))
    parser.add_argument("--json", type=Path, help="write the results here too")
    parser.add_argument("settings", nargs="*", help="key=value, for every run")
    return parser.parse_args()


def main() -> None:
    """Make model and split, run what is missing, print the table and the results as JSON."""
    args = arguments()
    ensure_model(args.model)
    data = args.work / "data"
    made = split(args, data)
    print(json.dumps(made), file=sys.stderr)
    results: dict[str, dict[int, dict[str, float]]] = {}
    for seed in args.seeds:
        if not args.rank_only:
            run = Run(warmed(args, data, seed), progress=Said(), **settings_of(args, data, seed))
            results.setdefault("base model", {})[seed] = {"held_out_loss": held_out_loss(run, "base")}
        for contender in args.methods:
            results.setdefault(contender.name, {})[seed] = measure(args, data, contender, seed)
            print(f"{contender.name}, seed {seed}: {results[contender.name][seed]}", file=sys.stderr)
    print(table(results), file=sys.stderr)
    publish({"split": made, "results": results, "arguments": sys.argv[1:], **surroundings()}, args.json)


if __name__ == "__main__":
    main()
