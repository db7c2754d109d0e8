"""The parameters of methods: components.yaml, and the configuration's ``methods`` over it.

An entry is ``NAME: {name: IMPLEMENTATION, params: {...}}``, at top level or under ``selectors:``; an entry of
a user's own method also has ``file:`` (a Python file, relative to the components file) or ``module:``.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataflex_pipeline.config.candidates import candidate_rule
from dataflex_pipeline.config.fields import Config
from dataflex_pipeline.config.names import check_name
from dataflex_pipeline.config.peer import shipped_in_place_of
from dataflex_pipeline.config.shipped import shipped_configs
from dataflex_pipeline.config.yaml_files import Layer, read_yaml
from dataflex_pipeline.errors import ConfigError, did_you_mean

COMMON = ("seed", "save_interval", "cache_dir")
"""Parameters that every method takes, next to its own."""
_ENTRY_KEYS = ("name", "params", "file", "module")
_SECTION = "selectors"
PASSED_OVER_SECTIONS = {
    "mixers": "source_quotas sets fixed shares of the data sets",
    "weighters": "weights sets what a selected row weighs",
    "reorders": "order puts a round's rows in order by score",
    "reorderers": "order puts a round's rows in order by score",
    "pipelines": "a method is one component here",
}
"""Sections of the peer's newer components.yaml that hold no methods; what there is here instead."""
PASSED_OVER_PARAMETERS = {
    "score_batch_size": "score_batch_tokens is how much is scored at a time, for all methods",
    "score_num_workers": "scoring reads prepared rows and has no loader processes",
}
"""Parameters of the peer's newer selectors that only say how fast they score."""
_NEAR_INDICES = "near finds the neighbours itself; strategy: round_robin takes them in turns"
_SHIPPED_LABEL = "configs/components.yaml"


@dataclass(frozen=True)
class ComponentEntry:
    """What is set about one method.

    Attributes:
        name: the name that was asked for; tables of the run carry it.
        kind: the implementation, by default of the same name.
        params: the method's own parameters; what is missing takes the method's default.
        file: path of the user's Python file, or None.
        module: importable module of the user's, or None.
        seed: this method's own seed, or None for a stream of the configuration's.
        save_interval: rows per part of what it computes, or None for rows_per_part.
        places: parameter (also seed, save_interval) -> where its value was set.
        notices: what has to be said.
    """

    name: str
    kind: str
    params: dict[str, Any]
    file: str | None
    module: str | None
    seed: int | None
    save_interval: int | None
    places: Mapping[str, str]
    notices: tuple[str, ...]

    @property
    def where(self) -> str:
        """Every place that parameters were set in, for errors about them."""
        return ", ".join(dict.fromkeys(self.places.values())) or _SHIPPED_LABEL


def method_parameters(config: Config, name: str, config_dir: Path | None) -> ComponentEntry:
    """Return the parameters of one method.

    Args:
        config: names the components file, and holds parameters that lie over it.
        name: the method, as named in the components file.
        config_dir: folder of the configuration file, where a relative path may also start; or None.

    Raises:
        ConfigError: no such method, or its entry cannot be used.
    """
    found = _entries(config, config_dir)
    if name not in found:
        raise _unknown_method(name, found)
    spot = found[name]
    entry = _checked_entry(name, spot)
    params = {str(k): copy.deepcopy(v) for k, v in (entry.get("params") or {}).items()}
    places = {k: spot.place("params", k) for k in params}
    for key, value in config.methods.get(name, {}).items():
        params[key] = merged(params.get(key), value)
        places[key] = f"{name}.{key} of the configuration"
    return _entry(name, entry, params, places, spot.folder)


def known_methods(config: Config, config_dir: Path | None) -> dict[str, str]:
    """Return every method that can be named -> the file and line of its entry."""
    found = _entries(config, config_dir)
    return {name: spot.place() for name, spot in sorted(found.items())}


