"""The list of packages in pyproject.toml against the folders."""

import tomllib
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def test_every_package_is_listed():
    listed = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
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
