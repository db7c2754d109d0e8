"""The lists of packages and of tests in pyproject.toml against the folders."""

import tomllib
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


TOOLS = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["tool"]


def test_every_folder_of_tests_is_listed():
    folders = {
        path.parent.relative_to(REPOSITORY).as_posix() for path in REPOSITORY.glob("tests/*/test_*.py")
    }
    assert set(TOOLS["pytest"]["ini_options"]["testpaths"]) == folders


def test_every_package_is_listed():
    listed = TOOLS["setuptools"]["packages"]
    code = {
        ".".join(path.parent.relative_to(REPOSITORY).parts)
        for path in (REPOSITORY / "dataflex_pipeline").rglob("__init__.py")
    }
    configs = {
        ".".join(("dataflex_pipeline", *path.relative_to(REPOSITORY).parts))
        for path in [REPOSITORY / "configs", *(REPOSITORY / "configs").iterdir()]
        if path.is_dir()
    }
    assert sorted(listed) == sorted(code | configs | {"dataflex_pipeline.stages"})
