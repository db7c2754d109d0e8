"""Wrong keys, wrong values and contradictions of the configuration, and the wording of each."""

import pytest
import yaml
from config_refusal import refused
from hypothesis import given, settings
from hypothesis import strategies as st

from dataflex_pipeline.config.components import method_parameters
from dataflex_pipeline.config.fields import Config
from dataflex_pipeline.config.load import load_config
from dataflex_pipeline.errors import ConfigError

# ---------------------------------------------------------------- unknown keys and wrong values


def test_an_unknown_key_names_file_line_and_the_nearest(write):
    error = refused(write("seed: 1\n\nlearnin_rate: 3\nfoo: 1\n", "configs/x.yaml"))
    assert error.what == (
        "'learnin_rate' (configs/x.yaml, line 3) is not a key of the configuration. "
        "Did you mean 'learning_rate'? Not known either: foo."
    )
    assert "dataflex init" in error.fix


def test_a_dotted_key_in_a_file(write):
    assert "methods: {loss: {focus: VALUE}}" in refused(write("loss.focus: low\n")).fix


@pytest.mark.parametrize(
    ("text", "what", "why", "fix"),
    [
        (
            "lora_rank: true",
            "lora_rank: true (",
            "a whole number of at least 1 and of at most 65536.",
            "leave it out",
        ),
        (
            "lora_rank: 8.0",
            "lora_rank: 8.0 (",
            "a whole number of at least 1 and of at most 65536.",
            "Write lora_rank: 8",
        ),
        (
            'lora_rank: "8"',
            'lora_rank: "8" (',
            "a whole number of at least 1 and of at most 65536.",
            "Write lora_rank: 8",
        ),
        (
            "lora_rank: 3.7",
            "lora_rank: 3.7 (",
            "a whole number of at least 1 and of at most 65536.",
            "such a value",
        ),
        (
            "lora_rank: '007'",
            'lora_rank: "007" (',
            "a whole number of at least 1 and of at most 65536.",
            "Write lora_rank: 7",
        ),
        (
            "learning_rate: -1.0",
            "learning_rate: -1.0 (",
            "a number above 0 and of at most 100.",
            "such a value",
        ),
        ("ddp_timeout: 1e12", "ddp_timeout: 10", "of at least 1 and of at most 1000000000.", "such a value"),
        (
            "lora_rank: 0",
            "lora_rank: 0 (",
            "a whole number of at least 1 and of at most 65536.",
            "Give lora_rank such a value",
        ),
        ("lora_rank: 1:30", 'lora_rank: "1:30" (', "a whole number", "such a value"),
        (
            "learning_rate: '1e-4'",
            'learning_rate: "1e-4" (',
            "a number above 0 and of at most 100.",
            "Write learning_rate: 0.0001",
        ),
        (
            "learning_rate: fast",
            'learning_rate: "fast" (',
            "a number above 0 and of at most 100.",
            "such a value",
        ),
        (
            "learning_rate: true",
            "learning_rate: true (",
            "a number above 0 and of at most 100.",
            "such a value",
        ),
        (
            "learning_rate: .inf",
            "learning_rate: Infinity (",
            "a number above 0 and of at most 100.",
            "such a value",
        ),
        (
            "learning_rate: .nan",
            "learning_rate: NaN (",
            "a number above 0 and of at most 100.",
            "such a value",
        ),
        ("lora_dropout: 1", "lora_dropout: 1 (", "a number of at least 0 and below 1.", "such a value"),
        ("bf16: 1", "bf16: 1 (", "bf16 takes true or false, or auto.", "such a value"),
        ("bf16: 'true'", 'bf16: "true" (', "bf16 takes true or false, or auto.", "such a value"),
        ("run_name: 2024", "run_name: 2024 (", "run_name takes text, or null.", 'run_name: "2024"'),
        ("dataset: [a, b]", 'dataset: ["a", "b"] (', "dataset takes text.", "such a value"),
        ("dataset: ' '", "dataset is an empty text (", "dataset takes text.", "leave the key out"),
        ("strategy: topk", 'strategy: "topk" (', "one of sample, top_k, round_robin, or null.", "'top_k'"),
        ("eval_strategy: yes", "eval_strategy: true (", "one of no, steps, epoch.", "Choose one"),
        ("source_quotas: 3", "source_quotas: 3 (", "a mapping of names to numbers.", "such a value"),
        ("source_quotas: {a: x}", 'source_quotas.a: "x" (', "a mapping of names to numbers.", "such a value"),
        ("candidates: {method: x, fraction: [1]}", "candidates.fraction: [1] (", "text and numbers", "such"),
        ("data_columns: {a: 1}", "data_columns.a: 1 (", "a mapping of names to text.", "such a value"),
        ("methods: {loss: 3}", "methods.loss: 3 (", "a mapping of names to mappings.", "such a value"),
        ("seed: -1", "seed: -1 (", "of at least 0 and of at most 4294967295.", "such a value"),
    ],
)
def test_wrong_values(write, text, what, why, fix):
    error = refused(write(f"# a comment\n{text}\n"))
    assert error.what.startswith(what)
    assert "(run.yaml, line 2)" in error.what
    assert error.why.endswith(why) or why in error.why
    assert fix in error.fix


