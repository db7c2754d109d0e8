"""Splits that the README.md of a folder declares: the ``configs`` of the Hugging Face hub.

The header of such a README.md lists configs, each with the patterns of the files of its splits
(``data_files``), or with a folder of its own (``data_dir``). They are followed as `datasets` does, by its own
patterns: without a config's name the one that is called default, says ``default: true``, or is the only one.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataflex_pipeline.config.yaml_files import parse_value
from dataflex_pipeline.data.sources.readers import READERS, is_data
from dataflex_pipeline.errors import ConfigError, DataError, did_you_mean

README = "README.md"
_HEADER = re.compile(r"\s*---\s*\n(.*?)\n---\s*(\n|$)", re.DOTALL)
_PLACES = ("data_files", "data_dir")
_KNOWN = frozenset({*_PLACES, "config_name", "default", "description", "version", "features"})


@dataclass(frozen=True)
class FolderConfig:
    """One config of a folder.

    Attributes:
        name: its name. of_split: the files of each split, in order. others: names of the other configs.
        unused: what it sets beside its files, which changes how `datasets` reads them.
    """

    name: str
    of_split: Mapping[str, tuple[Path, ...]]
    others: tuple[str, ...]
    unused: tuple[str, ...]


def has_configs(folder: Path) -> bool:
    """Whether the README.md of a folder says where the files of its splits are.

    Raises:
        DataError: its header cannot be read.
    """
    return bool(_configs(folder))


def folder_config(folder: Path, given: str, subset: str | None) -> FolderConfig | None:
    """Return the config that is meant; None where README.md has none.

    Args:
        folder: with the README.md. given: what the user wrote. subset: name of the config.

    Raises:
        DataError: there is no such config, none is named where one has to be, or it cannot be followed.
    """
    configs = _configs(folder)
    if not configs:
        return None
    name = _default(folder, given, configs) if subset is None else subset
    if name not in configs:
        raise DataError(
            f"dataset '{given}': subset is {name}, and {folder / README} has no config "
            f"'{name}'.{did_you_mean(name, configs)}",
            f"Its configs are {', '.join(configs)}.",
            "Correct subset in its entry of dataset_info.json, or take it out.",
        )
    config = configs[name]
    others = tuple(other for other in configs if other != name)
    return FolderConfig(name, _of_split(folder, name, config), others, tuple(sorted(config.keys() - _KNOWN)))


def _configs(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the configs by name; empty where none of them says where files are."""
    path = folder / README
    if not path.is_file():
        return {}
    header = _HEADER.match(path.read_text(encoding="utf-8", errors="replace").removeprefix("\ufeff"))
    if header is None or re.search(r"^configs\s*:", header.group(1), re.MULTILINE) is None:
        return {}
    try:
        listed = parse_value(header.group(1), "its header")["configs"] or []
    except ConfigError as error:
        raise _unusable(folder, error.what.rstrip(".")) from error
    except (TypeError, KeyError) as error:
        raise _unusable(folder, "its header is no mapping with configs") from error
    if not isinstance(listed, list) or not all(isinstance(each, dict) for each in listed):
        raise _unusable(folder, "configs is not a list of objects")
    if not any(each.get(key) for each in listed for key in _PLACES):
        return {}
    if not all("config_name" in each for each in listed):
        raise _unusable(folder, "a config has no config_name")
    return {str(each["config_name"]): each for each in listed}


def _default(folder: Path, given: str, configs: Mapping[str, Mapping[str, Any]]) -> str:
    found = [
        name
        for name, each in configs.items()
        if len(configs) == 1 or name == "default" or each.get("default")
    ]
    if len(found) == 1:
        return found[0]
    several = f"{', '.join(found)} are all the default one" if found else "none is the default one"
    first = next(iter(configs))
    raise DataError(
        f"dataset '{given}' is the folder {folder}, whose {README} has the configs {', '.join(configs)}.",
        f"Which of them is meant is not said: {several}.",
        f"Name one with subset in an entry of dataset_info.json: file_name: {folder}, subset: {first}.",
    )


def _of_split(folder: Path, name: str, config: Mapping[str, Any]) -> dict[str, tuple[Path, ...]]:
    """Return the files of each split of a config, by the patterns of `datasets`."""
    from datasets.data_files import get_data_patterns, sanitize_patterns

    base = folder / str(config.get("data_dir") or "")
    try:
        if config.get("data_files"):
            patterns = sanitize_patterns(config["data_files"])
        else:
            patterns = get_data_patterns(str(base))
    except (ValueError, TypeError, FileNotFoundError) as error:
        raise _unusable(folder, f"config '{name}': {' '.join(str(error).split())}") from error
    return {str(split): _matches(folder, base, name, str(split), each) for split, each in patterns.items()}


def _matches(folder: Path, base: Path, name: str, split: str, patterns: list[str]) -> tuple[Path, ...]:
    from datasets.data_files import resolve_pattern

    found: dict[Path, None] = {}
    for pattern in patterns:
        if "://" in str(pattern):
            raise _unusable(folder, f"config '{name}', split {split}: {pattern} is not in this folder")
        try:
            files = [Path(file) for file in resolve_pattern(str(pattern), str(base))]
        except FileNotFoundError as error:
            if glob.has_magic(str(pattern)) and len(patterns) > 1:
                continue
            why = f"config '{name}', split {split}: no file matches {pattern}"
            raise _unusable(folder, why) from error
        other = [file.name for file in files if not is_data(file)]
        if other:
            kinds = ", ".join(READERS)
            raise _unusable(folder, f"config '{name}', split {split}: {other[0]} is none of {kinds}")
        found |= dict.fromkeys(files)
    if not found:
        raise _unusable(folder, f"config '{name}', split {split}: no file matches {', '.join(patterns)}")
    return tuple(found)


def _unusable(folder: Path, why: str) -> DataError:
    return DataError(
        f"{folder / README} cannot be followed: {why}.",
        "Its configs say which files of the folder are which split, and other tools read it so.",
        f"Correct configs in {README}, or give the data files themselves.",
    )
