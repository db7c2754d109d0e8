"""The built package: what is in the wheel, and that it runs beside folders that carry our names.

The wheel is built from the sdist, and that from a copy of the checkout without its tests. It is installed
into a fresh environment that sees the libraries of this one, but not this checkout.
"""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sys
import tarfile
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from cli_runs import data

REPOSITORY = Path(__file__).resolve().parents[2]
BUILT_FROM = ("dataflex_pipeline", "stages", "configs", "pyproject.toml", "README.md", "LICENSE")
BUILD = "from setuptools import build_meta; build_meta.build_{kind}({out!r})"
OWN = ("stages", "configs", "tests")
"""Folders that a user may have where the command is started; these are installed as no top-level package."""


def run(folder: Path, *command: object) -> str:
    """Run a command that has to succeed, without this checkout on its path; return what it printed."""
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    ran = subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        env=variables | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def build(kind: str, source: Path, out: Path) -> Path:
    """Build an sdist or a wheel with the setuptools that is installed; no index is asked."""
    out.mkdir()
    run(source, sys.executable, "-c", BUILD.format(kind=kind, out=str(out)))
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """The source distribution, unpacked."""
    folder = tmp_path_factory.mktemp("built")
    source = folder / "checkout"
    source.mkdir()
    for name in BUILT_FROM:
        path = REPOSITORY / name
        copy = shutil.copytree if path.is_dir() else shutil.copy2
        copy(path, source / name)
    with tarfile.open(build("sdist", source, folder / "sdist")) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    return unpacked


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    return build("wheel", sdist, tmp_path_factory.mktemp("wheel") / "out")


@dataclass(frozen=True)
class Installed:
    """An environment with the wheel, and a folder in which hostile packages carry our names.

    Attributes:
        bin: of the environment.
        folder: where commands are started.
    """

    bin: Path
    folder: Path

    def dataflex(self, *arguments: object) -> str:
        """Run the installed script."""
        return run(self.folder, self.bin / "dataflex", *arguments)

    def module(self, *arguments: object) -> str:
        """Run the package as a module; the folder is then the first on Python's path."""
        return run(self.folder, self.bin / "python", "-m", "dataflex_pipeline", *arguments)

    def launched(self, *arguments: object) -> str:
        """Run the package as a module on two processes."""
        own = ("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--nproc_per_node", 2)
        torchrun = (self.bin / "python", "-m", "torch.distributed.run", *own)
        return run(self.folder, *torchrun, "-m", "--", "dataflex_pipeline", *arguments)


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder / "env", with_pip=False)
    python = folder / "env" / "bin" / "python"
    run(
        folder,
        *(sys.executable, "-m", "pip", "--quiet", "--python", python, "install"),
        *("--no-index", "--no-deps", "--disable-pip-version-check", wheel),
    )
    libraries = Path(run(folder, python, "-c", "import site; print(site.getsitepackages()[0])").strip())
    # A path alone: .pth files in that folder, an editable install's among them, are not read through it.
    (libraries / "libraries.pth").write_text("\n".join(site.getsitepackages()) + "\n", encoding="utf-8")
    hostile = folder / "hostile"
    for name in OWN:
        (hostile / name).mkdir(parents=True)
        (hostile / name / "__init__.py").write_text(f"raise RuntimeError('{name} of the user')\n")
    return Installed(python.parent, hostile)


def names(wheel: Path) -> set[str]:
    return {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}


def test_the_wheel_holds_one_top_level_package(wheel):
    assert {name.split("/")[0] for name in names(wheel)} == {"dataflex_pipeline"}


def test_the_wheel_holds_every_file_of_the_package(wheel):
    inside = {"dataflex_pipeline": "dataflex_pipeline"} | {
        name: f"dataflex_pipeline/{name}" for name in ("stages", "configs")
    }
    expected = {
        f"{there}/{path.relative_to(REPOSITORY / here).as_posix()}"
        for here, there in inside.items()
        for path in (REPOSITORY / here).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert len(expected) > 200
    assert names(wheel) == expected


def test_the_code_that_runs_is_the_installed_one(installed):
    code = (
        "import dataflex_pipeline.stages as s, dataflex_pipeline.configs as c; print(s.__path__, c.__path__)"
    )
    printed = run(installed.folder, installed.bin / "python", "-c", code)
    assert str(installed.bin.parent) in printed
    assert str(REPOSITORY) not in printed


def test_a_users_own_folders_do_not_stand_in_the_way(installed):
    listed = installed.dataflex("methods")
    assert "delta_loss" in listed
    assert installed.module("methods") == listed
    installed.module("init", "mine.yaml")
    assert (installed.folder / "mine.yaml").read_text(encoding="utf-8").count("\n") > 50


def test_a_launch_starts_our_code_and_not_the_users(installed):
    assert "delta_loss" in installed.launched("methods")


@pytest.mark.slow
def test_an_installed_package_trains_and_scores(installed, tiny_demo):
    settings = (*data(tiny_demo), "warmup_step=1", "per_device_train_batch_size=2", "lora_rank=4")
    installed.launched("warmup", "--run", "launched", "template=chatml", *settings)
    installed.module("score", "--run", "launched", "--round", 1, "--method", "loss")
    assert (installed.folder / "runs/launched/round-01/scores/loss.parquet").is_file()
    installed.dataflex("report", "launched")
    assert (installed.folder / "runs/launched/report.html").is_file()
    installed.dataflex("doctor", "--config", "runs/launched/run.yaml")
