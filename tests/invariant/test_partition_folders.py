"""Folders named ``key=value`` above a run or its data: no reader takes them for columns of the tables."""

import ast
import hashlib
import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cli_runs import SMALL, STEPS, done

REPOSITORY = Path(__file__).resolve().parents[2]
ODD = "seed=1/score=7/source=other/row=0/n_tokens=9/round=5/row_id=x/weight=2/loss=4/valid=false/messages=m"
"""Folders whose names are those of columns."""
READERS = {"read_table", "ParquetDataset", "dataset", "scan_parquet", "read_parquet"}
"""Functions of pyarrow, pandas and polars that read partitions out of paths unless they are told not to."""
TOLD = {"partitioning", "hive_partitioning"}


def without_times(text):
    text = re.sub(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d(:\d\d)?([+-]\d+)?", "NOW", text)
    text = re.sub(r'("\w*seconds\w*": )[\d.e-]+', "\\1T", text)
    return re.sub(r"[\d.,]+ (s|min|hours?|ms)\b", "T s", text)


def without_seconds(value):
    """Return what a command said as JSON, but for what it took."""
    if isinstance(value, dict):
        return {name: without_seconds(each) for name, each in value.items() if "seconds" not in name}
    return [without_seconds(each) for each in value] if isinstance(value, list) else value


def work(folder, demo):
    """Do everything in a folder; return what each command printed, without the seconds it took."""
    rows = [json.loads(line) for line in demo.pool.read_text().splitlines()]
    (folder / "data").mkdir()
    pq.write_table(pa.Table.from_pylist(rows[:120]), folder / "data" / "pool.parquet")
    target = [json.loads(line) for line in demo.target.read_text().splitlines()]
    pq.write_table(pa.Table.from_pylist(target), folder / "data" / "target.parquet")
    settings = ("dataset=data/pool.parquet", "eval_dataset=data/target.parquet", *STEPS, *SMALL)
    printed = {}

    def run(name, *arguments):
        lines = done(*arguments).splitlines()
        if arguments[0] in ("round", "score", "select", "train-round", "export"):
            lines = [line for line in lines if "\t" in line]  # the summary; progress lines tell speeds
        text = "\n".join(lines)
        if arguments[-1] == "--json":
            text = json.dumps(without_seconds(json.loads(text[text.index("{") :])))
        printed[name] = without_times(text)

    for seed in (42, 43):
        for method in ("loss", "random"):
            where = ("--run", f"{method}-{seed}", f"seed={seed}")
            run(
                f"round {where}",
                "round",
                2,
                "--method",
                method,
                *where,
                *settings,
                f"model_name_or_path={demo.model}",
            )
    mine = ("--run", "loss-42")
    run("again", "round", 2, *mine)
    run("score", "score", "--round", 3, *mine)
    run("select", "select", "--round", 3, *mine)
    run("train", "train-round", "--round", 3, *mine)
    run("status", "status", *mine, "--json")
    run("inspect", "inspect", "runs/loss-42", "--json")
    for table in (
        "pool",
        "round-02/scores/loss.parquet",
        "round-02/probabilities/loss.parquet",
        "round-02/index.parquet",
    ):
        run(f"inspect {table}", "inspect", f"runs/loss-42/{table}", "--json")
    run(
        "sql",
        "inspect",
        "runs/loss-42",
        "--sql",
        "select avg(score), min(round), count(*) from scores",
        "--csv",
    )
    run("columns", "inspect", "runs/loss-42", "--sql", "describe scores_1_loss", "--csv")
    run(
        "compare",
        "compare",
        *(f"runs/{name}" for name in ("loss-42", "loss-43", "random-42", "random-43")),
        "--json",
    )
    run("report", "report", "runs/loss-42", "--output", "page.html")
    printed["page"] = without_times((folder / "page.html").read_text())
    run("export", "export", "loss-42", "--what", "data", "export_dir=out")
    return printed


def tables(folder):
    """Return the digest of every table's bytes."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*.parquet"))
    }


@pytest.mark.slow
def test_a_run_below_such_folders_is_the_run_of_a_plain_folder(tiny_demo, tmp_path, monkeypatch):
    found = {}
    for name in ("plain", ODD):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        monkeypatch.chdir(folder)
        found[name] = (work(folder, tiny_demo), tables(folder))
    (plain, plain_tables), (odd, odd_tables) = found.values()
    assert len(plain_tables) > 40
    assert odd_tables == plain_tables
    assert odd.keys() == plain.keys()
    for command, text in plain.items():
        assert odd[command].replace(str(tmp_path / ODD), "HERE") == text.replace(
            str(tmp_path / "plain"), "HERE"
        ), command
    runs = tmp_path / ODD / "runs" / "loss-42"
    scores = [
        score
        for number in (1, 2, 3)
        for score in pq.read_table(runs / f"round-{number:02d}/scores/loss.parquet", partitioning=None)[
            "score"
        ].to_pylist()
    ]
    average, first, count = odd["sql"].splitlines()[1].split(",")
    assert (float(average), int(first), int(count)) == (pytest.approx(sum(scores) / 360), 1, 360)
    assert "seed" not in odd["columns"]


def python_files():
    for folder in ("dataflex_pipeline", "stages", "benchmarks", "examples"):
        yield from sorted((REPOSITORY / folder).rglob("*.py"))


def untold(path):
    """Yield the lines of a file that read a table and do not say that paths are no columns."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    pieces = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            told = TOLD & {keyword.arg for keyword in node.keywords}
            files = node.func.attr == "load_dataset" and node.args and isinstance(node.args[0], ast.Constant)
            if files or (node.func.attr in READERS and not told):
                yield node.lineno
        if isinstance(node, ast.JoinedStr | ast.Constant) and id(node) not in pieces:
            text = ast.unparse(node)
            told = re.search(r"hive_partitioning ?= ?false", text)
            if re.search(r"(read_parquet|parquet_scan)\(", text) and not told:
                yield node.lineno
            if re.search(r"(from|join) '[^']*(parquet|\{)", text, re.IGNORECASE):
                yield node.lineno


@pytest.mark.parametrize("path", python_files(), ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_every_reader_is_told_that_paths_are_no_columns(path):
    assert list(untold(path)) == []


def test_the_check_finds_what_it_is_for(tmp_path):
    file = tmp_path / "reads.py"
    file.write_text(
        "pq.read_table(path)\n"
        "pq.read_table(path, partitioning=None)\n"
        "pl.scan_parquet(path)\n"
        'con.sql(f"select * from read_parquet([{files}])")\n'
        'con.sql(f"select * from read_parquet([{files}], hive_partitioning = false)")\n'
        "con.sql(f\"select * from '{path}'\")\n"
        "datasets.load_dataset('parquet', data_files=files)\n"
    )
    assert sorted(set(untold(file))) == [1, 3, 4, 6, 7]
