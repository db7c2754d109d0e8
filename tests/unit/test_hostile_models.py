"""Chat templates that never end or write gigabytes, and model files that hold nonsense: one error each."""

import json
import math
import shutil
import subprocess
import sys
from unittest import mock

import pytest
from data_fixtures import SPECIAL, alpaca_rows, byte_tokenizer, rows_of

from dataflex_pipeline.config.load import load_config
from dataflex_pipeline.data.chat import trial
from dataflex_pipeline.data.chat.labelled import ChatFormat
from dataflex_pipeline.errors import ConfigError, DataError, UserError
from dataflex_pipeline.models import adapter_values
from dataflex_pipeline.models.adapter_values import endless_pattern
from dataflex_pipeline.models.attached import read_configuration
from dataflex_pipeline.models.quantized import own_method
from dataflex_pipeline.models.source import check_model_folder, explained

TURNS = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.fixture
def quick(monkeypatch):
    """Limits that a test can wait for."""
    monkeypatch.setattr(trial, "SECONDS", 1)
    monkeypatch.setattr(trial, "ROOM", 1 << 28)


@pytest.mark.parametrize(
    ("hostile", "told"),
    [
        (LOOPS, "did not end"),
        ("{% if messages|length > 4 %}" + LOOPS + "{% endif %}", "did not end"),
        ("{{ 'a' * 3000000000 }}", "memory"),
        ("{{ 'a'|center(3000000000) }}", "memory"),
        (
            "{% set n = namespace(a='a') %}{% for i in range(60) %}{% set n.a = n.a ~ n.a %}{% endfor %}",
            "memory",
        ),
        ("{{ 'a' * 20000000 }}", "For 1 short turns the chat template writes 20,000,"),
    ],
)
def test_a_template_is_ended_by_the_system(tmp_path, quick, hostile, told):
    with pytest.raises(ConfigError, match="chat template of the model's tokenizer cannot be used") as caught:
        ChatFormat(byte_tokenizer(tmp_path, hostile + TURNS), None)
    assert told in caught.value.why


@pytest.mark.parametrize(
    ("hostile", "told"),
    [
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "recursion"),
        ("{% for i in range(1000000) %}{% endfor %}", "Range too big"),
        ("{{ messages[99].content.x }}", "refuses the row"),
        ("{{ foo(", "unexpected"),
        ("{{ raise_exception(messages[0].content * 1000) }}", "refuses the row"),
    ],
)
def test_what_a_template_raises_is_the_reason_of_its_rows(tmp_path, hostile, told):
    with pytest.raises(DataError, match="None of the 3 rows") as caught:
        rows_of(tmp_path, alpaca_rows(3), template=TURNS + hostile)
    assert told in caught.value.why
    assert len(caught.value.why) < 1200


def test_a_row_that_a_template_writes_too_much_of_is_not_valid(tmp_path, monkeypatch):
    monkeypatch.setattr(trial, "LONGEST_TEXT", 2000)
    template = TURNS + "{% if 'question 1' in messages[0].content %}{{ 'a' * 3000 }}{% endif %}"
    _, rows, _ = rows_of(tmp_path, alpaca_rows(3), template=template)
    assert [row["valid"] for row in rows] == [True, False, True]
    assert "writes 3," in rows[1]["reason"]


def test_a_row_that_a_template_never_ends_on_is_not_valid(tmp_path, quick):
    template = TURNS + "{% if 'question 1' in messages[0].content %}" + LOOPS + "{% endif %}"
    _, rows, _ = rows_of(tmp_path, alpaca_rows(3), template=template)
    assert [row["valid"] for row in rows] == [True, False, True]
    assert "it takes longer" in rows[1]["reason"]


