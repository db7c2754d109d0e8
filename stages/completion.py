"""Completion of runs, methods and settings in the shell. Nothing heavy is imported, and no error is shown."""

from __future__ import annotations

from pathlib import Path


def complete_run(incomplete: str) -> list[str]:
    """Return the names of runs below runs_dir that begin so."""
    from dataflex_pipeline.config.fields import Config

    folder = Path(Config().runs_dir)
    if not folder.is_dir():
        return []
    return sorted(
        each.name
        for each in folder.iterdir()
        if each.name.startswith(incomplete) and (each / "run.yaml").is_file()
    )


def complete_method(incomplete: str) -> list[str]:
    """Return the names of shipped methods that begin so."""
    from dataflex_pipeline.methods import shipped_methods

    return [name for name in shipped_methods() if name.startswith(incomplete)]


def complete_setting(incomplete: str) -> list[str]:
    """Return the configuration keys that begin so, each with its equals sign."""
    from dataflex_pipeline.config.fields import Config

    return sorted(f"{key}=" for key in Config.model_fields if key.startswith(incomplete))


def complete_method_argument(incomplete: str) -> list[str]:
    """Return the methods and the settings that begin so."""
    return [*complete_method(incomplete), *complete_setting(incomplete)]


def complete_argument(incomplete: str) -> list[str]:
    """Return the runs and the settings that begin so."""
    return [*complete_run(incomplete), *complete_setting(incomplete)]
