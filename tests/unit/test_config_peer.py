"""A configuration written for the peer (DataFlex on LLaMA-Factory) loads unchanged, key by key."""

import re
from pathlib import Path

import pytest
import yaml
from config_refusal import refused

from dataflex_pipeline.config.components import COMMON
from dataflex_pipeline.config.fields import Config
from dataflex_pipeline.config.load import PEER_DEFAULT, load_config
from dataflex_pipeline.config.peer import FIXED, HINTS, IGNORED
from dataflex_pipeline.config.shipped import shipped_configs

HERE = Path(__file__).resolve().parents[1] / "guides"
GUIDES = HERE.parents[1].parent / "shared" / "guides"
TRAINING = ["loss", "delta_loss", "less", "nice", "tsds", "tsds_commented"]
MERGING = ["merge_loss", "merge_delta_loss", "merge_less", "merge_nice", "merge_tsds"]
COMPONENTS = [
    "components_loss",
    "components_delta_loss",
    "components_less",
    "components_nice",
    "components_tsds",
]
REPLACED = {"model_name_or_path": "demo", "dataset": "mine.json", "eval_dataset": "target.json"}


def read(name: str) -> dict:
    return yaml.safe_load((HERE / f"{name}.yaml").read_text())


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Run in an empty folder, where none of the peer's files exist."""
    monkeypatch.chdir(tmp_path)


# ---------------------------------------------------------------- the guides' files


@pytest.mark.parametrize("name", TRAINING)
def test_a_guides_training_file_loads_with_only_model_and_data_replaced(name):
    given = read(name)
    loaded = load_config(HERE / f"{name}.yaml", [f"{k}={v}" for k, v in REPLACED.items()])
    values = loaded.config.model_dump()
    expected = {k: v for k, v in given.items() if k not in FIXED and k not in IGNORED} | REPLACED
    expected |= {"components_cfg_file": None, "num_train_epochs": None}  # once: what the steps say
    if "deepspeed" in given:
        expected["deepspeed"] = str(shipped_configs() / "deepspeed" / "ds_z3.json")
        assert loaded.sources["deepspeed"] == PEER_DEFAULT
    if given["ddp_timeout"] is False:
        expected["ddp_timeout"] = Config().ddp_timeout
    if given.get("use_swanlab"):
        expected["report_to"] = "swanlab"
    assert {key: values[key] for key in expected} == expected
    assert loaded.sources["components_cfg_file"] == PEER_DEFAULT
    assert loaded.sources["warmup_step"] == str(HERE / f"{name}.yaml")


@pytest.mark.parametrize("name", MERGING)
def test_a_guides_merge_file_loads(name):
    config = load_config(HERE / f"{name}.yaml", ["model_name_or_path=demo"]).config
    given = read(name)
    assert (config.adapter_name_or_path, config.export_dir) == (
        given["adapter_name_or_path"],
        given["export_dir"],
    )
    assert (config.export_size, config.export_device, config.template) == (5, "cpu", given["template"])


def test_every_key_of_the_guides_is_accounted_for():
    keys = {key for name in TRAINING + MERGING for key in read(name)}
    assert len(keys) > 50
    fields, fixed, ignored = keys & set(Config.model_fields), keys & set(FIXED), keys & set(IGNORED)
    assert fields | fixed | ignored == keys
    assert fixed == set(FIXED)
    assert ignored == set(IGNORED)
    assert not set(Config.model_fields) & (set(FIXED) | set(IGNORED) | set(HINTS))
    assert "num_train_epochs" in fields


def test_every_key_of_the_guides_components_is_accounted_for():
    for name in COMPONENTS:
        ((method, entry),) = read(name).items()
        assert set(entry) == {"name", "params"}
        assert set(entry["params"]) & set(COMMON) == set(entry["params"]) & {
            "seed",
            "save_interval",
            "cache_dir",
        }
        shipped = yaml.safe_load((shipped_configs() / "components.yaml").read_text())
        if method in shipped:
            assert set(entry["params"]) <= {*shipped[method]["params"], *COMMON}


# ---------------------------------------------------------------- against the guides themselves