def test_several_wrong_values_are_all_named(write):
    error = refused(write("lora_rank: x\nseed: y\nbf16: 3\n"))
    names = {"lora_rank", "seed", "bf16"}
    assert {name for name in names if name in str(error)} == names


def test_a_long_value_is_shortened(write):
    assert len(refused(write(f"lora_rank: {'x' * 5000}\n")).what) < 200


# ---------------------------------------------------------------- contradictions


@pytest.mark.parametrize(
    ("overrides", "what", "fix"),
    [
        (
            ["num_samples=4", "fraction=0.1"],
            "num_samples: 4 (command line); fraction: 0.1",
            "num_samples=null",
        ),
        (
            ["fraction=0.1", "token_budget=9"],
            "fraction: 0.1 (command line); token_budget: 9",
            "fraction=null",
        ),
        (["eval_strategy=epoch"], "is set without eval_dataset", "Set eval_dataset, or eval_strategy to no."),
        (["load_best_model_at_end=true"], "while eval_strategy is no", "Set eval_strategy to steps or epoch"),
        (["early_stopping_steps=3"], "while eval_strategy is no", "Set eval_strategy to steps or epoch"),
        (["source_quotas={a: -0.1}"], "source_quotas.a: -0.1", "from 0 to 1"),
        (["source_quotas={a: 1.5}"], "source_quotas.a: 1.5", "from 0 to 1"),
        (["source_quotas={a: 0.6, b: 0.5}"], "sum to 1.1", "at most 1"),
        (["strategy=top_k", "replacement=true"], 'strategy: "top_k"', "leave replacement out"),
        (["strategy=round_robin", "weights=importance"], "weights", "leave weights out"),
        (["report_to=wanbd"], "names 'wanbd', which is not known. Did you mean 'wandb'?", "comma-separated"),
        (["report_to=none,wandb"], "report_to", "Keep none, or the tracker."),
        (
            ["finetuning_type=full", "adapter_name_or_path=x"],
            "adapter_name_or_path",
            "finetuning_type to lora",
        ),
        (["metric_for_best_model=eval_los"], "Did you mean 'eval_loss'?", "to one of them"),
        (["lr_scheduler_type=cosin"], "is not known. Did you mean 'cosine'?", "to one of them"),
    ],
)
def test_contradictions(overrides, what, fix):
    error = refused(None, overrides, {})
    assert what in error.what
    assert fix in error.fix


@pytest.mark.parametrize(
    "overrides",
    [
        ["num_samples=4"],
        ["source_quotas={a: 0.1, b: 0.2, c: 0.7}"],
        ["source_quotas={a: 0, b: 1}"],
        ["eval_strategy=epoch", "eval_dataset=d", "load_best_model_at_end=true", "early_stopping_steps=2"],
        ["strategy=sample", "replacement=true", "weights=importance"],
        ["strategy=top_k", "replacement=false"],
        ["report_to=wandb, tensorboard"],
    ],
)
def test_what_goes_together_loads_without_a_word(overrides):
    assert load_config(None, overrides, {}).notices == ()


