"""Any input: exit 0, or 2 with one error in three parts and nothing changed; no secret gets out.

100 examples in the gate, the same each time; `make fuzz EXAMPLES=2000` tries others and prints the seed to
repeat them with. The fixed ones are defects that were there once.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cli_runs import dataflex, done, snapshot
from hostile_inputs import GOOD, MODEL, SECRET, Trial, trials
from hypothesis import HealthCheck, example, given, settings

EXAMPLES = int(os.environ.get("EXAMPLES", "100"))
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
NICE_KEY = "nice.reward_backend_params.api.api_key"


@pytest.fixture(scope="module")
def place(tiny_demo, tmp_path_factory):
    """A folder with one finished run; a copy of it, to be put back; and the tiny model."""
    folder = tmp_path_factory.mktemp("fuzz")
    here, kept = folder / "here", folder / "kept"
    here.mkdir()
    (here / "good.jsonl").write_bytes(GOOD)
    before = Path.cwd()
    os.chdir(here)
    done(
        "pick",
        "random",
        "dataset=good.jsonl",
        f"model_name_or_path={tiny_demo.model}",
        "fraction=0.5",
        "--run",
        "base",
    )
    (here / "good.jsonl").unlink()
    shutil.copytree(here, kept)
    yield here, kept, tiny_demo.model
    os.chdir(before)


def put_back(here: Path, kept: Path) -> None:
    for path in here.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    shutil.copytree(kept, here, dirs_exist_ok=True)


def prepare(trial: Trial, here: Path) -> None:
    for name, content in trial.files.items():
        (here / name).write_bytes(content)
    for name, (at, byte) in trial.damage.items():
        file = here / "runs" / "base" / name
        if file.exists():
            content = bytearray(file.read_bytes())
            at %= len(content)
            content[at : at + 1 if byte else len(content)] = byte
            file.write_bytes(content)


def check(trial: Trial, code: int, out: str, err: str, before: dict, here: Path) -> None:
    assert code in (0, 2), f"exit code {code}\n{out}{err}"
    assert "Traceback" not in out + err
    assert SECRET not in out + err
    assert not CONTROL.search(out + err)
    after = snapshot(here)
    if code == 2:
        assert after == before, sorted(
            name for name in {*after, *before} if after.get(name) != before.get(name)
        )
        if trial.arguments[0]:
            lines = err.rstrip().splitlines()
            first = next(number for number, line in enumerate(lines) if line.startswith("error: "))
            assert len(lines) - first >= 3
            assert any(line.startswith("-> ") for line in lines[first + 2 :]), err
    made = [name for name in after if after[name] != before.get(name) and not name.endswith("/")]
    own = [name for name, content in trial.files.items() if SECRET.encode() in content]
    if not own:
        assert not [name for name in made if SECRET.encode() in (here / name).read_bytes()]


@pytest.mark.slow
@settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))
@given(trials)
@example(
    Trial(
        ("methods", "--config", "m.yaml"),
        {"m.yaml": b"components_cfg_file: c.yaml\n", "c.yaml": b"../../victim: {name: loss}\n"},
    )
)
@example(Trial(("report", "runs/base", "--output", "runs/base/run.yaml")))
@example(Trial(("status", f"source_quotas={{api_key: {SECRET}, x: [")))
@example(Trial(("status", f"dataset=https://me:{SECRET}@nowhere.invalid/x")))
@example(Trial(("status", f"{NICE_KEY}={SECRET}")))
@example(Trial(("status", "--run", "base", "--\x1b[2J\u202e")))
@example(Trial(("status", "\x1b]0;x\x07=1")))
@example(Trial(("status", "warmup_step=10000000000")))
@example(Trial(("status", "per_device_train_batch_size=1000000000000")))
@example(Trial(("status", "max_samples=" + "9" * 20)))
@example(Trial(("status", "lora_rank=10000000000000")))
@example(Trial(("status", "--run", "a" * 300)))
@example(Trial(("status", "runs_dir=/dev/null")))
@example(Trial(("methods",), environment={"WORLD_SIZE": "x"}))
@example(Trial(("inspect", "base"), damage={"history.jsonl": (3, b"\xff")}))
@example(Trial(("report", "runs/base"), damage={"history.jsonl": (3, b"\xff")}))
@example(Trial(("report", "runs/base"), damage={"history.jsonl": (174, b" ")}))
def test_any_input(place, trial):
    here, kept, model = place
    put_back(here, kept)
    prepare(trial, here)
    before = snapshot(here)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DF_API_KEY", SECRET)
        for name, value in trial.environment.items():
            patch.setenv(name, value)
        arguments = [text.replace(MODEL, str(model)) for text in trial.arguments]
        ran = dataflex(*arguments)
    check(trial, ran.code, ran.out, ran.err, before, here)


@pytest.mark.parametrize(
    ("arguments", "environment"),
    [
        (("inspect", "base", "--find", "say 3"), {"PYTHONIOENCODING": "latin-1"}),
        pytest.param(
            ("status", "--run", b"\xff\xe6\x95\xb0"),
            {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
            marks=pytest.mark.slow,
        ),
        pytest.param(("pick", "random", "dataset=good.jsonl"), {"WORLD_SIZE": "x"}, marks=pytest.mark.slow),
        pytest.param(("methods", "\u6570"), {"PYTHONIOENCODING": "ascii"}, marks=pytest.mark.slow),
    ],
)
def test_in_a_process_of_its_own(place, arguments, environment):
    here, kept, _ = place
    put_back(here, kept)
    prepare(Trial((), {"good.jsonl": GOOD}), here)
    before = snapshot(here)
    command = (sys.executable, "-m", "dataflex_pipeline", *arguments)
    around = {**os.environ, **environment, "DF_API_KEY": SECRET}
    ran = subprocess.run(command, capture_output=True, env=around, check=False)
    out, err = (text.decode("utf-8", "backslashreplace") for text in (ran.stdout, ran.stderr))
    check(Trial(("run",)), ran.returncode, out, err, before, here)
