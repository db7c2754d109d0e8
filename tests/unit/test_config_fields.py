"""The declared keys, their secrets, and what importing the configuration costs."""

import subprocess
import sys

import pytest
import yaml
from config_refusal import refused
from pydantic import Field, ValidationError

from dataflex_pipeline.api import Params
from dataflex_pipeline.config.fields import SECRETS, Config, group_of, role_of
from dataflex_pipeline.config.keys import LARGEST
from dataflex_pipeline.config.load import dump_config, load_config
from dataflex_pipeline.config.redaction import without_secrets

KEY = "sk-Very/Secret-0815"


def test_secrets_never_reach_a_dump_or_a_message(tmp_path):
    overrides = [f"{name}={KEY}" for name in SECRETS]
    path = tmp_path / "x.yaml"
    path.write_text(f"methods: {{loss: {{}}}}\n{SECRETS[0]}: {KEY}\n")
    config = load_config(path, overrides).config
    assert [getattr(config, name) for name in SECRETS] == [KEY] * 3
    assert KEY not in yaml.safe_dump(dump_config(config)) + repr(config)
    assert not set(SECRETS) & set(dump_config(config))
    path.write_text(f"{SECRETS[0]}: [{KEY}]\n")
    error = refused(path)
    assert KEY not in str(error)
    assert "(a secret, not shown)" in error.what
    assert KEY not in str(refused(None, [f"nice.api.api_key='{KEY}'x'"]))


def test_secrets_in_parameters_of_methods():
    config = Config(
        methods={
            "nice": {"api": {"api_key": KEY, "url": "u"}, "other": [{"password": 815}], "max_new_tokens": 5},
            "loss": {"api_key": "DF_API_KEY"},
        }
    )
    assert dump_config(config)["methods"] == {
        "nice": {"api": {"url": "u"}, "other": [{}], "max_new_tokens": 5},
        "loss": {"api_key": "DF_API_KEY"},
    }
    assert without_secrets({"api_key": "AKIAIOSFODNN7EXAMPLE"}) == {}


def test_every_key_has_meaning_role_group_and_a_valid_default():
    for name, info in Config.model_fields.items():
        assert len(info.description or "") > 4, name
        assert role_of(name) in ("run", "selection", "runtime")
        assert group_of(name)
    assert Config.model_validate(Config().model_dump(), strict=True) == Config()
    assert Config(warmup_step=3, update_step=4, update_times=5).horizon == 23


def test_null_and_the_default_are_the_same_thing():
    for name, info in Config.model_fields.items():
        if "None" in str(info.annotation):
            assert info.default is None, name


def test_the_configuration_never_imports_torch():
    modules = "load, components, render, checks, peer, redaction, shipped"
    code = f"""
import sys
from dataflex_pipeline.config import {modules}
load.load_config(None, [])
render.commented_yaml()
heavy = {{"torch", "transformers", "trl", "peft", "datasets", "numpy", "pyarrow"}} & set(sys.modules)
assert not heavy, heavy
"""
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert ran.returncode == 0, ran.stderr


def test_whole_numbers_of_methods_have_32_bits_where_they_count():
    class Mine(Params):
        seed: int = 0
        rows: int = Field(1, ge=1)
        tokens: int = Field(1, ge=1, le=10**12)

    assert Mine(seed=2**63, rows=LARGEST, tokens=10**12).seed == 2**63
    with pytest.raises(ValidationError, match="at most 2147483647"):
        Mine(rows=LARGEST + 1)