@pytest.mark.parametrize(
    ("overrides", "notice"),
    [
        (["finetuning_type=full", "lora_rank=4", "lora_alpha=2"], "so lora_rank, lora_alpha has no effect"),
        (["trust_remote_code=true", "model_name_or_path=org/m"], "runs Python code that comes with org/m"),
        (["eval_steps=3"], "eval_steps has no effect while eval_strategy is no"),
        (["early_stopping_min_delta=0.1"], "no effect without early_stopping_steps"),
        (
            [
                "greater_is_better=true",
                "early_stopping_steps=1",
                "eval_strategy=epoch",
                "eval_dataset=demo",
            ],
            "HIGHEST loss",
        ),
    ],
)
def test_what_has_no_effect_is_said(overrides, notice):
    (said,) = load_config(None, overrides, {}).notices
    assert notice in said


def test_the_demo_target_beside_an_own_pool_is_said():
    base, said = load_config(None, ["dataset=mine.json"]).notices
    assert "the model is the demo's, which knows nothing of your rows" in base
    assert "those of its quickstart.yaml" in base
    assert "eval_dataset is still the embedded demo's target set" in said
    assert load_config(None, ["dataset=mine.json", "eval_dataset=demo"]).notices == (base,)
    none = ["dataset=mine.json", "eval_dataset=null", "eval_strategy=no"]
    assert load_config(None, none).notices == (base,)


def test_a_model_of_ones_own_has_the_defaults_and_not_the_demos_settings():
    loaded = load_config(None, ["model_name_or_path=./model", "dataset=mine.json"])
    assert (loaded.config.learning_rate, loaded.config.cutoff_len) == (1e-4, 2048)
    assert loaded.config.methods == {}
    (said,) = loaded.notices
    assert "what is not given here has its default" in said


# ---------------------------------------------------------------- anything at all

words = st.sampled_from(
    [*Config.model_fields, "stage", "loss.focus", "methods.loss", "selectors", "name", "x"]
)
leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | words
trees = st.recursive(
    leaves, lambda t: st.lists(t, max_size=3) | st.dictionaries(leaves, t, max_size=3), max_leaves=6
)
noise = st.text("abc=:{}[]&*!|>'\"#%@-,. \n\t0", max_size=30)


@settings(deadline=None, max_examples=150)
@given(
    st.dictionaries(words, trees, max_size=3).map(yaml.safe_dump) | noise,
    st.dictionaries(words, trees, max_size=2).map(yaml.safe_dump) | noise,
    st.lists(st.tuples(words, noise).map("=".join) | noise, max_size=2),
)
def test_whatever_is_given_loads_or_is_refused_in_three_parts(tmp_path_factory, run, components, overrides):
    folder = tmp_path_factory.mktemp("any")
    (folder / "run.yaml").write_text(run, encoding="utf-8")
    (folder / "components.yaml").write_text(components, encoding="utf-8")
    base = {"components_cfg_file": str(folder / "components.yaml")}
    parts = ("loaded",)
    try:
        loaded = load_config(folder / "run.yaml", overrides, base)
        method_parameters(loaded.config, "loss", folder)
    except ConfigError as error:
        parts = (error.what, error.why, error.fix)
    assert all(part.strip() for part in parts)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("warmup_step=10000000000", "of at most 2147483647"),
        ("max_samples=99999999999999999999", "of at most 2147483647"),
        ("per_device_train_batch_size=1000000000000", "of at most 2147483647"),
        ("lora_rank=10000000000000", "of at most 65536"),
        ("seed=99999999999999", "of at most 4294967295"),
    ],
)
def test_numbers_that_nothing_could_hold_are_refused_by_their_limit(setting, said):
    with pytest.raises(ConfigError) as caught:
        load_config(None, [setting])
    assert said in caught.value.why


def test_a_round_of_more_rows_than_an_index_holds_is_refused():
    with pytest.raises(ConfigError, match=r"8,000,000,000,000 rows in one round"):
        load_config(None, ["warmup_step=1000000", "per_device_train_batch_size=8000000"])
    load_config(None, ["warmup_step=1000000"])
