"""The documentation: it builds without a warning, and every command in it runs, page by page, in order.

A page's commands run in one folder, on the data of a reader who has 200 rows and a very small model.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cli_runs import data, done
from crash.launches import run as launch
from docs_pages import REPOSITORY, Item, pages

from dataflex_pipeline.demo import Demo, DemoSettings
from dataflex_pipeline.demo.make import _digest as demo_digest
from dataflex_pipeline.methods import method_class, shipped_methods

FOUND = pages()
GUIDES = REPOSITORY / "tests" / "guides"
LAUNCHED = " -m -- dataflex_pipeline "
PROCESSES = 2  # in place of the numbers of GPUs and machines in the pages

# What is not run, and why. Anything else in a bash block runs, or the test of its page fails.
NOT_RUN = {
    "make test": "it is what is running",
    "make compare 'METHODS=random less' 'SEEDS=1 2 3'": "six runs of the whole demo",
    "dataflex evaluate my-run --task my_task --include-path tasks/": "a task: tests/cli/test_evaluate.py",
    "dataflex round --config examples/train_lora/llama3_lora_sft.yaml eval_dataset=target.json": (
        "a plain file: tests/cli/test_peer_runs.py runs one"
    ),
    "dataflex pick near dataset=my_data.json eval_dataset=target.jsonl fraction=0.1 --to near.jsonl": (
        "an embedding model: tests/cli/test_embeddings_runs.py has one"
    ),
    "dataflex export --config merge.yaml": "a merge file: tests/cli/test_export.py runs those of the guides",
    "dataflex view quickstart-loss": "it ends with Ctrl-C: tests/cli/test_view.py has it",
    "dataflex view quickstart-loss --port 6000": "the same",
    "xdg-open runs/quickstart-loss/report.html": "a browser on somebody's screen",
    "export OMP_NUM_THREADS=8": "a line of the Slurm script; no Slurm here",
    "'first=$(scontrol' show hostnames '$SLURM_JOB_NODELIST' '|' head -n '1)'": "another one",
}
# What a reader puts in the place of a word or value, and why it is put here.
INSTEAD = {
    "Qwen/Qwen2.5-0.5B": "./model",  # a model of the hub: the tests have no network
    "50": "3",  # steps, which a reader chooses by the size of the data
}
# What a reader sets in the file that `dataflex init` wrote: data, model, and how many steps.
EDITED = {
    "model_name_or_path": "./model",
    "dataset": "my_data.json",
    "eval_dataset": "target.jsonl",
    "warmup_step": "2",
    "update_step": "1",
    "update_times": "4",
}
# Configurations that a page takes as there: (its name there, what it holds, what the reader replaces in it).
CONFIGURATIONS = {
    "README.zh-CN.md": ("less_or_loss.yaml", GUIDES / "loss.yaml", ()),
    # ZeRO-3 takes a launch of its own: tests/invariant/test_scale_deepspeed.py runs this file with that line.
    "docs/coming-from-dataflex.md": (
        "examples/train_lora/selectors/less.yaml",
        GUIDES / "less.yaml",
        ("deepspeed",),
    ),
    "docs/scaling.md": ("my-run.yaml", None, ()),
}
TRANSLATED = "README.zh-CN.md"
"""Has the commands of README.md, which are run there, in its order; and those of its own."""
OF_THE_TRANSLATION = ("dataflex round --config less_or_loss.yaml",)
COMPARED = ("random-seed1", "random-seed2", "less-seed1", "less-seed2")
SHORT = (
    "warmup_step=2",
    "update_step=1",
    "update_times=1",
    "per_device_train_batch_size=4",
    "lora_rank=4",
    "eval_strategy=epoch",
)


@pytest.fixture(scope="module")
def begun(one_thread, tiny_demo, tmp_path_factory):
    """The runs folder after the README's `make round`; and the runs that the pages compare."""
    folder = tmp_path_factory.mktemp("begun")
    # Where the demo is looked for; the real one takes a minute to make.
    shutil.copytree(tiny_demo.folder, folder / "runs" / f"demo-{demo_digest(DemoSettings())}")
    with contextlib.chdir(folder):
        first = next(item for item in FOUND["README.md"] if item.text.startswith("make round"))
        done(*as_typed(first)[1:])
        for name in COMPARED:
            method, _, seed = name.partition("-seed")
            done("round", 1, *data(tiny_demo), *SHORT, "--run", name, "--method", method, f"seed={seed}")
    return folder / "runs"


