"""Reading and writing YAML: numbers, booleans, duplicates, broken files, and the round trip."""

import math

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dataflex_pipeline.config.overrides import override_layers
from dataflex_pipeline.config.yaml_files import dump_yaml, parse_value, read_yaml
from dataflex_pipeline.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        ("-1e3", -1000.0),
        ("1.0e-4", 1e-4),
        ("1.", 1.0),
        (".5", 0.5),
        ("5e-1", 0.5),
        ("-.inf", -math.inf),
        ("0", 0),
        ("-12", -12),
        ("1_000", 1000),
        ("0x10", 16),
        ("true", True),
        ("No", False),
        ("null", None),
        ("", None),
        ("~", None),
        # text, where PyYAML makes something else of it
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("007", "007"),
        ("e5", "e5"),
        ("1e", "1e"),
        (".", "."),
        ("-", [None]),
        ("1.2.3", "1.2.3"),
        ("'1e-4'", "1e-4"),
        ("[1e-4, a]", [1e-4, "a"]),
        ("{a: 1}", {"a": 1}),
    ],
)
def test_scalars(text, value):
    found = parse_value(text, "x")
    assert found == value
    assert type(found) is type(value)


def test_anchors_and_merge_keys(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("a: &x {p: 1, q: 2}\nb:\n  <<: *x\n  q: 3\n")
    layer = read_yaml(path, "a.yaml")
    assert layer.values == {"a": {"p": 1, "q": 2}, "b": {"p": 1, "q": 3}}
    assert layer.place("b", "q") == "a.yaml, line 4"
    assert layer.place("nowhere") == "a.yaml"


@pytest.mark.parametrize(
    ("content", "what", "why"),
    [
        (b"a: 1\nb: 2\na: 3\n", "x.yaml, line 3: a is given twice, first in line 1.", "Only one"),
        (b"m:\n  p: 1\n  p: 2\n", "x.yaml, line 3: m.p is given twice, first in line 2.", "Only one"),
        (b"a: {b: 1, b: 1}\n", "x.yaml, line 1: a.b is given twice", "Only one"),
        (b"a: [1\nb: 2\n", "x.yaml, line 2, column 2: this is not valid YAML.", "The parser says"),
        (b"a:\n\t- b\n", "x.yaml, line 2, column 1: this is not valid YAML.", "The parser says"),
        (b"a: b: c\n", "x.yaml, line 1, column 5: this is not valid YAML.", "mapping values"),
        (b"a: *b\n", "x.yaml, line 1, column 4: this is not valid YAML.", "undefined alias"),
        (b"a: 1\n---\nb: 2\n", "x.yaml, line 2, column 1: this is not valid YAML.", "document"),
        (b"a: !!python/object/apply:os.getcwd []\n", "x.yaml, line 1", "could not determine a constructor"),
        (b"a: !!int b\n", "x.yaml holds a value that does not fit its type", "tag"),
        (b"a: !!bool b\n", "x.yaml holds a value that does not fit its type", "tag"),
        (b"a: " + b"9" * 5000, "x.yaml holds a value that does not fit its type", "thousands of digits"),
        (b"a: \x00\n", "x.yaml: this is not valid YAML.", "unacceptable character"),
        (b"? [a, b]\n: 1\n", "x.yaml, line 1, column 3: this is not valid YAML.", "unhashable key"),
        (b"a: &a [*a]\n", "x.yaml, line 1: a value holds itself.", "never ends"),
        (b"[" * 20000, "x.yaml is nested too deeply.", "cannot be read"),
        (b"- a\n- b\n", "x.yaml holds a list.", "mapping of keys"),
        (b"just text\n", "x.yaml holds a single value.", "mapping of keys"),
        (b"a: \xff\xfe\n", "x.yaml was given as a configuration file.", "not UTF-8 text (byte 3)"),
    ],
)
def test_broken_files(tmp_path, content, what, why):
    path = tmp_path / "x.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_yaml(path, "x.yaml")
    assert caught.value.what.startswith(what)
    assert why in caught.value.why
    assert caught.value.fix


def test_missing_files_and_folders(tmp_path):
    for path, why in (
        (tmp_path / "none.yaml", "There is no such file."),
        (tmp_path, "It is a folder."),
        (tmp_path / ("x" * 300), "It cannot be read"),
    ):
        with pytest.raises(ConfigError) as caught:
            read_yaml(path)
        assert caught.value.what == f"{path} was given as a configuration file."
        assert why in caught.value.why


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_bytes(b"\xef\xbb\xbfa: \xe4\xb8\xad\n")
    assert read_yaml(path).values == {"a": "中"}


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False),
    st.text(),
    st.from_regex(r"[-+.0-9eE_:]{1,8}"),
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(min_size=1), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.from_regex(r"[a-z_]{1,10}", fullmatch=True), values, max_size=4))
def test_what_is_written_reads_back_here_and_with_plain_pyyaml(tmp_path_factory, content):
    text = dump_yaml(content)
    assert parse_value(text, "x") == (content or {})
    assert yaml.safe_load(text) == (content or {})


def test_keys_are_text_as_they_are_written(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("null: 1\ntrue: 2\n1.0: {on: 3}\n")
    layer = read_yaml(path)
    assert layer.values == {"null": 1, "true": 2, "1.0": {"on": 3}}
    assert layer.place("1.0", "on") == f"{path}, line 3"


def test_a_long_number_on_the_command_line_is_cut_in_its_error():
    with pytest.raises(ConfigError) as caught:
        override_layers([f"seed={'9' * 5000}"])
    assert len(str(caught.value)) < 600
