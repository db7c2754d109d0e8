"""`Run`, the front door in Python: the commands' files, nothing printed, mistakes as exceptions."""

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from cli_runs import done

from dataflex_pipeline import Run, UserError
from dataflex_pipeline.errors import ConfigError, RunError, StaleError

REPOSITORY = Path(__file__).resolve().parents[2]
SMALL = {"warmup_step": 2, "update_step": 2, "update_times": 2, "per_device_train_batch_size": 10}
SMALL |= {"gradient_accumulation_steps": 1, "lora_rank": 2, "seed": 3}


def settings(demo):
    files = {"dataset": demo.pool, "eval_dataset": demo.target, "model_name_or_path": demo.model}
    return {key: str(path) for key, path in files.items()} | SMALL


@pytest.fixture(scope="module")
def finished(tiny_demo, tmp_path_factory):
    """A run with one round, made in Python."""
    run = Run(tmp_path_factory.mktemp("runs") / "mine", **settings(tiny_demo))
    run.warmup()
    run.score(1, "loss", loss={"focus": "low"})
    run.select(1, "loss", fraction=0.1)
    run.train(1)
    return run


def test_importing_the_package_imports_nothing_heavy():
    code = "import dataflex_pipeline, sys; print(*sys.modules)"
    loaded = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    assert not {"torch", "numpy", "pyarrow", "pydantic"} & set(loaded)
    import dataflex_pipeline

    assert all(hasattr(dataflex_pipeline, name) for name in dataflex_pipeline.__all__)
    with pytest.raises(AttributeError, match="no_such_name"):
        dataflex_pipeline.no_such_name  # noqa: B018


@pytest.mark.slow
def test_the_same_tables_as_the_commands_byte_for_byte(finished, tiny_demo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = [f"{key}={value}" for key, value in settings(tiny_demo).items()]
    done("warmup", "--run", "mine", *given)
    done("score", "--run", "mine", "--round", "1", "--method", "loss", "loss.focus=low")
    done("select", "--run", "mine", "--round", "1", "--method", "loss", "fraction=0.1")
    done("train-round", "mine", "--round", "1")
    names = sorted(
        path.relative_to(finished.folder)
        for kind in ("*.parquet", "*.safetensors", "optimizer.pt")
        for path in finished.folder.rglob(kind)
    )
    assert len(names) > 10
    for name in names:
        assert (finished.folder / name).read_bytes() == (tmp_path / "runs/mine" / name).read_bytes(), name
    one, other = (
        {line for line in (folder / "run.yaml").read_text().splitlines() if "runs_dir" not in line}
        for folder in (finished.folder, tmp_path / "runs" / "mine")
    )
    assert {line.split(":")[0].strip() for line in one ^ other} <= {"created"}


def test_repeating_keeps_and_other_settings_are_stale(finished, tiny_demo):
    again = Run(finished.folder, **settings(tiny_demo), loss={"focus": "low"})
    again.score(1, "loss")
    assert [outcome.done for outcome in again.outcomes] == [False]
    with pytest.raises(StaleError, match="focus"):
        again.score(1, "loss", loss={"focus": "high"})
    states = {output.label: output.state() for output in Run.open(finished.folder).outputs()}
    assert {state.name for label, state in states.items() if "round 2" not in label} == {"done"}
    assert {state.name for label, state in states.items() if "round 2" in label} == {"missing"}
    changed = {
        output.label: output.state() for output in Run(finished.folder, loss={"focus": "high"}).outputs()
    }
    assert changed["round 1 scores/loss"].name == "stale"
    assert "low" in str(changed["round 1 scores/loss"])
    assert str(changed["pool"]).startswith("done (200 rows")


def test_a_score_table_as_an_object(finished):
    scores = finished.score(1, "loss")
    table = pq.read_table(scores.path)
    assert scores.to_arrow().equals(table)
    assert list(scores.to_pandas().columns) == table.schema.names
    values = table.column("score").to_numpy()
    best = np.lexsort((np.arange(len(values)), -np.nan_to_num(values, nan=-np.inf)))[:7]
    assert scores.top(7).column("row").to_pylist() == best.tolist()
    assert f"{table.num_rows:,} rows scored" in scores.summary


def test_the_rows_of_a_selection_as_a_file(finished, tmp_path):
    file = finished.export(tmp_path / "selected.jsonl")
    selection = pq.read_table(finished.store.round(1).selection)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["_row_id"] for line in lines] == selection.column("row_id").to_pylist()
    assert [line["_rank"] for line in lines] == list(range(1, 21))  # a tenth of 200
    assert {line["_round"] for line in lines} == {1}
    assert list(tmp_path.iterdir()) == [file]
    assert finished.export(file) == file
    assert not finished.outcomes[0].done
    file.write_text("mine\n")
    with pytest.raises(UserError, match="exists"):
        finished.export(file)
    assert file.read_text() == "mine\n"