class Reader:
    """Somebody who does what a page says, in a folder with data and a model."""

    def __init__(self, page: str, demo: Demo, begun: Path) -> None:
        rows = [json.loads(line) for line in demo.pool.read_text(encoding="utf-8").splitlines()]
        Path("my_data.json").write_text(json.dumps(rows), encoding="utf-8")
        for name in ("target.jsonl", "what_it_should_get_good_at.jsonl"):
            shutil.copy2(demo.target, name)
        shutil.copytree(demo.model, "model")
        shutil.copytree(begun, "runs")
        if page in CONFIGURATIONS:
            self.configure(*CONFIGURATIONS[page])

    def configure(self, name: str, content: Path | None, dropped: tuple[str, ...]) -> None:
        """Put a configuration there that a page takes as there."""
        path = Path(name)
        if content is None:
            done("init", name)
            edit(path, EDITED)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(content, path)
        replaced = {key: EDITED[key] for key in ("model_name_or_path", "dataset", "eval_dataset")}
        edit(path, {**replaced, **dict.fromkeys(dropped, "null")})

    def follow(self, todo: list[Item]) -> None:
        """Do all of a page. Commands for several processes that follow each other share one launch."""
        waiting: list[tuple[str, ...]] = []
        for item in todo:
            if item.text in NOT_RUN:
                continue
            words = as_typed(item) if item.kind == "command" else []
            if LAUNCHED in shlex.join(words):
                waiting.append(launched(words))
                continue
            self.launch(waiting)
            self.act(item, words)
        self.launch(waiting)

    def launch(self, waiting: list[tuple[str, ...]]) -> None:
        """Run what waits, if anything does, on several processes."""
        if waiting:
            print(launch(Path(), PROCESSES, *waiting))
            waiting.clear()

    def act(self, item: Item, words: list[str]) -> None:
        """Do one thing, with one process."""
        if item.kind == "file":
            Path(item.name).write_text(item.text, encoding="utf-8")
        elif item.kind == "python":
            exec(compile(item.text, "a block of the page", "exec"), {})
        else:
            assert words[0] == "dataflex", f"neither run nor in NOT_RUN: {item.text}"
            print("$", item.text)
            print(done(*words[1:]))
            if words[1] == "init":
                edit(Path(words[2]), EDITED)


def as_typed(item: Item) -> list[str]:
    """Return a command with the reader's own words in it; of make, the command that it runs."""
    words = ["=".join(INSTEAD.get(part, part) for part in word.split("=", 1)) for word in item.words]
    if words[0] != "make":
        return words
    (line,) = made(words).splitlines()  # with the environment there, the one command of the target
    program, *rest = shlex.split(line)
    return [Path(program).name, *rest]


def edit(path: Path, values: dict[str, str]) -> None:
    """Set keys of a YAML file, as with an editor."""
    text = path.read_text(encoding="utf-8")
    for key, value in values.items():
        text, count = re.subn(rf"^{key}: .*$", f"{key}: {value}", text, flags=re.MULTILINE)
        assert count == 1, key
    path.write_text(text, encoding="utf-8")


def made(words: list[str]) -> str:
    """Return the lines that make would run in the environment of these tests."""
    command = ["make", "-n", "-o", "setup", f"VENV={sys.prefix}", *words[1:]]
    # Below a `make test`, make would also say which directory it enters.
    kept = {
        key: value for key, value in os.environ.items() if key not in {"MAKEFLAGS", "MAKELEVEL", "MFLAGS"}
    }
    ran = subprocess.run(command, cwd=REPOSITORY, env=kept, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def launched(words: list[str]) -> tuple[str, ...]:
    """Return the arguments of our command; torchrun's own parser reads those of torchrun."""
    from torch.distributed.run import parse_args

    words = words[1:] if words[0] == "srun" else words
    assert words[0] == "torchrun", words
    parsed = parse_args(words[1:])
    assert (parsed.module, parsed.training_script) == (True, "dataflex_pipeline")
    return tuple(parsed.training_script_args)


@pytest.mark.slow
@pytest.mark.parametrize("page", list(FOUND))
def test_the_commands_of_a_page_work_in_their_order(page, tiny_demo, begun, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    known = FOUND["README.md"] if page == TRANSLATED else []
    Reader(page, tiny_demo, begun).follow([item for item in FOUND[page] if item not in known])


def test_the_translation_has_the_commands_of_the_readme():
    commands = [item.text for item in FOUND["README.md"] if item.kind == "command"]
    translated = [item.text for item in FOUND[TRANSLATED] if item.kind == "command"]
    assert [text for text in translated if text not in OF_THE_TRANSLATION] == commands


def test_what_is_not_run_is_in_the_pages_and_make_knows_it():
    commands = {item.text for held in FOUND.values() for item in held if item.kind == "command"}
    assert set(NOT_RUN) <= commands
    assert made(["make", "test"])


def test_the_pages_build_without_a_warning_and_with_their_tables(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    ran = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")
    pages = [path.read_text(encoding="utf-8") for path in tmp_path.rglob("*.html")]
    assert not any(f"<!-- {kind}" in page for page in pages for kind in ("parameters", "columns", "modules"))
    less = (tmp_path / "methods" / "less" / "index.html").read_text(encoding="utf-8")
    assert all(f"less.{name}" in less for name in method_class("less").Params.model_fields)
    where = (tmp_path / "where" / "index.html").read_text(encoding="utf-8")
    folders = (REPOSITORY / "stages", REPOSITORY / "dataflex_pipeline")
    modules = {path for folder in folders for path in folder.rglob("*.py") if path.name != "__init__.py"}
    assert where.count(".py</code></td>") == len(modules)
    assert "<td></td>" not in where  # every module says what it holds


def test_every_method_has_a_page():
    assert {path.stem for path in (REPOSITORY / "docs" / "methods").glob("*.md")} >= set(shipped_methods())
