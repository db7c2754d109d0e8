"""Parameters of methods: the shipped file, a user's own, and the configuration over both."""

import textwrap
from pathlib import Path

import pytest

from dataflex_pipeline.config.components import known_methods, method_parameters
from dataflex_pipeline.config.fields import Config
from dataflex_pipeline.config.load import load_config
from dataflex_pipeline.errors import ConfigError
from dataflex_pipeline.methods import check_methods, configured_method, shipped_methods

GUIDES = Path(__file__).resolve().parents[1] / "guides"
LOSS = {
    "focus": "high",
    "focus_weight": 5.0,
    "quantiles": [0.33, 0.66],
    "replacement": False,
    "temperature": 1.0,
}


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Write components/mine.yaml and return a configuration that names it."""
    monkeypatch.chdir(tmp_path)

    def _own(text: str, **keys) -> Config:
        path = Path("components/mine.yaml")
        path.parent.mkdir(exist_ok=True)
        path.write_text(textwrap.dedent(text))
        return Config(components_cfg_file=str(path), **keys)

    return _own


def refused(config: Config, name: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        method_parameters(config, name, None)
    assert all((caught.value.what, caught.value.why, caught.value.fix))
    return caught.value


def test_the_shipped_parameters():
    entry = method_parameters(Config(), "loss", None)
    assert (entry.name, entry.kind, entry.params) == ("loss", "loss", LOSS)
    assert (entry.file, entry.module, entry.seed, entry.save_interval, entry.notices) == (
        None,
        None,
        None,
        None,
        (),
    )
    assert entry.places["focus"].startswith("configs/components.yaml, line ")
    delta = {"window_size": 0.2, "schedule": "sigmoid", "base_weight": 0.025, "replacement": False}
    assert method_parameters(Config(), "delta_loss", None).params == delta
    assert method_parameters(Config(), "random", None).params == {"replacement": False}


def test_the_configuration_lies_over_the_file(own):
    config = own(
        "loss: {name: loss, params: {focus: medium, temperature: 1e-1}}\n", methods={"loss": {"focus": "low"}}
    )
    entry = method_parameters(config, "loss", None)
    assert entry.params == {"focus": "low", "temperature": 0.1}
    assert entry.places == {
        "focus": "loss.focus of the configuration",
        "temperature": "components/mine.yaml, line 1",
    }
    assert entry.where == "loss.focus of the configuration, components/mine.yaml, line 1"


def test_nested_parameters_are_merged(own):
    config = own(
        "x: {params: {backend: {api: {url: u, model: m}, local: {k: null}}}}\n",
        methods={"x": {"backend": {"api": {"model": "n"}}}},
    )
    assert method_parameters(config, "x", None).params == {
        "backend": {"api": {"url": "u", "model": "n"}, "local": {"k": None}}
    }


@pytest.mark.parametrize(
    "text", ["{}: {{name: {}, params: {{a: 1}}}}", "selectors:\n  {}: {{name: {}, params: {{a: 1}}}}"]
)
def test_entries_at_top_level_or_in_a_section(own, text):
    config = own(text.format("mine", "loss"))
    entry = method_parameters(config, "mine", None)
    assert (entry.name, entry.kind, entry.params) == ("mine", "loss", {"a": 1})
    assert (
        method_parameters(config, "loss", None).params == LOSS
    )  # what the file does not name is the shipped one


def test_the_same_entry_in_both_places(own):
    error = refused(own("loss: {name: loss}\nselectors:\n  loss: {name: loss}\n"), "loss")
    assert "two entries for loss: components/mine.yaml, line 1" in error.what


def test_what_is_common_to_all_methods_is_split_off(own):
    config = own(
        "x: {params: {a: 1, seed: 123, save_interval: 16, cache_dir: ../out, probs_path: p.npy}}\n",
        methods={"x": {"seed": 5}},
    )
    entry = method_parameters(config, "x", None)
    assert entry.params == {"a": 1, "probs_path": "p.npy"}
    assert (entry.seed, entry.save_interval) == (5, 16)
    assert entry.notices == (
        "cache_dir of x (components/mine.yaml, line 1): kept in the run's folder instead",
    )
    assert entry.places["seed"] == "x.seed of the configuration"


@pytest.mark.parametrize(
    ("key", "value", "least"),
    [
        ("seed", -1, 0),
        ("seed", True, 0),
        ("seed", 1.0, 0),
        ("save_interval", 0, 1),
        ("save_interval", "16", 1),
    ],
)
def test_common_parameters_are_checked(key, value, least):
    error = refused(Config(methods={"loss": {key: value}}), "loss")
    assert error.what.startswith(f"loss.{key}: {value!r} (loss.{key} of the configuration)")
    assert error.why == f"{key} takes a whole number of at least {least}."


def test_a_method_of_the_users_own(own):
    config = own("x: {file: ../methods/x.py}\ny: {name: why, module: pkg.y, params:}\n")
    entry = method_parameters(config, "x", None)
    assert Path(entry.file) == Path("components/../methods/x.py")
    assert (entry.kind, entry.params) == ("x", {})
    entry = method_parameters(config, "y", None)
    assert (entry.kind, entry.module, entry.file, entry.params) == ("why", "pkg.y", None, {})


def test_known_methods(own):
    assert set(known_methods(Config(), None)) == set(shipped_methods())
    known = known_methods(own("\nmine: {name: loss}\n"), None)
    assert set(known) == {*shipped_methods(), "mine"}
    assert known["mine"] == "components/mine.yaml, line 2"


@pytest.mark.parametrize("name", ["loss", "delta_loss", "less", "nice", "tsds"])
def test_the_guides_entries(name):
    for file in (f"components_{name}", "components_all"):
        entry = method_parameters(Config(components_cfg_file=str(GUIDES / f"{file}.yaml")), name, None)
        assert entry.kind == name
        assert "cache_dir" not in entry.params
        assert len(entry.notices) == 1
    if name == "nice":
        assert (entry.seed, entry.save_interval) == (123, 16)
        assert entry.params["reward_backend_params"]["api"]["api_key"] == "DF_API_KEY"
        assert entry.params["reward_backend_params"]["local_vllm"]["vllm_max_model_len"] is None
    if name == "tsds":
        assert entry.params["probs_path"].endswith("tsds_probs.npy")


NEWER = """
selectors:
  loss: {name: loss, params: {cache_dir: ../l, focus: medium, score_batch_size: 4, score_num_workers: 1}}
  delta_loss: {name: delta_loss, params: {cache_dir: ../saves/delta, window_size: 0.3, score_batch_size: 4}}
  near: {name: near, params: {indices_path: ./near.npy, cache_dir: ../saves/near}}
  icons: {name: icons, params: {cache_dir: ../saves/icons, proj_dim: 64, task_boundaries: null}}
  cluster_less: {name: cluster_less, params: {cluster_size: 8, embedding_model_name_or_path: null}}
  coincide: {name: coincide, params: {seed: 1, num_clusters: 10, temperature: 0.5}}
  custom: {name: custom, params: {cache_dir: ../saves/custom}}