def test_mistakes_are_exceptions_and_write_nothing(tiny_demo, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="'lerning_rate'"):
        Run(tmp_path / "a", lerning_rate=1)
    run = Run(tmp_path / "a", **settings(tiny_demo))
    with pytest.raises(RunError, match="There is no run"):
        run.score(1)
    with pytest.raises(RunError, match="There is no run"):
        Run.open(tmp_path / "a")
    with pytest.raises(UserError, match="runs_dir or output_dir"):
        run.warmup(output_dir=str(tmp_path))
    with pytest.raises(RunError, match="update_times is 2"):
        run.round(3)
    assert not (tmp_path / "a").exists()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RunError, match="2 processes"):
        Run(tmp_path / "a")


def test_nothing_is_said_but_to_the_object_that_was_given(tiny_demo, tmp_path, capfd):
    class Heard:
        def __init__(self):
            self.lines = []

        def start(self, what, total, unit, done=0):
            self.lines.append(what)

        def advance(self, n):
            pass

        def finish(self):
            pass

        def say(self, line):
            self.lines.append(line)

    heard = Heard()
    run = Run(tmp_path / "a", progress=heard, **settings(tiny_demo))
    checkpoint = run.round(1)
    assert checkpoint.number == 1
    assert checkpoint.state().name == "done"
    assert "Round 1: loss" in heard.lines
    assert "losses of the pool" in heard.lines
    assert capfd.readouterr() == ("", "")