def check_method_names(config: Config, config_dir: Path | None) -> None:
    """Check that there are the methods that the configuration sets parameters of, or chooses candidates by.

    Raises:
        ConfigError: no such method, or its entry cannot be used.
    """
    known = _entries(config, config_dir)
    chooser = candidate_rule(config.candidates)
    for name in [*config.methods, *([] if chooser is None else [chooser.method])]:
        if name not in known:
            raise _unknown_method(name, known)
        _checked_entry(name, known[name])


def sections_passed_over(config: Config, config_dir: Path | None) -> list[str]:
    """Return a line for every section of the user's components file that holds no methods."""
    own = components_file(config, config_dir)
    if own is None:
        return []
    layer = read_yaml(*own)
    return [
        f"{name} ({layer.place(name)}) is passed over: its components select no rows, and "
        f"{PASSED_OVER_SECTIONS[name]}"
        for name, value in layer.values.items()
        if _is_passed_over(name, value)
    ]


def _is_passed_over(name: str, value: Any) -> bool:
    """Whether a key of a components file is a section without methods; an entry of that name is a method."""
    entry = isinstance(value, dict) and value and set(value) <= set(_ENTRY_KEYS)
    return name in PASSED_OVER_SECTIONS and not entry


def components_file(
    config: Config, config_dir: Path | None, place: str = "configuration"
) -> tuple[Path, str] | None:
    """Return the user's components file and its name in messages; None where the shipped one counts.

    Raises:
        ConfigError: the file is set, does not exist, and is not the peer's own.
    """
    given = config.components_cfg_file
    if given is None:
        return None
    found = find_file(given, config_dir)
    if found is not None:
        return found, str(found)
    if shipped_in_place_of("components_cfg_file", given):
        return None
    raise ConfigError(
        f"components_cfg_file: {given} ({place}) was given.",
        "There is no such file.",
        "Correct the path, or leave it out to take the shipped components.yaml.",
    )


def find_file(given: str, config_dir: Path | None) -> Path | None:
    """Return the file at a path that starts here or, failing that, in the configuration file's folder."""
    candidates = [Path(given), *([config_dir / given] if config_dir is not None else [])]
    return next((path for path in candidates if os.path.isfile(path)), None)  # noqa: PTH113 (never raises)


def merged(under: Any, over: Any) -> Any:
    """Lay a value over another: mappings are merged, anything else is replaced."""
    if isinstance(under, dict) and isinstance(over, dict):
        return {**under, **{key: merged(under.get(key), value) for key, value in over.items()}}
    return copy.deepcopy(over)


@dataclass(frozen=True)
class _Spot:
    """An entry as it stands in a file: its value, not checked yet, and where it is."""

    value: Any
    layer: Layer
    path: tuple[str, ...]
    folder: Path

    def place(self, *inner: str) -> str:
        return self.layer.place(*self.path, *inner)


def _entries(config: Config, config_dir: Path | None) -> dict[str, _Spot]:
    """Return the entries of the user's file, and the shipped ones of methods that it does not name."""
    shipped = shipped_configs() / "components.yaml"
    files = [(shipped, _SHIPPED_LABEL)]
    own = components_file(config, config_dir)
    if own is not None:
        files.append(own)
    return {name: spot for path, label in files for name, spot in _entries_of(path, label).items()}


def _entries_of(path: Path, label: str) -> dict[str, _Spot]:
    layer = read_yaml(path, label)
    section = layer.values.get(_SECTION) or {}
    if not isinstance(section, dict):
        raise ConfigError(
            f"{_SECTION} ({layer.place(_SECTION)}) holds {section!r}.",
            "It takes one entry per method.",
            "Write 'NAME: {name: NAME, params: {...}}' below it.",
        )
    top = {
        k: _Spot(v, layer, (k,), path.parent)
        for k, v in layer.values.items()
        if k != _SECTION and not _is_passed_over(k, v)
    }
    inner = {str(k): _Spot(v, layer, (_SECTION, str(k)), path.parent) for k, v in section.items()}
    both = sorted(set(top) & set(inner))
    if both:
        raise ConfigError(
            f"{layer.label} has two entries for {both[0]}: {layer.place(both[0])}, and below {_SECTION}.",
            "Only one of them could count.",
            "Delete one of them.",
        )
    return {**top, **inner}


