"""Files of the user's own: as they are now, without a cache, and found by what looks annotations up."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from dataflex_pipeline.own_code import in_one_line, load_module, load_source, own_error


@pytest.fixture
def own_file(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    return tmp_path / "mine.py"


def test_a_file_of_the_same_size_changed_within_the_same_second_is_read_anew(own_file):
    for value in (1, 2):
        own_file.write_text(f"VALUE = {value}\n")
        os.utime(own_file, (1_700_000_000, 1_700_000_000))
        found = load_source("mine", own_file).VALUE
        assert found == value
    assert [path.name for path in own_file.parent.iterdir()] == ["mine.py"]


def test_annotations_find_their_meaning(own_file):
    own_file.write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "from typing import ClassVar, Literal\n"
        "from pydantic import BaseModel\n"
        "@dataclass\n"
        "class State:\n"
        "    shared: ClassVar[int] = 3\n"
        "    rows: int = 0\n"
        "class Params(BaseModel):\n"
        "    side: Literal['left', 'right'] = 'left'\n"
    )
    module = load_source("mine", own_file)
    assert module.State(5).rows == 5
    assert module.Params(side="right").side == "right"


def test_a_file_that_fails_leaves_nothing_behind(own_file):
    own_file.write_text("raise RuntimeError('no')\n")
    with pytest.raises(RuntimeError, match="no"):
        load_source("dataflex_method_failing", own_file)
    assert "dataflex_method_failing" not in sys.modules
    with pytest.raises(ImportError, match="no Python file"):
        load_source("dataflex_method_missing", own_file.parent / "other.py")


def test_an_error_of_a_file_is_told_with_its_line(own_file):
    own_file.write_text(
        "def half(rows):\n    return rows['no'] / 2\n\n\ndef leave():\n    raise SystemExit(0)\n"
    )
    module = load_source("mine", own_file)
    for call, line, said in (
        (lambda: module.half({}), 2, "KeyError: 'no' (line 2: return rows['no'] / 2)"),
        (lambda: module.leave(), 6, "SystemExit: 0 (line 6: raise SystemExit(0))"),
    ):
        with pytest.raises((KeyError, SystemExit)) as caught:
            call()
        assert in_one_line(caught.value) == said
        assert own_error(caught.value).what == f"{own_file}, line {line}: {said}."
    with pytest.raises(KeyError) as caught:
        {}["no"]
    assert own_error(caught.value) is None


def test_a_file_that_ends_the_program_cannot_be_imported(own_file):
    own_file.write_text("import sys\nsys.exit(0)\n")
    with pytest.raises(ImportError, match=r"SystemExit: 0 \(line 2: sys.exit\(0\)\)"):
        load_source("mine", own_file)


def test_an_error_below_a_call_of_this_program_is_not_the_files_at_once(own_file):
    """A full disk while a reward is written down is the disk's, though the file called for it."""
    own_file.write_text("def own():\n    open('/nothing/here')\n\n\ndef ours(keep):\n    keep()\n")
    module = load_source("mine", own_file)

    def ours():
        load_source("gone", own_file.parent / "gone.py")

    for call, at_once in ((module.own, True), (lambda: module.ours(ours), False)):
        with pytest.raises((OSError, ImportError)) as caught:
            call()
        assert (own_error(caught.value, at_once=True) is not None) is at_once
        assert own_error(caught.value) is not None


def test_an_error_whose_text_fails_or_never_ends(own_file):
    own_file.write_text(
        "class Odd(Exception):\n    def __str__(self):\n        return {}['no']\n\n\n"
        "def odd():\n    raise Odd\n\n\ndef endless():\n    raise ValueError('x' * 10_000)\n"
    )
    module = load_source("mine", own_file)
    for call, said in ((module.odd, "Odd (line 7: raise Odd)"), (module.endless, "ValueError: xxx")):
        with pytest.raises((module.Odd, ValueError)) as caught:
            call()
        assert in_one_line(caught.value).startswith(said)
        assert len(in_one_line(caught.value)) < 400


def test_a_file_that_changes_the_working_directory_is_refused_and_it_is_put_back(own_file, monkeypatch):
    monkeypatch.chdir(own_file.parent)
    for text, raised in (("os.chdir('/')", ImportError), ("os.chdir('/')\n1 / 0", ZeroDivisionError)):
        own_file.write_text(f"import os\n{text}\n")
        with pytest.raises(raised):
            load_source("mine", own_file)
        assert os.getcwd() == str(own_file.parent)  # noqa: PTH109 (what the system says)


def test_a_module_of_ones_own_is_told_with_its_line_too(own_file, monkeypatch):
    own_file.with_name("mine_module.py").write_text("def half():\n    return 1 / 0\n")
    own_file.with_name("mine_leaving.py").write_text("raise SystemExit(0)\n")
    monkeypatch.syspath_prepend(own_file.parent)
    with pytest.raises(ZeroDivisionError) as caught:
        load_module("mine_module").half()
    assert "mine_module.py, line 2" in own_error(caught.value).what
    with pytest.raises(ImportError, match="SystemExit"):
        load_module("mine_leaving")
    for name in ("", ".relative"):
        with pytest.raises(ImportError, match="full name"):
            load_module(name)


@pytest.mark.parametrize(
    ("closing", "told"),
    [
        ("sys.stdout.close()", "error: The stream of standard output was closed: "),
        ("os.close(1)", "error: The stream of standard output was closed: "),
        ("sys.stderr.close()", ""),  # nobody can be told
        ("sys.stdout.close(), sys.stderr.close()", ""),
    ],
)
def test_a_file_that_closes_what_is_printed_to_ends_the_command_in_words(closing, told):
    program = (
        "import os, sys, typer\n"
        "from dataflex_pipeline.process.exits import exit_code\n"
        f"def command():\n    {closing}\n    for number in range(9999):\n"
        "        typer.echo('done' * 99)\n        typer.echo('note', err=True)\n"
        "sys.exit(exit_code(command))\n"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ran.returncode == 2, ran.stderr
    assert ran.stderr.replace("note\n", "").startswith(told)
    assert "Traceback" not in ran.stderr
    assert "Exception ignored" not in ran.stderr