def test_the_example_script(tiny_demo, tmp_path):
    script = REPOSITORY / "examples" / "pick_rows.py"
    places = (tiny_demo.pool, tiny_demo.target, tiny_demo.model, "runs/mine", "selected.jsonl")
    more = [f"{key}={value}" for key, value in SMALL.items()] + ["less.proj_dim=64"]
    command = [sys.executable, script, *map(str, places)]
    ran = subprocess.run([*command, *more], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")
    kinds = ("scores:", "selection:", "  row ", "pool:", "target:", "round ", "20 rows are in")
    assert [line for line in ran.stdout.splitlines() if not line.startswith(kinds)] == []
    refused = subprocess.run(
        [*command, "no_key=1"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert refused.returncode == 1
    assert "Traceback" not in refused.stderr
    assert "'no_key'" in refused.stderr


def _value_of(source, names):
    """Run a cell; return the value of its last line, where it has one."""
    cell = ast.parse(source)
    last = cell.body.pop() if isinstance(cell.body[-1], ast.Expr) else None
    exec(compile(cell, "cell", "exec"), names)
    return None if last is None else eval(compile(ast.Expression(last.value), "cell", "eval"), names)


def _show(value):
    """Ask a value for what a notebook shows of it."""
    for name in ("_repr_html_", "_repr_mimebundle_"):
        if hasattr(value, name):
            assert getattr(value, name)()


@pytest.mark.slow
def test_the_notebook(tiny_demo, tmp_path, monkeypatch):
    """Its cells, in order, as a kernel runs them; the embedded demo is the small one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dataflex_pipeline.demo.ensure_demo", lambda root, say: tiny_demo)
    monkeypatch.setattr("dataflex_pipeline.demo.find_demo", lambda root: tiny_demo)
    notebook = json.loads((REPOSITORY / "examples" / "run.ipynb").read_text())
    names: dict[str, object] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            _show(_value_of("".join(cell["source"]), names))
    assert (tmp_path / "selected.jsonl").stat().st_size > 0
    assert all(output.state().name == "done" for output in names["run"].outputs())


def test_a_run_shows_what_it_has_and_what_to_do_next(finished, tiny_demo, tmp_path):
    shown = finished._repr_html_()
    for output in finished.outputs():
        assert (f"<bdi>{output.label}</bdi>" in shown) == (output.state().name != "missing")
    assert f"Next: <code>run.round({2 if finished.given.last_round > 1 else 1})</code>" in shown
    assert Run(tmp_path / "new", **settings(tiny_demo))._repr_html_().count("<td") == 0
    assert not (tmp_path / "new").exists()
    losses = finished.plot_losses().to_dict()
    assert "optimizer step" in json.dumps(losses)


def test_settings_of_a_call_that_fails_do_not_stay(finished, tiny_demo):
    run = Run(finished.folder, loss={"focus": "low"})
    written = (finished.folder / "run.yaml").read_text()
    with pytest.raises(StaleError, match="fraction"):
        run.select(1, "loss", fraction=0.5)
    with pytest.raises(ConfigError, match="fractoin"):
        run.select(1, "loss", fractoin=0.1)
    run.score(1, "loss")
    run.select(1, "loss")
    assert [outcome.done for outcome in run.outcomes] == [False, False]  # the selection, and its index
    assert (finished.folder / "run.yaml").read_text() == written


def test_two_objects_on_one_run_keep_each_others_settings(finished, tiny_demo, tmp_path):
    shutil.copytree(finished.folder, tmp_path / "mine")
    one, other = Run(tmp_path / "mine"), Run(tmp_path / "mine")
    other.outputs()
    one.score(2, "random", fraction=0.2)
    other.score(2, "loss")
    assert "fraction: 0.2" in (tmp_path / "mine" / "run.yaml").read_text()


@pytest.mark.parametrize("name", ["null", "~x", "123", "[a]", "a #b", "'q'", "ü ö"])
def test_a_folder_of_any_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in (f"{name}/run", name):
        if name != "~x":
            assert Run(folder).folder == Path(folder)
    assert Run(Path("~") / "there").folder == Path("~").expanduser() / "there"


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (lambda run: run.score("1"), "'1'"),
        (lambda run: run.train(1.5), "1.5"),
        (lambda run: run.round(True), "True"),
        (lambda run: run.select(1, seed={1, 2}), "a set"),
        (lambda run: run.score(1, loss="low"), "mapping"),
        (lambda run: run.export("gone/o.jsonl"), "no folder gone"),
        (lambda run: run.export("o.csv"), "JSON lines"),
        (lambda run: run.export("o.jsonl", what="model"), "options of a folder"),
        (lambda run: run.export("out", what="modle"), "modle"),
    ],
)
def test_slips_are_said_in_words(finished, call, why, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as raised:
        call(finished)
    assert why in " ".join((raised.value.what, raised.value.why, raised.value.fix))
    assert list(tmp_path.iterdir()) == []


def test_numbers_of_numpy_and_lists_of_data_sets_are_settings(tiny_demo, tmp_path):
    given = {"dataset": ["a.jsonl", "b.jsonl"], "model_name_or_path": str(tiny_demo.model)}
    run = Run(tmp_path / "a", seed=np.int64(3), learning_rate=np.float64(1e-3), **given)
    assert (run.config.seed, run.config.learning_rate, run.config.dataset) == (3, 1e-3, "a.jsonl,b.jsonl")
    assert repr(run) == f"Run('{tmp_path / 'a'}')"
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="is a file"):
        Run(tmp_path / "file")


def test_a_folder_of_an_export_is_that_of_one_call(finished):
    first = finished.export(finished.folder.parent / "one", what="data")
    second = finished.export(what="data")
    assert (first.name, second) == ("one", finished.folder / "export")
    assert finished.outcomes[0].found == "the rows selected for round 1"


def test_one_amount_takes_the_place_of_another(tmp_path):
    run = Run(tmp_path / "run", dataset=str(tmp_path / "rows.jsonl"), fraction=0.1)
    amounts = lambda: (run.given.fraction, run.given.num_samples, run.given.token_budget)  # noqa: E731
    with run._call({"num_samples": 5}):
        assert amounts() == (None, 5, None)
    with run._call({"token_budget": 9}):
        assert amounts() == (None, None, 9)
    with pytest.raises(ConfigError, match="Set together"), run._call({"num_samples": 5, "fraction": 0.5}):
        pass
    with run._call({"token_budget": None}):
        assert amounts() == (None, None, None)
