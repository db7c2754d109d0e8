"""The command line: exit codes, help, what is up to date, status, and what is remembered of the sources."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from cli_runs import copied, data, dataflex, done, finished, refused, small, snapshot

import stages
from dataflex_pipeline.config.load import load_config
from stages import cli

COMMANDS = ("warmup", "score", "select", "train-round", "round", "methods", "init", "status")
ON = ("--run", "base", "runs_dir=runs")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def in_a_new_interpreter(code: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(stages.__file__).parents[1])}
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
    for command in COMMANDS:
        text = next(c for c in cli.app.registered_commands if name_of(c) == command).epilog or ""
        words = text.removeprefix(cli.EXAMPLES).split()
        assert words[:2] == ["dataflex", command]
        assert dataflex(*words[1:], "--help").code == 0


def name_of(command) -> str:
    return command.name or command.callback.__name__.rstrip("_").replace("_", "-")


def test_help_names_every_command_and_exit_codes_are_as_said():
    assert all(command in dataflex("--help").out for command in COMMANDS)
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", done("--version"))
    assert dataflex("scor").code == 2
    assert dataflex("round", "--nonsense").code == 2


def test_an_interrupt_ends_with_130_and_says_how_to_go_on(here, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("stages.listing.methods", interrupted)
    ran = dataflex("methods")
    assert ran.code == 130
    assert ran.err == "interrupted; the same command goes on from here\n"


def test_a_failure_of_ours_is_not_hidden(monkeypatch):
    def broken(*_):
        raise ZeroDivisionError("a fault in the program")

    monkeypatch.setattr("stages.listing.methods", broken)
    with pytest.raises(ZeroDivisionError):
        dataflex("methods")


def test_a_full_disk_is_told_as_one(monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", "runs/x/part-00000.parquet")

    monkeypatch.setattr("stages.listing.methods", full)
    ran = dataflex("methods")
    assert ran.code == 1
    assert "The disk is full" in ran.err
    assert "Traceback" not in ran.err


def test_help_is_quick_and_imports_nothing_heavy(tmp_path):
    code = (
        "import sys; from stages.cli import main; sys.argv = ['dataflex', '--help']\n"
        "try: main()\n"
        "finally: print('LOADED', *sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    best = 60.0
    for _ in range(3):
        began = time.monotonic()
        ran = in_a_new_interpreter(code, cwd=tmp_path)
        best = min(best, time.monotonic() - began)
    assert ran.returncode == 0
    loaded = set(ran.stdout.rpartition("LOADED")[2].split())
    assert not loaded & {"torch", "numpy", "pyarrow", "pydantic", "yaml", "transformers", "datasets", "ijson"}
    assert best < 0.5 * slowness(), f"{best:.2f} s"


def slowness() -> float:
    """How much longer an interpreter takes to start than on an idle machine, at least 1."""
    best = 60.0
    for _ in range(3):
        began = time.monotonic()
        subprocess.run([sys.executable, "-c", "import email.message, json, inspect"], check=True)
        best = min(best, time.monotonic() - began)
    return max(1.0, best / 0.1)


# ---------------------------------------------------------------- what is there is kept


def test_the_second_run_changes_nothing_and_never_loads_torch(here, tiny_demo):
    folder = copied(tiny_demo, here / "runs")
    done("round", 2, *ON)  # run.yaml names the folder of the runs, which is another one for the copy
    before = snapshot(here)
    text = done("round", 2, *ON)
    states = [line.split("\t")[1] for line in text.splitlines() if "\t" in line][1:]
    assert states == ["up to date"] * 10
    assert snapshot(here) == before
    code = (
        "import sys; from stages.cli import main\n"
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
    kept = {path: content for path, content in before.items() if not path.endswith(("history.jsonl", "/"))}
    assert {path: after[path] for path in kept} == kept
    added = {path for path in after if path not in before}
    assert all(re.match(r"runs/base/(round-03/|features/losses-pool-)", path) for path in added)
    assert "runs/base/round-03/checkpoint/COMPLETE.json" in added
    assert text.count("up to date") == 10
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


# ---------------------------------------------------------------- status


def states(text: str) -> dict[str, tuple[str, str]]:
    lines = [line.split("\t") for line in text.splitlines() if line.count("\t") == 2]
    return {output: (state, what) for output, state, what in lines[1:]}


def test_status_of_a_run_on_its_way(here, tiny_demo):
    copied(tiny_demo, here / "runs")
    before = snapshot(here)
    text = done("status", *ON)
    assert snapshot(here) == before
    assert "reading" not in text
    found = states(text)
    assert {output for output, (state, _) in found.items() if state == "missing"} == {
        "round 3 scores",
        "round 3 index",
        "round 3 checkpoint",
    }
    assert {state for state, _ in found.values()} == {"done", "missing"}
    assert found["pool"][1] == "200 rows, 200 valid"
    assert found["round 0 index"][1] == "8 positions, 8 different rows, drawn uniformly"
    assert text.endswith("Next:  dataflex round 3 --run base\n")


def test_status_says_what_is_stale_damaged_and_unknown(here, tiny_demo):
    folder = copied(tiny_demo, here / "runs")
    for name in ("pool", "target"):
        shutil.copy2(getattr(tiny_demo, name), here / f"{name}.jsonl")
    mine = (*ON, f"dataset={here / 'pool.jsonl'}", f"eval_dataset={here / 'target.jsonl'}")
    assert states(done("status", *mine))["pool"][0] == "done"  # the same content elsewhere
    assert states(done("status", *mine, "loss.focus_weight=7"))["round 1 scores/loss"] == (
        "stale",
        "params.focus_weight: 5.0 -> 7.0",
    )
    with (here / "pool.jsonl").open("a") as stream:
        stream.write('{"instruction": "a", "output": "b"}\n')
    (here / "target.jsonl").unlink()
    table = folder / "round-02" / "scores" / "loss.parquet"
    table.write_bytes(table.read_bytes()[:100])
    before = snapshot(here)
    found = states(done("status", *mine))
    assert snapshot(here) == before
    assert found["pool"][0] == "stale"
    assert "rows" in found["pool"][1]
    assert found["target"][0] == "unknown"
    assert found["round 2 scores/loss"][0] == "damaged"
    assert found["round 2 index"][0] == "damaged"
    text = done("status", *ON, "learning_rate=0.01")
    assert states(text)["round 0 checkpoint"] == ("stale", "training.learning_rate: 0.002 -> 0.01")
    assert "learning_rate: 0.002 -> 0.01" in text


def test_status_of_a_run_that_was_cut_off(here, tiny_demo):
    folder = copied(tiny_demo, here / "runs")
    (folder / "pool" / "manifest.json").unlink()
    shutil.rmtree(folder / "round-02" / "checkpoint")
    found = states(done("status", *ON))
    assert found["pool"][0] == "unfinished"
    assert found["round 2 checkpoint"][0] == "missing"


# ---------------------------------------------------------------- what is remembered of the sources


@pytest.fixture
def own(here, tiny_demo):
    """A warm-up on copies of the data and the model, so that they can be changed."""
    for name in ("pool", "target"):
        shutil.copy2(getattr(tiny_demo, name), here / f"{name}.jsonl")
    shutil.copytree(tiny_demo.model, here / "model")
    settings = ("dataset=pool.jsonl", "eval_dataset=target.jsonl", "model_name_or_path=./model")
    done("warmup", *small(tiny_demo), *settings, "--run", "own")
    return ("--run", "own")


def test_unchanged_sources_and_weights_are_not_read_again(own, here, monkeypatch):
    def never(*_, **__):
        raise AssertionError("it was read again")

    monkeypatch.setattr("stages.prepare.scan_sources", never)
    monkeypatch.setattr("stages.memo.file_digest", never)
    before = snapshot(here)
    assert done("warmup", *own).count("up to date") == 4
    assert snapshot(here) == before


@pytest.mark.parametrize("same_size_and_time", [False, True])
def test_a_changed_source_is_noticed(own, here, same_size_and_time):
    """Also when size and modification time are those of before, as `cp -p` or `touch -r` leave them."""
    path = here / "pool.jsonl"
    old, lines = path.stat(), path.read_text().splitlines()
    lines[3] = lines[3].replace('"output": "', '"output": "Q', 1)
    if same_size_and_time:
        lines[3] = re.sub(r'("output": "Q.*?).(")', r"\1\2", lines[3], count=1)
    path.write_text("\n".join(lines) + "\n")
    if same_size_and_time:
        assert path.stat().st_size == old.st_size
        os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns))
    assert "sources" in refused(here, "warmup", *own)


def test_a_touched_source_is_read_again_and_found_to_be_the_same(own, here):
    os.utime(here / "pool.jsonl", (1, 1))
    text = done("warmup", *own)
    assert "reading pool" in text
    assert text.count("up to date") == 4
    assert "reading" not in done("warmup", *own)


def test_changed_weights_are_noticed(own, here):
    weights = here / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert "model: " in refused(here, "warmup", *own)


def test_a_changed_chat_template_is_noticed(own, here):
    with (here / "model" / "chat_template.jinja").open("a") as stream:
        stream.write(" ")
    assert "tokenizer: " in refused(here, "warmup", *own)


def test_a_changed_declaration_of_a_source_is_noticed(own, here):
    assert "max_samples: null -> 50" in refused(here, "warmup", *own, "max_samples=50")


def test_without_the_memory_everything_is_read_again(own, here):
    memory = here / "runs" / "own" / "sources.json"
    content = memory.read_bytes()
    memory.unlink()
    assert done("warmup", *own).count("up to date") == 4
    assert memory.read_bytes() == content


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
    assert "llama3" in done("methods", "--templates")


def test_the_lock_of_a_refused_command_is_free_again(here, tiny_demo):
    copied(tiny_demo, here / "runs")
    refused(here, "round", 2, *ON, "lora_rank=8")
    assert done("round", 2, *ON).count("up to date") == 10


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


def test_a_hub_data_set_is_known_by_its_version(monkeypatch):
    from dataflex_pipeline.data.hub import HubName
    from dataflex_pipeline.data.settings import DataSettings
    from dataflex_pipeline.data.sources import Source
    from stages import memo

    settings, source = DataSettings(("a/b",), "data", None, 64, None), Source("b", "a/b", hub=HubName("a/b"))
    keys = []
    for version in ("one", "two", "one"):
        monkeypatch.setattr(memo, "hub_fingerprint", lambda hub, given, version=version: version)
        keys.append(memo.sources_key(settings, (source,)))
    assert keys[0] == keys[2] != keys[1]


# ---------------------------------------------------------------- what it looks like


@pytest.fixture
def terminal(monkeypatch):
    """A terminal of 80 columns; returns what was drawn on it, without colours."""
    from rich.console import Console

    from stages import console

    drawn = Console(file=io.StringIO(), force_terminal=True, width=80, highlight=False, soft_wrap=True)
    monkeypatch.setattr(console, "out", drawn)
    return lambda: re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", drawn.file.getvalue())


def test_the_summary_is_readable_on_80_columns(here, tiny_demo, terminal):
    folder = copied(tiny_demo, here / "runs")
    done("round", 2, *ON)
    lines = [line.rstrip() for line in terminal().splitlines()]
    assert max(map(len, lines)) <= 80
    assert lines[lines.index("Round 2: loss") + 1] == "Summary of runs/base"
    for path in ("round-02/scores/loss.parquet", "round-02/checkpoint"):
        assert any(line.endswith(path) for line in lines)  # whole, on one line
        assert (folder / path).exists()


def test_a_bar_shows_rate_and_time_left_and_ends_with_the_time_it_took(terminal, monkeypatch):
    from stages.progress import BarProgress

    now = iter(range(0, 100000, 2))
    monkeypatch.setattr("time.monotonic", lambda: float(next(now)))
    bar = BarProgress()
    bar.start("computing", 4, "rows", done=1)
    bar.advance(1)
    bar.say("a line between")
    bar.finish()
    text = terminal()
    assert re.search(r"computing .* 2/4 0\.5 rows/s", text)
    assert "a line between" in text


def test_plain_lines_say_how_much_was_there_and_what_is_left(monkeypatch, capsys):
    from stages import progress

    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    plain = progress.PlainProgress()
    plain.start("computing", 100, "rows", done=20)
    now[0] = 10.0
    plain.advance(20)
    plain.advance(20)  # within the ten seconds: nothing is said
    now[0] = 20.0
    plain.finish()
    plain.finish()
    assert capsys.readouterr().out.splitlines() == [
        "  computing (100 rows, 20 already done)",
        "  computing: 40 of 100 rows, 2.0/s, 0:30 left",
        "  computing: 60 of 100 rows in 20.0 s (2.0/s)",
    ]


def test_nothing_is_coloured_outside_a_terminal(tiny_demo, here):
    copied(tiny_demo, here / "runs")
    ran = dataflex("status", *ON, "learning_rate=0.01")
    assert "\x1b" not in ran.out + ran.err
    assert "\x1b" not in dataflex("round", 9, *ON).err


def test_noise_of_the_libraries_is_dropped_and_their_errors_are_not(caplog):
    import logging

    from stages.libraries import quieten

    quieten()
    quieten()
    logger = logging.getLogger("DeepSpeed")
    assert len(logger.filters) == 1
    logger.addHandler(caplog.handler)
    try:
        logger.warning("Setting accelerator to CPU. If you have GPU or other accelerator, ...")
        logger.warning("something that matters")
        logger.error("Setting accelerator to CPU failed")
    finally:
        logger.removeHandler(caplog.handler)
    assert set(caplog.messages) == {"something that matters", "Setting accelerator to CPU failed"}
