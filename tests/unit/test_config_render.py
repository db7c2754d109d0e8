"""The commented file of ``dataflex init``, and the round trips of whole configurations."""

import json
from pathlib import Path
from typing import Literal, get_args, get_origin

import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from dataflex_pipeline.config.checks import SCHEDULES
from dataflex_pipeline.config.fields import SECRETS, Config
from dataflex_pipeline.config.load import dump_config, load_config
from dataflex_pipeline.config.render import commented_yaml
from dataflex_pipeline.config.values import accepted, base_type


def test_the_default_file_has_every_key_once_with_its_meaning_and_loads_back(tmp_path):
    text = commented_yaml()
    path = tmp_path / "x.yaml"
    path.write_text(text)
    assert load_config(path, []).config == Config()
    assert load_config(path, []).notices == ()
    lines = text.splitlines()
    keys = [line.split(":")[0] for line in lines if line and not line.startswith("#")]
    assert keys == list(Config.model_fields)
    flat = " ".join(line.removeprefix("# ") for line in lines)
    for name, info in Config.model_fields.items():
        assert f"{info.description} ({accepted(name)})" in flat, name
    assert max(map(len, lines)) <= 110


def test_sections_are_not_torn_apart():
    sections = [line for line in commented_yaml().splitlines() if line.startswith("### ")]
    assert len(sections) == len(set(sections))


def test_what_a_key_accepts_in_words():
    assert accepted("cutoff_len") == "a whole number of at least 2"
    assert accepted("fraction") == "a number above 0 and of at most 1, or null"
    assert accepted("eval_strategy") == "one of no, steps, epoch"
    assert accepted("source_quotas") == "a mapping of names to numbers"
    assert accepted("template") == "text, or null"
    for name in Config.model_fields:
        assert accepted(name)


def test_secrets_are_not_rendered():
    config = Config(**dict.fromkeys(SECRETS, "hush-hush"))
    assert "hush-hush" not in commented_yaml(config)


names = st.text(min_size=1).filter(lambda text: text.strip())
number = st.floats(1e-9, 0.9)
by_type = {bool: st.booleans(), int: st.integers(2, 2**31 - 1), float: number, str: names}
# keys that other keys restrict take part with values that go together
fixed = {
    "eval_dataset": st.just("demo"),
    "metric_for_best_model": st.sampled_from(["eval_loss", "eval_token_accuracy"]),
    "lr_scheduler_type": st.sampled_from(SCHEDULES),
    "report_to": st.sampled_from(["none", "wandb", "wandb,mlflow"]),
    "use_swanlab": st.just(False),
    "fraction": st.none(),
    "token_budget": st.none(),
    "strategy": st.sampled_from([None, "sample"]),
    "finetuning_type": st.just("lora"),
    "eval_strategy": st.sampled_from(["steps", "epoch"]),
    "components_cfg_file": st.none(),
    "deepspeed": st.none(),
    "methods": st.just({"loss": {"focus": "low", "quantiles": [0.1, 1e-3]}}),
    "source_quotas": st.dictionaries(names, st.floats(0, 0.2), max_size=4),
    "data_columns": st.dictionaries(names, names, max_size=2),
    "data_tags": st.dictionaries(names, names, max_size=2),
    "lora_rank": st.integers(1, 65_536),
    "lora_alpha": st.none() | st.integers(1, 1024),  # at most 1,024 times lora_rank
    "warmup_step": st.integers(0, 1000),
    "update_step": st.integers(0, 1000),
    "per_device_train_batch_size": st.integers(1, 1000),
    "gradient_accumulation_steps": st.integers(1, 1000),
    "preprocessing_num_workers": st.none() | st.integers(1, 1024),
    "dataloader_num_workers": st.integers(0, 1024),
    "ddp_timeout": st.integers(1, 180_000_000),
    "balanced": st.none(),
    "candidates": st.just({"method": "tsds", "num_samples": 10**9}),
    "num_samples": st.none() | st.integers(1, 10**9),
    "max_similarity": st.none(),
    "order": st.just("shuffled"),
    "similarity": st.just({"embed_text": "prompt", "max_length": 64}),
    "num_train_epochs": st.none(),  # it stands in place of update_step
    **dict.fromkeys(SECRETS, st.none()),
}


def _strategy(name):
    kind = base_type(name)
    inner = st.sampled_from(get_args(kind)) if get_origin(kind) is Literal else by_type[kind]
    optional = Config.model_fields[name].default is None
    return st.none() | inner if optional else inner


configurations = st.fixed_dictionaries(
    {name: fixed[name] if name in fixed else _strategy(name) for name in Config.model_fields}
)


@settings(deadline=None, max_examples=40)
@given(configurations)
def test_round_trips(tmp_path_factory, values):
    config = Config.model_validate(values, strict=True)
    path: Path = tmp_path_factory.mktemp("x") / "x.yaml"
    path.write_text(commented_yaml(config), encoding="utf-8")
    assert load_config(path, []).config == config
    dumped = dump_config(config)
    assert load_config(None, [], json.loads(json.dumps(dumped))).config == config
    assert load_config(None, [], yaml.safe_load(yaml.safe_dump(dumped))).config == config
