"""The command line: exit codes, help, what is up to date, and the commands besides the rounds."""

import json
import math
import os
import re
import resource
import shlex
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from cli_runs import copied, data, dataflex, done, finished, refused, small, snapshot
from dataflex_pipeline.stages import cli
from dataflex_pipeline.stages.options import EXAMPLES
from typer.main import get_command

from dataflex_pipeline.config.load import load_config

COMMANDS = ("warmup", "score", "select", "train-round", "round", "methods", "init", "status")
ON = ("--run", "base", "runs_dir=runs")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def in_a_new_interpreter(code: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


# ---------------------------------------------------------------- help and exit codes


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command):
    ran = dataflex(command, "--help")
    assert ran.code == 0
    assert f"dataflex {command}" in ran.out
    assert "Example" in ran.out


def test_the_examples_of_the_help_are_commands():
    epilogs = {name: command.epilog or "" for name, command in get_command(cli.app).commands.items()}
    assert set(epilogs) > set(COMMANDS)
    for command, epilog in epilogs.items():
        for example in epilog.removeprefix(EXAMPLES).split("\n\n"):
            words = shlex.split(example)
            assert words[:2] == ["dataflex", command]
            assert dataflex(*words[1:], "--help").code == 0


def test_help_names_every_command_and_exit_codes_are_as_said():
    assert all(command in dataflex("--help").out for command in COMMANDS)
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", done("--version"))
    assert dataflex("scor").code == 2
    assert dataflex("round", "--nonsense").code == 2


