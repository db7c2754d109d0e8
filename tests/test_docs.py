"""The documentation: it builds without a warning, and every command in it is one that can be given."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from dataflex_pipeline.config.fields import Config
from dataflex_pipeline.methods import method_class, shipped_methods
from stages import cli

REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = [*REPOSITORY.glob("README*.md"), *sorted((REPOSITORY / "docs").rglob("*.md"))]
LAUNCHED = " -m -- stages.cli "


def shell_lines():
    """Yield (page, command line) of every bash block, continued lines joined, comments dropped."""
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words:
                    yield page.relative_to(REPOSITORY).as_posix(), words


def dataflex_commands():
    for page, words in shell_lines():
        text = shlex.join(words)
        if words[0] == "dataflex":
            yield pytest.param(words[1:], id=f"{page}: {text[:70]}")
        elif LAUNCHED in text:
            yield pytest.param(shlex.split(text.split(LAUNCHED)[1]), id=f"{page}: {text[:70]}")


def make_commands():
    return [
        pytest.param(words, id=f"{p}: {shlex.join(words)}")
        for p, words in shell_lines()
        if words[0] == "make"
    ]


@pytest.mark.parametrize("words", dataflex_commands())
def test_a_dataflex_command_can_be_given(words):
    group = typer.main.get_command(cli.app)
    command = group.commands[words[0]]
    context = command.make_context(words[0], words[1:])  # parses, runs nothing
    given = [*(context.params.get("settings") or []), *(context.params.get("arguments") or [])]
    for text in given:
        key, equals, _ = text.partition("=")
        if not equals:
            continue
        method, dot, parameter = key.partition(".")
        if dot and method in shipped_methods():
            assert parameter.split(".")[0] in method_class(method).Params.model_fields, text
        elif not dot or method not in ("shortest", "my_method"):
            assert method in Config.model_fields, text


@pytest.mark.parametrize("words", make_commands())
def test_a_make_command_can_be_given(words):
    text = [word for word in words if word != "-n"]
    ran = subprocess.run([*text, "-n"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def test_the_pages_build_without_a_warning_and_with_their_tables(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    ran = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")
    pages = [path.read_text(encoding="utf-8") for path in tmp_path.rglob("*.html")]
    assert not any("<!-- parameters" in page or "<!-- columns" in page for page in pages)
    less = (tmp_path / "methods" / "less" / "index.html").read_text(encoding="utf-8")
    assert all(f"less.{name}" in less for name in method_class("less").Params.model_fields)


def test_every_method_has_a_page():
    assert {path.stem for path in (REPOSITORY / "docs" / "methods").glob("*.md")} >= set(shipped_methods())
