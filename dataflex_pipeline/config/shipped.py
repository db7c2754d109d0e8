"""The configuration files that come with the package."""

from __future__ import annotations

from pathlib import Path

from dataflex_pipeline.errors import ConfigError

_PACKAGE = Path(__file__).resolve().parents[1]


def shipped_configs() -> Path:
    """Return the folder of the shipped configurations: inside a wheel, or at the top of a checkout.

    Raises:
        ConfigError: the installation lacks it.
    """
    for folder in (_PACKAGE / "configs", _PACKAGE.parent / "configs"):
        if (folder / "quickstart.yaml").is_file():
            return folder
    raise ConfigError(
        f"The shipped configurations are not in {_PACKAGE / 'configs'}.",
        "The package was not installed whole.",
        "Install dataflex-pipeline again.",
    )
