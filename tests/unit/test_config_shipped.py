"""The shipped configurations: they load, they are complete, and an installed package finds them."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dataflex_pipeline.config import checks
from dataflex_pipeline.config.components import known_methods, method_parameters
from dataflex_pipeline.config.fields import Config
from dataflex_pipeline.config.load import load_config
from dataflex_pipeline.config.shipped import shipped_configs
from dataflex_pipeline.methods import build_method, method_class, shipped_methods
from dataflex_pipeline.reports.components_yaml import components_yaml
from dataflex_pipeline.training import arguments

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "configs" / "examples").glob("*.yaml"))
DEEPSPEED = ("ds_z0", "ds_z2", "ds_z2_offload", "ds_z3", "ds_z3_offload")


def test_the_quickstart_has_five_rounds_on_the_demo():
    config = load_config(None, []).config
    assert (config.update_times, config.dataset, config.eval_strategy) == (5, "demo", "epoch")


def test_there_is_an_example_for_every_method():
    assert {path.stem for path in EXAMPLES} == set(known_methods(Config(), None))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_load_without_a_word(path):
    loaded = load_config(path, [])
    assert loaded.config.component_name == path.stem
    assert loaded.notices == ()


def test_components_yaml_names_every_method_with_all_parameters_and_their_defaults():
    assert set(known_methods(Config(), None)) == set(shipped_methods())
    for name in shipped_methods():
        entry = method_parameters(Config(), name, None)
        kind = method_class(entry.kind)
        assert set(entry.params) == set(kind.Params.model_fields), name
        assert build_method(name, kind, entry.params, entry.where).params == kind.Params(), name


def test_components_yaml_is_what_make_configs_writes():
    written = (shipped_configs() / "components.yaml").read_text(encoding="utf-8")
    assert written == components_yaml(), "run `make configs`"


def test_the_words_that_training_knows_are_those_that_the_configuration_takes():
    assert arguments.TRACKERS is checks.TRACKERS
    assert set(checks.TRACKERS) == {"tensorboard", "wandb", "swanlab", "mlflow", "trackio"}


@pytest.mark.parametrize("name", DEEPSPEED)
def test_deepspeed_files(name):
    content = json.loads((shipped_configs() / "deepspeed" / f"{name}.json").read_text())
    zero = content["zero_optimization"]
    assert zero["stage"] == int(name[4])
    assert ("offload_optimizer" in zero) == name.endswith("_offload")
    assert ("offload_param" in zero) == (name == "ds_z3_offload")
    assert zero.get("stage3_gather_16bit_weights_on_model_save", False) == (zero["stage"] == 3)
    assert zero.get("overlap_comm", False) is (zero["stage"] > 0)  # taken back on a CPU
    assert content["zero_allow_untested_optimizer"] is True
    sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    assert {content[key] for key in (*sizes, "gradient_clipping")} == {"auto"}


def test_no_deepspeed_file_is_forgotten():
    assert {path.stem for path in (shipped_configs() / "deepspeed").iterdir()} == set(DEEPSPEED)


def test_an_installed_package_finds_them_beside_its_modules(tmp_path):
    package = tmp_path / "dataflex_pipeline"
    shutil.copytree(ROOT / "dataflex_pipeline" / "config", package / "config")
    shutil.copytree(ROOT / "configs", package / "configs")
    for name in ("__init__.py", "errors.py"):
        shutil.copy(ROOT / "dataflex_pipeline" / name, package / name)
    code = """
from dataflex_pipeline.config.load import load_config
from dataflex_pipeline.config.shipped import shipped_configs
print(shipped_configs())
print(load_config(None, ["loss.focus=low"]).config.update_times)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.split() == [str(package / "configs"), "5"]


def test_an_installation_without_them_says_so(tmp_path):
    package = tmp_path / "dataflex_pipeline"
    shutil.copytree(ROOT / "dataflex_pipeline" / "config", package / "config")
    for name in ("__init__.py", "errors.py"):
        shutil.copy(ROOT / "dataflex_pipeline" / name, package / name)
    code = "from dataflex_pipeline.config.load import load_config; load_config(None, [])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert "The package was not installed whole." in done.stderr