def guide_text(name: str) -> str:
    path = GUIDES / f"{name}.md"
    if not path.is_file():
        pytest.skip(f"the guides are not at {GUIDES.name} beside this checkout")
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["loss", "delta_loss", "less"])
def test_the_files_here_say_what_the_guides_blocks_say(name):
    blocks = [yaml.safe_load(b) for b in re.findall(r"```yaml\n(.*?)```", guide_text(name), re.DOTALL)]
    assert [read(f"components_{name}"), read(name), read(f"merge_{name}")] == blocks


@pytest.mark.parametrize("name", ["nice", "tsds"])
def test_the_files_here_say_what_the_guides_without_blocks_say(name):
    text = guide_text(name)
    for file in (name, f"components_{name}", f"merge_{name}"):
        for line in (HERE / f"{file}.yaml").read_text().splitlines():
            prose = line.startswith(("#", "model_name_or_path: base", "adapter_name_or_path: trained"))
            if not prose:
                assert line.strip() in text, f"{file}: {line}"
    start = text.index("### model")
    section = re.split(r"参数说明|\n## |\n\d\. ", text[start:])[0]
    shown = set(re.findall(r"^([a-z][a-z0-9_]+):", section, re.MULTILINE))
    assert shown == set(read(name))


# ---------------------------------------------------------------- keys with one meaning


@pytest.mark.parametrize(
    "text",
    [
        "stage=sft",
        "stage=",
        "do_train=true",
        "train_type=dynamic_select",
        "save_only_model=false",
        "export_legacy_format=false",
        "overwrite_cache=false",
    ],
)
def test_what_can_only_mean_one_thing_is_taken_without_a_word(text):
    loaded = load_config(None, [text], {})
    assert loaded.config == Config()
    assert loaded.notices == ()


@pytest.mark.parametrize(
    ("text", "why", "fix"),
    [
        ("stage=dpo", "supervised fine-tuning", "stage: sft"),
        ("do_train=false", "how much of it is done", "dataflex score"),
        ("do_train=1", "how much of it is done", "dataflex score"),
        ("train_type=static", "Rounds of selection", "component_name: random"),
        ("train_type=dynamic_mix", "Rounds of selection", "source_quotas"),
        ("train_type=dynamic_weight", "Rounds of selection", "set weights"),
        ("save_only_model=true", "optimizer's states", "top of the run folder"),
        ("export_legacy_format=true", "pickled weights", "safetensors"),
    ],
)
def test_what_would_mean_something_else_is_an_error(text, why, fix):
    error = refused(None, [text], {})
    name, value = text.split("=")
    assert error.what == f"{name}: {value} (command line) cannot be used here."
    assert why in error.why
    assert fix in error.fix


@pytest.mark.parametrize("name", sorted(IGNORED))
def test_overwriting_deletes_nothing_and_is_said(name):
    (said,) = load_config(None, [f"{name}=true"], {}).notices
    assert said.startswith(f"{name}: true (command line) has no effect: ")
    assert "--overwrite" in said
    assert f"{name} takes true or false." == refused(None, [f"{name}=3"], {}).why


def test_ddp_timeout():
    loaded = load_config(None, ["ddp_timeout=false"], {})
    assert loaded.config.ddp_timeout == 1800
    assert loaded.notices == ("ddp_timeout: false (command line) is taken as the default",)
    assert load_config(None, ["ddp_timeout=180000000"], {}).config.ddp_timeout == 180_000_000
    assert "of at least 1" in refused(None, ["ddp_timeout=true"], {}).why
    assert "of at most" in refused(None, ["ddp_timeout=99999999999"], {}).why