def test_an_interrupt_ends_with_130_and_says_how_to_go_on(here, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("dataflex_pipeline.reports.methods.describe_methods", interrupted)
    ran = dataflex("methods")
    assert ran.code == 130
    assert ran.err == "interrupted; the same command goes on from here\n"


def test_a_failure_of_ours_is_not_hidden(monkeypatch):
    def broken(*_):
        raise ZeroDivisionError("a fault in the program")

    monkeypatch.setattr("dataflex_pipeline.reports.methods.describe_methods", broken)
    with pytest.raises(ZeroDivisionError):
        dataflex("methods")


def test_a_full_disk_is_told_as_one(monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", "runs/x/part-00000.parquet")

    monkeypatch.setattr("dataflex_pipeline.reports.methods.describe_methods", full)
    ran = dataflex("methods")
    assert ran.code == 1
    assert "The disk is full" in ran.err
    assert "Traceback" not in ran.err


def test_help_is_quick_and_imports_nothing_heavy(tmp_path):
    code = (
        "import sys; from dataflex_pipeline.stages.cli import main; sys.argv = ['dataflex', '--help']\n"
        "try: main()\n"
        "finally: print('LOADED', *sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    spent = [math.inf]
    while len(spent) <= 9 and min(spent) >= 0.5:  # other work on the same core makes it slower, never quicker
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        ran = in_a_new_interpreter(code, cwd=tmp_path)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    assert ran.returncode == 0
    loaded = set(ran.stdout.rpartition("LOADED")[2].split())
    assert not loaded & {"torch", "numpy", "pyarrow", "pydantic", "yaml", "transformers", "datasets", "ijson"}
    assert min(spent) < 0.5  # seconds of the processor: the clock on the wall says how busy the machine is


# ---------------------------------------------------------------- what is there is kept


@pytest.mark.slow
def test_the_second_run_changes_nothing_and_never_loads_torch(here, tiny_demo):
    folder = copied(tiny_demo, here / "runs")
    done("round", 2, *ON)  # run.yaml names the folder of the runs, which is another one for the copy
    before = snapshot(here)
    text = done("round", 2, *ON)
    states = [line.split("\t")[1] for line in text.splitlines() if "\t" in line][1:]
    assert states == ["up to date"] * 12
    assert snapshot(here) == before
    code = (
        "import sys; from dataflex_pipeline.stages.cli import main\n"
        "try: main()\n"
        "finally: print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    ran = in_a_new_interpreter(code, "round", "2", *ON, cwd=here)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[-1] == "False False"
    assert ran.stderr == ""
    assert snapshot(here) == before
    assert folder.name == "base"


def test_round_3_after_round_2_only_adds_round_3(here, tiny_demo):
    copied(tiny_demo, here / "runs")
    done("round", 2, *ON)  # run.yaml names the folder of the runs, which is another one for the copy
    before = snapshot(here)
    text = done("round", 3, *ON)
    after = snapshot(here)
    grow = ("history.jsonl", "sources.json", "/")
    kept = {path: content for path, content in before.items() if not path.endswith(grow)}
    assert {path: after[path] for path in kept} == kept
    added = {path for path in after if path not in before}
    assert all(re.match(r"runs/base/(round-03/|features/losses-pool-)", path) for path in added)
    assert "runs/base/round-03/checkpoint/COMPLETE.json" in added
    assert text.count("up to date") == 12
    assert "go on:" not in text  # that was the horizon


def test_without_a_number_it_goes_to_the_horizon(here, tiny_demo):
    (here / "mine.yaml").write_text("\n".join(pair.replace("=", ": ", 1) for pair in small(tiny_demo)))
    done("round", "--config", "mine.yaml", "--method", "random", "update_times=1")
    folder = here / "runs" / "mine-random"
    assert sorted(path.name for path in folder.glob("round-*")) == ["round-00", "round-01"]
    assert "component_name: random" in (folder / "run.yaml").read_text()


def test_every_method_has_a_run_of_its_own_unless_told(here, tiny_demo):
    copied(tiny_demo, here / "runs", "pool-loss")  # what `dataset=.../pool.jsonl` names a run
    before = snapshot(here / "runs" / "pool-loss")
    done("warmup", *small(tiny_demo), "component_name=random")
    assert snapshot(here / "runs" / "pool-loss") == before
    assert (here / "runs" / "pool-random" / "round-00" / "checkpoint").is_dir()
    assert "up to date" in done("round", 1, *small(tiny_demo))  # found by the same name


def test_several_methods_score_one_round_and_only_the_chosen_one_makes_the_index(here, tiny_demo):
    folder = copied(tiny_demo, here / "runs")
    done("score", "--round", 3, "--method", "random", *ON)
    done("score", "--round", 3, *ON)
    text = done("select", "--round", 3, "--method", "random", *ON)
    assert "train:  dataflex train-round --round 3 --run base" in text
    assert sorted(path.name for path in (folder / "round-03" / "scores").iterdir()) == [
        "loss.parquet",
        "random.parquet",
    ]
    metadata = pq.read_metadata(folder / "round-03" / "index.parquet").metadata
    assert metadata[b"dataflex.method"] == b"random"
    assert "component_name: loss" in (folder / "run.yaml").read_text()
    assert "method: random -> loss" in refused(here, "round", 3, *ON)
    done("train-round", "--round", 3, *ON)
    assert "by random" in done("status", *ON)


def test_the_next_step_that_is_printed_works(here, tiny_demo):
    copied(tiny_demo, here / "runs")
    text = done("score", "--round", 3, "loss.focus=low", *ON)
    for verb in ("select", "train"):
        (command,) = re.findall(rf"^  {verb}:  dataflex (.*)$", text, re.MULTILINE)
        text = done(*command.split())
    assert "go on" not in text


# ---------------------------------------------------------------- other commands


def test_init_writes_a_file_that_runs(here, tiny_demo):
    done("init", "mine.yaml")
    assert load_config(Path("mine.yaml"), []).config == load_config(None, [], {}).config
    assert "exists" in refused(here, "init", "mine.yaml")
    text = (here / "mine.yaml").read_text()
    for pair in small(tiny_demo):
        key, _, value = pair.partition("=")
        text, count = re.subn(rf"^{key}: .*$", f"{key}: {value}", text, flags=re.MULTILINE)
        assert count == 1, key
    (here / "mine.yaml").write_text(text)
    done("round", 1, "--config", "mine.yaml")
    assert (here / "runs" / "mine-loss" / "round-01" / "checkpoint" / "COMPLETE.json").is_file()


def test_run_yaml_replays_the_run(here, tiny_demo):
    folder = copied(tiny_demo, here / "runs")
    done("round", 1, "--config", folder / "run.yaml", "--run", "again", "runs_dir=runs")
    for name in ("round-01/index.parquet", "round-01/checkpoint/adapter_model.safetensors"):
        assert snapshot(here / "runs" / "again")[name][0] == snapshot(folder)[name][0]


def test_run_yaml_stands_for_its_run(here, tiny_demo):
    folder = copied(tiny_demo, here / "runs", name="mine")
    before = snapshot(folder)
    done("status", "--config", folder / "run.yaml")
    done("round", 2, "--config", "runs/mine/run.yaml")
    assert [path.name for path in (here / "runs").iterdir()] == ["mine"]
    assert {name: what for name, what in snapshot(folder).items() if name != "history.jsonl"} == {
        name: what for name, what in before.items() if name != "history.jsonl"
    }
    assert "learning_rate" in refused(folder, "round", 2, "--config", folder / "run.yaml", "learning_rate=1")
    # The place that the command line gives comes first; a file without a run's record names no run.
    other = refused(here, "score", "--config", "runs/mine/run.yaml", "runs_dir=elsewhere")
    assert "There is no run at elsewhere/mine" in other
    assert "at there." in refused(here, "score", "--config", "runs/mine/run.yaml", "output_dir=there")
    (here / "run.yaml").write_text("seed: 1\n")
    assert "There is no run at runs/run-loss" in refused(here, "score", "--config", "run.yaml")


def test_methods_shows_every_parameter_with_its_default(here):
    text = done("methods")
    assert "loss.quantiles\t[0.33, 0.66]\t[0.33, 0.66]\t" in text
    for expected in (
        "random: ",
        "loss: ",
        "delta_loss: ",
        "loss.focus_weight\t5.0\t5.0\t",
        "source: DataFlex",
    ):
        assert expected in text
    assert "delta_loss" not in done("methods", "loss")
    assert "loss.focus\tlow\thigh\t" in done("methods", "loss", "loss.focus=low")
    assert "llama3" in done("methods", "--templates")


def test_the_lock_of_a_refused_command_is_free_again(here, tiny_demo):
    copied(tiny_demo, here / "runs")
    refused(here, "round", 2, *ON, "lora_rank=8")
    assert done("round", 2, *ON).count("up to date") == 12


def test_run_yaml_keeps_no_secret_and_history_tells_what_was_done(tiny_demo):
    folder = finished(tiny_demo)
    assert "api_key" not in (folder / "run.yaml").read_text()
    lines = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in lines] == [
        "prepare target",
        "prepare pool",
        "train",
        *["score", "select", "train"] * 2,
    ]


def test_output_dir_is_the_run_and_gets_the_newest_adapter(here, tiny_demo):
    out = here / "saves" / "mine"
    text = done("round", 1, *small(tiny_demo), f"output_dir={out}")
    assert "dataflex round 2" in text
    (command,) = re.findall(r"go on:  dataflex (.*)$", text, re.MULTILINE)
    top = snapshot(out)
    for name in ("adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "chat_template.jinja"):
        assert top[name][0] == top[f"round-01/checkpoint/{name}"][0]
    before = snapshot(here)
    assert "adapter\tup to date" in done("round", 1, *small(tiny_demo), f"output_dir={out}")
    assert snapshot(here) == before
    done(*command.split())
    top = snapshot(out)
    assert top["adapter_model.safetensors"][0] == top["round-02/checkpoint/adapter_model.safetensors"][0]
    done("warmup", f"output_dir={out}")  # an earlier round does not take its place
    assert snapshot(out)["adapter_model.safetensors"] == top["adapter_model.safetensors"]


def test_the_adapter_at_the_top_loads_with_peft(here, tiny_demo):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    done("warmup", *small(tiny_demo), "output_dir=mine")
    base = AutoModelForCausalLM.from_pretrained(tiny_demo.model)
    assert PeftModel.from_pretrained(base, "mine").peft_config["default"].r == 4


def test_all_weights_are_not_copied_and_it_is_said_where_they_are(here, tiny_demo):
    text = done("warmup", *small(tiny_demo), "finetuning_type=full", "output_dir=mine")
    assert "The weights are in mine/round-00/checkpoint; they are not copied" in text
    assert not list((here / "mine").glob("*.safetensors"))


def test_without_output_dir_there_is_no_second_copy(tiny_demo):
    assert not list(finished(tiny_demo).glob("*.safetensors"))


def test_the_data_settings_of_the_demo_are_real(tiny_demo):
    assert all(Path(pair.partition("=")[2]).exists() for pair in data(tiny_demo))


def test_an_interrupt_while_the_command_is_imported_is_one_line():
    code = (
        "import os, signal, time; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from dataflex_pipeline import start; start.begin()\n"
        "os.kill(os.getpid(), signal.SIGINT); time.sleep(60)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (130, "interrupted; nothing was begun\n")


def test_a_file_never_gets_the_number_of_a_closed_stream(tmp_path):
    code = (
        "from dataflex_pipeline import start; start.begin()\n"
        f"file = open({str(tmp_path / 'x')!r}, 'w'); file.write(str(file.fileno()))"
    )
    closed = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "-", sys.executable, "-c", code]
    assert subprocess.run(closed, check=False).returncode == 0
    assert int((tmp_path / "x").read_text()) > 2


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_AS")
@pytest.mark.parametrize("kib", [60_000, 90_000, 120_000])
def test_too_little_address_space_is_one_error_within_seconds(kib):
    """numpy's BLAS would try for ever to get its buffers there."""
    limited = ["sh", "-c", f'ulimit -v {kib}; exec "$@"', "-", sys.executable, "-m", "dataflex_pipeline"]
    ran = subprocess.run([*limited, "methods"], capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 1
    assert ran.stderr.startswith("error: There is not enough memory to start.\n")
    assert ran.stderr.count("\n") == 3


@pytest.mark.parametrize(
    "error",
    [OSError(12, "Cannot allocate memory"), ImportError("x.so: failed to map segment from shared object")],
)
def test_a_library_that_finds_no_memory_is_told_like_a_memory_error(error):
    from dataflex_pipeline.host_memory import memory_error

    wrapped = ImportError("numpy says something else")
    wrapped.__cause__ = error
    assert memory_error(wrapped) is not None
    assert memory_error(ImportError("no module")) is None
    assert memory_error(OSError(2, "no file")) is None


def test_no_memory_even_for_the_own_messages(monkeypatch, capfd):
    from dataflex_pipeline import __main__, start

    def full():
        raise MemoryError

    monkeypatch.setattr(start, "begin", lambda: None)
    monkeypatch.setattr("dataflex_pipeline.stages.cli.main", full)
    monkeypatch.setattr("os._exit", sys.exit)
    with pytest.raises(SystemExit) as ended:
        __main__.main()
    assert ended.value.code == 1
    assert capfd.readouterr().err.startswith("error: There is not enough memory to start.\n")
