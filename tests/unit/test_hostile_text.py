"""Names that would be paths, secrets and control characters: none gets out of the program, or into a file."""

import json
from pathlib import Path

import pytest

from dataflex_pipeline.config.names import LONGEST, check_name
from dataflex_pipeline.config.overrides import override_layers
from dataflex_pipeline.config.redaction import HIDDEN, redacted, redacted_source
from dataflex_pipeline.errors import ConfigError, UserError
from dataflex_pipeline.reports.methods import describe_methods
from dataflex_pipeline.store.chosen_files import check_folder, check_free
from dataflex_pipeline.terminal import console

UNSEEN = ["\x1b[2J", "\x07", "\x9b", "\u202e", "\u2066", "\x7f", "\r", "\ud800"]


@pytest.mark.parametrize("name", ["less", "top-5.v2", "我的方法", "a" * LONGEST, "7b_run"])
def test_names_that_people_give(name):
    assert check_name(name, "A method") == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../x",
        "a/b",
        "a\\b",
        ".hidden",
        "-m",
        "a b",
        "a\x00b",
        "a\n",
        "\u202eabc",
        "a" * 101,
        "我" * 40,
    ],
)
def test_names_that_a_path_would_read_otherwise(name):
    with pytest.raises(ConfigError) as caught:
        check_name(name, "A method (my.yaml, line 3)")
    assert caught.value.what.startswith("A method (my.yaml, line 3) is named ")
    assert len(caught.value.what) < 200


def test_a_method_of_such_a_name_is_refused_where_it_is_read(tmp_path):
    (tmp_path / "components.yaml").write_text("../../victim: {name: loss}\n")
    config = tmp_path / "run.yaml"
    config.write_text("components_cfg_file: components.yaml\ncomponent_name: ../../victim\n")
    with pytest.raises(ConfigError, match=r"components\.yaml, line 1.*is named '../../victim'"):
        describe_methods(config=config)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("https://me:pa55@example.org/x", "example.org/x"),
        ("see s3://key:pa55@bucket and http://u@h", "bucket"),
    ],
)
def test_an_address_is_shown_without_its_user(text, kept):
    shown = redacted(text)
    assert "pa55" not in shown
    assert kept in shown
    assert redacted("no@address, https://plain.org/a@b") == "no@address, https://plain.org/a@b"


@pytest.mark.parametrize("text", ["{api: {api_key: pa55, x: [}", "{'password': 'pa55'", "{secret: pa55,"])
def test_broken_yaml_is_repeated_without_secrets(text):
    assert "pa55" not in redacted_source(text)
    with pytest.raises(ConfigError) as caught:
        override_layers([f"source_quotas={text}"])
    assert "pa55" not in str(caught.value)


def test_what_an_error_repeats_names_variables_and_hides_values():
    for kept in ("api.api_key: DF_API_KEY names", "api_key: null", f"api_key: {HIDDEN}", "a password: ."):
        assert redacted_source(kept) == kept
    assert redacted_source('bf16: {"x": "api_key: pa55"}') == f'bf16: {{"x": "api_key: {HIDDEN}}}'


def test_the_list_of_parameters_shows_no_secret(tmp_path):
    (tmp_path / "components.yaml").write_text(
        "nice: {params: {reward_backend_params: {api: {api_key: pa55}}}}\n"
    )
    config = tmp_path / "run.yaml"
    config.write_text("components_cfg_file: components.yaml\n")
    assert "pa55" not in json.dumps(describe_methods("nice", config), default=str)


@pytest.mark.parametrize("hostile", UNSEEN)
def test_no_control_character_is_printed(hostile, capsys, monkeypatch):
    monkeypatch.setattr(console, "out", console.Console(highlight=False, soft_wrap=True))
    monkeypatch.setattr(console, "err", console.Console(stderr=True, highlight=False, soft_wrap=True))
    console.line(f"a{hostile}b")
    console.print_table(f"t{hostile}", [f"c{hostile}"], [[f"x{hostile}y\tz\nw"]], wraps="")
    console.fail(UserError(f"what{hostile}", f"why{hostile}", f"fix{hostile}"))
    printed = capsys.readouterr()
    text = printed.out + printed.err
    assert hostile[0] not in text
    assert text.count(f"\\u{ord(hostile[0]):04x}") == 7
    assert "x" in text
    assert "y\\tz\\nw" in text


def test_an_error_shows_the_beginning_of_what_is_long(capsys, monkeypatch):
    monkeypatch.setattr(console, "err", console._console(stderr=True))
    console.fail(UserError("a" * 5000, "b " * 9000, "See /a/folder/of/theirs."))
    text = capsys.readouterr().err
    assert "a" * 300 + "..." in text
    assert len(text) < 5000
    assert "/a/folder/of/theirs." in text


def test_what_json_shows_is_still_the_same_value():
    value = {"a\u202e": "b\x9b\x1b"}
    assert json.loads(console.visible(json.dumps(value, ensure_ascii=False))) == value


def test_a_file_is_never_written_over_what_is_not_ours(tmp_path):
    mine = tmp_path / "mine.html"
    check_free(mine, lambda file: False)
    mine.write_text("my page")
    with pytest.raises(UserError, match="exists, and holds something else"):
        check_free(mine, lambda file: False)
    check_free(mine, lambda file: True)
    with pytest.raises(UserError, match="a folder, a device or a pipe"):
        check_free(tmp_path, lambda file: True)
    with pytest.raises(UserError, match="There is no folder"):
        check_free(tmp_path / "no" / "x.html", lambda file: True)
    link = tmp_path / "link.html"
    link.symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="exists, and holds something else"):
        check_free(link, lambda file: True)


@pytest.mark.parametrize(
    ("place", "told"),
    [
        ("/proc/x.html", "Nothing can be made there"),
        ("/dev/full", "a folder, a device or a pipe"),
        ("x" * 250, "250 bytes"),
    ],
)
def test_a_place_that_takes_no_file_is_told_beforehand(tmp_path, monkeypatch, place, told):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        check_folder(Path(place))
    assert told in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_nor_among_the_files_of_a_run(tmp_path):
    run = tmp_path / "run"
    (run / "round-01").mkdir(parents=True)
    (run / "run.yaml").write_text("{}\n")
    check_folder(run / "page.html")
    with pytest.raises(UserError, match="in a folder of the run"):
        check_folder(run / "round-01" / "page.html")