def test_a_bare_no_is_a_word_where_a_word_is_meant(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("eval_strategy: no\n")
    assert load_config(path, []).config.eval_strategy == "no"


@pytest.mark.parametrize(
    ("overrides", "report_to"),
    [
        (["use_swanlab=true"], "swanlab"),
        (["use_swanlab=true", "report_to=none"], "swanlab"),
        (["use_swanlab=true", "report_to=wandb"], "wandb,swanlab"),
        (["use_swanlab=true", "report_to=swanlab"], "swanlab"),
        (["use_swanlab=false", "report_to=wandb"], "wandb"),
    ],
)
def test_use_swanlab(overrides, report_to):
    loaded = load_config(None, overrides, {})
    assert loaded.config.report_to == report_to
    again = load_config(None, [], {"report_to": report_to, "use_swanlab": loaded.config.use_swanlab})
    assert again.config.report_to == report_to


@pytest.mark.parametrize("name", sorted(HINTS))
def test_keys_people_bring_along_are_explained(name):
    error = refused(None, [f"{name}=word"], {})
    assert error.what == f"'{name}' (command line) is not a key of the configuration."
    assert error.fix == HINTS[name]


# ---------------------------------------------------------------- the peer's own files


@pytest.mark.parametrize(
    ("given", "shipped"),
    [
        ("examples/deepspeed/ds_z0_config.json", "ds_z0.json"),
        ("examples/deepspeed/ds_z2_config.json", "ds_z2.json"),
        ("examples/deepspeed/ds_z2_offload_config.json", "ds_z2_offload.json"),
        ("examples/deepspeed/ds_z3_config.json", "ds_z3.json"),
        ("../DataFlex/examples/deepspeed/ds_z3_offload_config.json", "ds_z3_offload.json"),
        ("configs/deepspeed/ds_z3.json", "ds_z3.json"),
    ],
)
def test_the_peers_deepspeed_files(given, shipped):
    loaded = load_config(None, [f"deepspeed={given}"], {})
    assert loaded.config.deepspeed == str(shipped_configs() / "deepspeed" / shipped)
    assert Path(loaded.config.deepspeed).is_file()
    assert loaded.notices == (
        f"deepspeed: {given} (command line) does not exist: the shipped configs/deepspeed/{shipped} is taken",
    )


def test_a_file_of_that_name_that_exists_counts(tmp_path):
    mine = tmp_path / "examples" / "deepspeed" / "ds_z3_config.json"
    mine.parent.mkdir(parents=True)
    mine.write_text('{"zero_optimization": {"stage": 3}}')
    loaded = load_config(None, ["deepspeed=examples/deepspeed/ds_z3_config.json"], {})
    assert loaded.config.deepspeed == "examples/deepspeed/ds_z3_config.json"
    assert loaded.notices == ()


@pytest.mark.parametrize(
    "given", ["nix.json", "examples/deepspeed/other.json", "deepspeed/ds_z9.json", "deepspeed"]
)
def test_any_other_deepspeed_file_that_is_missing(given):
    error = refused(None, [f"deepspeed={given}"], {})
    assert error.what == f"deepspeed: {given} (command line) was given."
    assert error.why == "There is no such file."
    assert "configs/deepspeed" in error.fix


@pytest.mark.parametrize(
    ("content", "why"),
    [("{", "not valid JSON, line 1"), ('{"a": 1\n"b"}', "not valid JSON, line 2"), ("[]", "a JSON object")],
)
def test_a_broken_deepspeed_file(tmp_path, content, why):
    (tmp_path / "ds.json").write_text(content)
    assert why in refused(None, ["deepspeed=ds.json"], {}).why


@pytest.mark.parametrize("given", ["components.yaml", "src/components.yml", "configs/other.yaml"])
def test_any_other_components_file_that_is_missing(given):
    error = refused(None, [f"components_cfg_file={given}"], {})
    assert error.what == f"components_cfg_file: {given} (command line) was given."
    assert error.why == "There is no such file."


def test_the_peers_name_of_the_load_balancing_factor(tmp_path):
    path = tmp_path / "moe.yaml"
    path.write_text("model_name_or_path: m\ndataset: d.json\nmoe_aux_loss_coef: 0.01\n")
    loaded = load_config(path, [])
    assert loaded.config.router_aux_loss_coef == 0.01
    (said,) = [line for line in loaded.notices if "moe_aux_loss_coef" in line]
    assert said == f"moe_aux_loss_coef ({path}, line 3) is taken as router_aux_loss_coef"