@pytest.mark.parametrize("template", [[1, 2], 7, {"default": 5}, [{"name": "rag", "template": TURNS}]])
def test_a_template_that_is_no_text(tmp_path, template):
    byte_tokenizer(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    with pytest.raises(ConfigError):
        ChatFormat.load(str(tmp_path), None)


def test_a_template_among_several_is_taken_by_its_name(tmp_path):
    byte_tokenizer(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    several = [{"name": "default", "template": TURNS}, {"name": "rag", "template": LOOPS}]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": several}))
    assert SPECIAL[0] in ChatFormat.load(str(tmp_path), None).probe()[0]


def configured(folder, content) -> None:
    (folder / "config.json").write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "null",
        "{",
        "[" * 100_000,
        {"hidden_size": -1},
        {"hidden_size": "64"},
        {"hidden_size": 64.5},
        {"hidden_size": True},
        {"num_hidden_layers": 10**9},
        {"vocab_size": 10**13},
        {"text_config": {"hidden_size": 0}},
        {"text_config": [1]},
        {"return_dict": False},
    ],
)
def test_a_configuration_whose_sizes_are_none(tmp_path, content):
    configured(tmp_path, content)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UserError, match=r"config\.json cannot be used") as caught:
        check_model_folder(tmp_path)
    assert caught.value.exit_code == 2
    with pytest.raises(UserError, match=r"config\.json cannot be used"):
        own_method(load_config(None, [f"model_name_or_path={tmp_path}"]).config)


def test_weights_that_are_no_file(tmp_path):
    configured(tmp_path, {"hidden_size": 64, "head_dim": None})
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(UserError, match=r"no \*\.safetensors file"):
        check_model_folder(tmp_path)
    shutil.rmtree(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").touch()
    check_model_folder(tmp_path)


@pytest.mark.parametrize("content", ["[]", "null", "{", "[" * 100_000, '{"peft_type": 5}', "\udcff"])
def test_an_adapter_configuration_that_is_none(tmp_path, content):
    (tmp_path / "adapter_config.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=r"adapter_config\.json|of the kind 5"):
        read_configuration(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("r", -1),
        ("r", "8"),
        ("r", True),
        ("r", 10**13),
        ("lora_alpha", "x"),
        ("lora_alpha", math.inf),
        ("lora_alpha", 10**400),
        ("lora_dropout", -1),
        ("target_modules", "("),
        ("target_modules", [5]),
        ("rank_pattern", {"q_proj": 0}),
        ("rank_pattern", {"(": 8}),
        ("alpha_pattern", []),
        ("layers_to_transform", "a"),
        ("bias", "some"),
    ],
)
def test_a_value_of_an_adapter_configuration_that_cannot_be(tmp_path, key, value):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", key: value}))
    with pytest.raises(UserError, match=f"cannot be used: {key} (is|has)") as caught:
        read_configuration(tmp_path)
    assert len(caught.value.what) < 400


def test_a_pattern_of_an_adapter_that_never_ends(monkeypatch):
    monkeypatch.setattr(adapter_values, "SECONDS", 1)
    names = [f"model.layers.{number}.self_attn.q_proj" for number in range(8)]
    usual = {"target_modules": r".*layers\.\d+\..*q_proj", "rank_pattern": {"q_proj": 8, "layers.3.*": 4}}
    assert endless_pattern(usual, names) is None
    assert endless_pattern({"target_modules": "(.*)*(.*)*(.*)*x"}, names) == "target_modules"


@pytest.mark.parametrize("error", [AttributeError("x"), TypeError(), IndexError("y"), ZeroDivisionError("z")])
def test_whatever_the_libraries_raise_on_a_model_is_told(error):
    with pytest.raises(UserError, match="could not be loaded"), explained("m", "weights"):
        raise error


def test_a_tokenizer_that_fails_when_it_is_asked(tmp_path):
    tokenizer = byte_tokenizer(tmp_path, TURNS)

    def fails(*_: object, **__: object) -> None:
        raise Exception("Missing [UNK] token from the vocabulary")

    with (
        mock.patch.object(type(tokenizer), "__call__", fails),
        pytest.raises(ConfigError, match="tokenizer cannot be used") as caught,
    ):
        ChatFormat(tokenizer, None)
    assert "Missing [UNK]" in caught.value.why


def test_the_timer_of_rows_never_ends_a_process_that_is_leaving():
    code = (
        "import atexit, time\n"
        "def busy():\n"
        "    end = time.process_time() + 1.5\n"
        "    while time.process_time() < end: pass\n"
        "class Late:\n"
        "    def __del__(self, busy=busy): busy()\n"
        "late = Late()\n"
        "from dataflex_pipeline.limited import within\n"
        "with within(5): pass\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