mixers:
  random: {name: random, params: {seed: 1}}
  static: {name: static, params: {proportions: [0.25, 0.75]}}
weighters:
  loss: {name: loss, params: {strategy: uniform, delta: 2.0}}
reorders:
  sorting:
    name: sorting
    params: {kind: static, pattern: sorting, score_params: {score_field: quality}}
pipelines:
  two_steps:
    name: two_steps
    params:
      score_batch_size: 4
      stages:
        - {family: selector, component: loss, mode: filter, keep_ratio: 0.25}
        - {family: weighter, component: loss}
"""
"""The sections and parameters of DataFlex 1.1.0's components.yaml."""


def test_the_newer_components_of_the_peer(own):
    config = own(NEWER)
    entry = method_parameters(config, "loss", None)
    assert entry.params == {"focus": "medium"}
    assert [line.partition(" (")[0] for line in entry.notices] == [
        "cache_dir of loss",
        "score_batch_size of loss",
        "score_num_workers of loss",
    ]
    assert "components/mine.yaml, line 3) has no effect: score_batch_tokens" in entry.notices[1]
    assert method_parameters(config, "near", None).params == {}
    assert set(known_methods(config, None)) == {
        *shipped_methods(), "icons", "cluster_less", "coincide", "custom"
    }  # fmt: skip
    for name in shipped_methods():
        configured_method(config, name, None)


def test_a_seed_of_random_that_changes_nothing_is_said(own):
    entry = method_parameters(own("random: {name: random, params: {seed: 3}}\n"), "random", None)
    (line,) = entry.notices
    assert line.startswith("seed of random (")
    assert line.endswith("has no effect: rows are drawn by the run's seed")
    assert method_parameters(own("random: {name: random}\n"), "random", None).notices == ()


def test_sections_without_methods_are_said(own):
    config = own(NEWER)
    loaded = load_config(None, [f"components_cfg_file={config.components_cfg_file}"], {})
    assert [line.partition(" is passed over")[0] for line in loaded.notices] == [
        "mixers (components/mine.yaml, line 10)",
        "weighters (components/mine.yaml, line 13)",
        "reorders (components/mine.yaml, line 15)",
        "pipelines (components/mine.yaml, line 19)",
    ]
    empty = own("mixers:\nreorderers: {}\nloss: {name: loss}\n")
    assert len(load_config(None, [f"components_cfg_file={empty.components_cfg_file}"], {}).notices) == 2


