"""Layers and overrides of the configuration: what lies over what, and where each value came from."""

from pathlib import Path

import pytest
import yaml
from config_refusal import refused

from dataflex_pipeline.config.fields import Config
from dataflex_pipeline.config.load import dump_config, load_config

# ---------------------------------------------------------------- layers


def test_without_anything_the_quickstart_is_the_base():
    loaded = load_config(None, [])
    assert (loaded.config.model_name_or_path, loaded.config.dataset, loaded.config.eval_dataset) == (
        "demo",
    ) * 3
    assert loaded.config.update_times == 5
    assert loaded.sources["update_times"] == "configs/quickstart.yaml"
    assert loaded.sources["weight_decay"] == "default"
    assert loaded.notices == ()


def test_later_layers_lie_over_earlier_ones(write):
    path = write("learning_rate: 2e-4\nlora_rank: 4\n", "a/x.yaml")
    base = {"learning_rate": 1e-5, "lora_rank": 2, "cutoff_len": 77}
    loaded = load_config(path, ["lora_rank=32"], base)
    assert (loaded.config.learning_rate, loaded.config.lora_rank, loaded.config.cutoff_len) == (2e-4, 32, 77)
    assert [loaded.sources[k] for k in ("learning_rate", "lora_rank", "cutoff_len", "seed")] == [
        "a/x.yaml",
        "command line",
        "run.yaml",
        "default",
    ]
    assert loaded.config_dir == Path("a")


def test_a_file_replaces_the_quickstart(write):
    loaded = load_config(write("seed: 7\n"), [])
    assert loaded.config == Config(seed=7)


def test_a_base_replaces_the_quickstart():
    assert load_config(None, [], {}).config == Config()
    assert load_config(None, ["seed=3"], {"cutoff_len": 99}).config == Config(seed=3, cutoff_len=99)


def test_null_takes_a_key_back_to_its_default(write):
    path = write("lora_rank:\nfraction: 0.5\n")
    loaded = load_config(path, ["fraction=null", "num_samples=3"])
    assert (loaded.config.lora_rank, loaded.config.fraction, loaded.config.num_samples) == (8, None, 3)
    assert loaded.sources["fraction"] == "default"
    assert load_config(None, ["cutoff_len="], {"cutoff_len": 5}).config.cutoff_len == 2048


def test_an_empty_model_or_data_set_is_said_unless_given_later(write):
    path = write("model_name_or_path:\ndataset:\n")
    assert load_config(path, []).notices == (
        "model_name_or_path is empty (run.yaml, line 1): the embedded demo is taken",
        "dataset is empty (run.yaml, line 2): the embedded demo is taken",
    )
    assert load_config(path, ["model_name_or_path=m", "dataset=d.json"]).notices == ()


@pytest.mark.parametrize("text", ["", "\n\n", "# nothing\n", "---\n", "{}\n"])
def test_a_file_without_settings_is_not_the_demo(write, text):
    error = refused(write(text), ["seed=3"])
    assert error.what == "run.yaml was given as the configuration."
    assert error.why == "It holds no settings, so the run would be the embedded demo's."
    assert "dataflex init" in error.fix


def test_run_yaml_loads_as_a_configuration(write):
    written = {**dump_config(Config(lora_rank=3)), "run": {"global_batch": 16}}
    path = write(yaml.safe_dump(written))
    assert load_config(path, []).config == Config(lora_rank=3)
    assert "'run' (run.yaml, line 1) is not a key" in refused(write("run: quick\n")).what


def test_mappings_of_methods_are_merged_over_layers(write):
    path = write("methods: {loss: {focus: low}, delta_loss: {window_size: 0.5}}\n")
    loaded = load_config(path, ["loss.temperature=2", "delta_loss.window_size=0.1"])
    assert loaded.config.methods == {
        "loss": {"focus": "low", "temperature": 2},
        "delta_loss": {"window_size": 0.1},
    }


def test_other_mappings_are_replaced_or_extended_by_name(write):
    path = write("source_quotas: {a: 0.5, b: 0.2}\n")
    assert load_config(path, ["source_quotas={c: 1}"]).config.source_quotas == {"c": 1.0}
    loaded = load_config(path, ["source_quotas.my.file.json=0.1", "source_quotas.a=0.3"])
    assert loaded.config.source_quotas == {"a": 0.3, "b": 0.2, "my.file.json": 0.1}


# ---------------------------------------------------------------- overrides


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("learning_rate=1e-4", "learning_rate", 1e-4),
        ("learning_rate=1", "learning_rate", 1.0),
        ("fraction=0.1", "fraction", 0.1),
        ("run_name=2024", "run_name", "2024"),
        ("run_name=1e-4", "run_name", "1e-4"),
        ("run_name='null'", "run_name", "null"),
        ("default_system=Be brief: no #tags, [please]", "default_system", "Be brief: no #tags, [please]"),
        ("dataset=a b/c=d.json,../e", "dataset", "a b/c=d.json,../e"),
        ("bf16=true", "bf16", True),
        ("replacement=false", "replacement", False),
        ("eval_strategy=no", "eval_strategy", "no"),
        ("source_quotas={a: 0.5}", "source_quotas", {"a": 0.5}),
        ("data_columns.prompt=1", "data_columns", {"prompt": "1"}),
        ("methods={loss: {focus: low}}", "methods", {"loss": {"focus": "low"}}),
        ("loss.quantiles=[0.1, 0.9]", "methods", {"loss": {"quantiles": [0.1, 0.9]}}),
        ("methods.loss.focus=low", "methods", {"loss": {"focus": "low"}}),
    ],
)
def test_override_values(text, key, value):
    loaded = load_config(None, [text], {})
    assert getattr(loaded.config, key) == value
    assert type(getattr(loaded.config, key)) is type(value)
    assert loaded.sources[key] == "command line"


def test_an_override_given_twice_is_said():
    loaded = load_config(None, ["seed=1", "seed=2"], {})
    assert loaded.config.seed == 2
    assert loaded.notices == ("seed is given more than once on the command line: the last one counts",)


@pytest.mark.parametrize("text", ["seed", "=3", "loss.=3", ".focus=3", "", "loss..focus=2"])
def test_an_override_without_key_and_value(text):
    error = refused(None, [text])
    assert error.what == f"'{text}' on the command line is not understood."
    assert "learning_rate=1e-4" in error.fix


def test_an_override_of_a_part_of_a_plain_key():
    error = refused(None, ["learning_rate.x=3"])
    assert error.why == "learning_rate takes a number above 0 and of at most 100; it has no parts."


def test_an_override_that_is_no_yaml():
    error = refused(None, ["source_quotas={a"])
    assert error.what.startswith("source_quotas={a on the command line")
    assert "not valid YAML" in error.what


def test_the_demos_test_rows_do_not_stand_for_data_of_ones_own():
    assert load_config(None, []).config.test_dataset == "demo"
    assert load_config(None, ["dataset=mine.jsonl"]).config.test_dataset is None
    assert load_config(None, ["dataset=mine.jsonl", "test_dataset=demo"]).config.test_dataset == "demo"