def _checked_entry(name: str, spot: _Spot) -> dict[str, Any]:
    """Return a method's entry, its name and shape checked."""
    check_name(name, f"A method ({spot.place()})")
    entry = spot.value
    if not isinstance(entry, dict):
        raise _bad_entry(name, spot.place(), "An entry is a mapping with name and params.")
    unknown = [str(key) for key in entry if key not in _ENTRY_KEYS]
    if unknown:
        hint = did_you_mean(unknown[0], _ENTRY_KEYS) or f" Parameters belong below params: {unknown[0]}."
        raise _bad_entry(
            name, spot.place(unknown[0]), f"'{unknown[0]}' is none of {', '.join(_ENTRY_KEYS)}.{hint}"
        )
    if not isinstance(entry.get("params") or {}, dict):
        raise _bad_entry(name, spot.place("params"), "params is a mapping of parameters to values.")
    for key in ("name", "file", "module"):
        value = entry.get(key)
        if value is not None and not (isinstance(value, str) and value.strip() and "\0" not in value):
            raise _bad_entry(name, spot.place(key), f"{key} is text, and not empty.")
    if entry.get("module") and not all(map(str.isidentifier, entry["module"].split("."))):
        raise _bad_entry(
            name, spot.place("module"), "module is a name as in Python's import: package.module."
        )
    if entry.get("file") and entry.get("module"):
        raise _bad_entry(name, spot.place(), "file and module both say where the method is; give one.")
    return entry


def _entry(
    name: str, entry: dict[str, Any], params: dict[str, Any], places: dict[str, str], folder: Path
) -> ComponentEntry:
    notices = []
    if params.pop("cache_dir", None) is not None:
        notices.append(f"cache_dir of {name} ({places['cache_dir']}): kept in the run's folder instead")
    places.pop("cache_dir", None)
    file, kind = entry.get("file"), entry.get("name") or name
    if file is None and entry.get("module") is None:
        if kind == "random" and params.get("seed") is not None:
            place = places["seed"]
            notices.append(f"seed of {name} ({place}) has no effect: rows are drawn by the run's seed")
        notices += _without_peers_own(name, kind, params, places)
    return ComponentEntry(
        name=name,
        kind=kind,
        params=params,
        file=str(folder / file) if file else None,
        module=entry.get("module"),
        seed=_whole_number(name, "seed", 0, params, places),
        save_interval=_whole_number(name, "save_interval", 1, params, places),
        places=places,
        notices=tuple(notices),
    )


def _without_peers_own(name: str, kind: str, params: dict[str, Any], places: dict[str, str]) -> list[str]:
    """Take out parameters that only the peer's implementation of a shipped method has; return what to say."""
    passed = PASSED_OVER_PARAMETERS | ({"indices_path": _NEAR_INDICES} if kind == "near" else {})
    found = [key for key in passed if key in params]
    for key in found:
        del params[key]
    return [f"{key} of {name} ({places.pop(key)}) has no effect: {passed[key]}" for key in found]


def _whole_number(
    name: str, key: str, least: int, params: dict[str, Any], places: Mapping[str, str]
) -> int | None:
    """Take a whole number out of the parameters; None where it is not set."""
    value = params.pop(key, None)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
        raise ConfigError(
            f"{name}.{key}: {value!r} ({places[key]}) cannot be used.",
            f"{key} takes a whole number of at least {least}.",
            "Give such a number, or leave it out.",
        )
    return value


def _bad_entry(name: str, place: str, why: str) -> ConfigError:
    return ConfigError(
        f"The entry of the method {name} ({place}) cannot be used.",
        why,
        f"Write '{name}: {{name: {name}, params: {{...}}}}'; 'dataflex methods' lists the parameters.",
    )


def _unknown_method(name: str, known: Mapping[str, object]) -> ConfigError:
    return ConfigError(
        f"The method '{name}' is not known.{did_you_mean(name, known)}",
        f"There are entries for: {', '.join(sorted(known))}.",
        "Choose one of them, or add an entry for a method of your own to components_cfg_file.",
    )