def test_a_method_may_be_called_as_a_section_is(own):
    config = own("mixers: {name: loss, params: {focus: low}}\n")
    assert method_parameters(config, "mixers", None).params == {"focus": "low"}
    assert load_config(None, [f"components_cfg_file={config.components_cfg_file}"], {}).notices == ()


def test_a_method_of_ones_own_keeps_parameters_of_those_names(own):
    config = own("x: {file: x.py, params: {score_batch_size: 3, indices_path: a.npy}}\n")
    entry = method_parameters(config, "x", None)
    assert (entry.params, entry.notices) == ({"score_batch_size": 3, "indices_path": "a.npy"}, ())


def test_a_parameter_of_the_command_line_is_passed_over_too():
    config = load_config(None, ["loss.score_batch_size=3"], {}).config
    (said,) = method_parameters(config, "loss", None).notices
    assert said.startswith("score_batch_size of loss (loss.score_batch_size of the configuration)")


def test_methods_that_do_not_exist_matter_only_when_used(own):
    config = own("future: {name: not_built_yet, params: {}}\nbroken: 3\n")
    assert method_parameters(config, "loss", None).params == LOSS
    error = refused(config, "broken")
    assert "broken (components/mine.yaml, line 2)" in error.what
    assert error.why == "An entry is a mapping with name and params."


def test_an_unknown_method():
    error = refused(Config(), "delta_los")
    assert error.what == "The method 'delta_los' is not known. Did you mean 'delta_loss'?"
    assert error.why == f"There are entries for: {', '.join(shipped_methods())}."
    assert "components_cfg_file" in error.fix


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("x: {nam: loss}", "'nam' is none of name, params, file, module. Did you mean 'name'?"),
        ("x: {focus: low}", "Parameters belong below params: focus."),
        ("x: {params: 3}", "params is a mapping of parameters to values."),
        ("x: {name: 3}", "name is text, and not empty."),
        ('x: {name: ""}', "name is text, and not empty."),
        ('x: {module: ""}', "module is text, and not empty."),
        ("x: {module: a..b}", "module is a name as in Python's import"),
        ("x: {file: a.py, module: b}", "give one."),
    ],
)
def test_entries_of_the_wrong_shape(own, text, why):
    error = refused(own(text), "x")
    assert "components/mine.yaml, line 1" in error.what
    assert why in error.why


def test_a_section_of_the_wrong_shape(own):
    assert "It takes one entry per method." in refused(own("selectors: 3\n"), "loss").why


def test_a_path_may_start_in_the_configuration_files_folder(own, tmp_path):
    own("loss: {params: {focus: low}}\n")
    (tmp_path / "components" / "run.yaml").write_text("components_cfg_file: mine.yaml\n")
    loaded = load_config(Path("components/run.yaml"), [])
    assert loaded.config.components_cfg_file == "components/mine.yaml"
    assert method_parameters(loaded.config, "loss", loaded.config_dir).params == {"focus": "low"}
    assert method_parameters(loaded.config, "loss", None).params == {"focus": "low"}


# ---------------------------------------------------------------- names in the configuration


def checked(overrides: list[str], base: dict | None = None) -> Config:
    """Load a configuration and check the parameters of methods, as every command does."""
    loaded = load_config(None, overrides, base)
    check_methods(loaded.config, loaded.config_dir)
    return loaded.config


@pytest.mark.parametrize(
    ("override", "what", "why"),
    [
        (
            "los.focus=low",
            "The method 'los' is not known. Did you mean 'loss'?",
            ", ".join(shipped_methods()),
        ),
        ("delta_loss.windw_size=1", "Did you mean 'window_size'?", "delta_loss takes: window_size, schedule"),
        ("methods.loss.fokus=low", "loss.fokus is not a parameter of loss.", "loss takes: focus, "),
    ],
)
def test_names_of_methods_and_parameters_are_checked_though_not_in_use(override, what, why):
    with pytest.raises(ConfigError) as caught:
        checked(["component_name=random", override])
    assert what in caught.value.what
    assert why in caught.value.why


def test_parameters_of_variants_and_of_own_methods(own):
    config = own("mild: {name: loss}\nloss: {file: my_loss.py}\n")
    base = {"components_cfg_file": config.components_cfg_file}
    assert checked(["loss.anything=1", "mild.seed=3"], base).methods["loss"] == {"anything": 1}
    with pytest.raises(ConfigError, match=r"mild\.focuss is not a parameter of loss"):
        checked(["mild.focuss=low"], base)
    with pytest.raises(ConfigError, match="Did you mean 'seed'"):
        checked(["mild.sed=1"], base)
