"""The selection methods: one file each; file name = method name = configuration name.

Four files are no method that is chosen by name: ``gradient_similarity``, the base of less and nice,
``embedding_similarity``, that of near and rds, ``focus``, which loss and perplexity share, and ``imported``,
which stands in for a method whose probabilities come from a file.

A method of the user's own lives in any Python file; an entry of components.yaml names it with
``file:`` (a path, relative to that YAML file) or ``module:`` (an importable module).
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import ValidationError

from dataflex_pipeline.api import Method
from dataflex_pipeline.config.components import COMMON, ComponentEntry, method_parameters
from dataflex_pipeline.config.explain import explain, first_complaint
from dataflex_pipeline.config.fields import Config
from dataflex_pipeline.declared import broken, is_own, missing_functions, shown
from dataflex_pipeline.declared.method import check_method, check_method_class
from dataflex_pipeline.errors import ConfigError, did_you_mean
from dataflex_pipeline.own_code import in_one_line, load_module, load_source

NOT_CHOSEN = ("embedding_similarity", "focus", "gradient_similarity", "imported")
"""Modules here that are no method to choose by name."""
OWN_MODULE = "dataflex_method_"
"""The module of a method of the user's own is called that and the method's name."""


def shipped_methods() -> list[str]:
    """Return the names of the methods that come with the package."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name not in NOT_CHOSEN)


def method_class(name: str, file: Path | None = None, module: str | None = None) -> type[Method]:
    """Find the Method subclass of a shipped name, a file or a module.

    Raises:
        ConfigError: there is no such method, or the file does not define exactly one.
    """
    if file is not None:
        found = _import_file(name, file)
    elif module is not None:
        found = _import_module(name, module)
    elif name in shipped_methods():
        found = importlib.import_module(f"{__name__}.{name}")
    else:
        raise ConfigError(
            f"The method '{name}' is not known.{did_you_mean(name, shipped_methods())}",
            f"The shipped methods are: {', '.join(shipped_methods())}.",
            "Choose one of them, or give its components.yaml entry a file: or module: of your own.",
        )
    kind = _only_method(name, found)
    if is_own(kind):
        check_method_class(kind)
    return kind


def _import_file(name: str, file: Path) -> ModuleType:
    if not file.is_file():
        raise ConfigError(
            f"The method '{name}' names the file {file}.",
            "There is no Python file at that path.",
            "Correct the path; it is relative to the components.yaml that names it.",
        )
    try:
        return load_source(OWN_MODULE + name, file)
    except Exception as error:  # any error of the user's own file, told without a traceback
        raise ConfigError(
            f"The method '{name}' comes from {file}, which cannot be imported.",
            in_one_line(error),
            "Correct the file; `python` followed by its path shows the same error in full.",
        ) from error


def _import_module(name: str, module: str) -> ModuleType:
    try:
        return load_module(module)
    except Exception as error:  # any error of the user's own module, told without a traceback
        raise ConfigError(
            f"The method '{name}' names the module {module}.",
            f"It cannot be imported: {in_one_line(error)}",
            "Install the package that holds it, or correct the name or the module.",
        ) from error


def _only_method(name: str, module: ModuleType) -> type[Method]:
    classes = [
        value
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, Method) and value.__module__ == module.__name__
    ]
    whole = {kind for kind in classes if not inspect.isabstract(kind)}
    if not whole and len(classes) == 1:
        raise missing_functions(classes[0])
    if len(whole) != 1:
        raise ConfigError(
            f"The method '{name}' comes from {getattr(module, '__file__', module.__name__)}.",
            f"It defines {len(whole)} subclasses of dataflex_pipeline.api.Method; it must be exactly one.",
            "Keep one method per file.",
        )
    return whole.pop()


def configured_method(config: Config, name: str, config_dir: Path | None) -> tuple[Method, ComponentEntry]:
    """Return a method with the parameters that are set for it, and its entry.

    Where its probabilities come from a file, `Imported` stands in for it.

    Args:
        config: of the run.
        name: of the method.
        config_dir: folder of the configuration file, or None.

    Raises:
        ConfigError: there is no such method, or a parameter is unknown or cannot be used.
        DataError: the file of its probabilities is not there.
    """
    from dataflex_pipeline.methods.imported import Imported

    entry = method_parameters(config, name, config_dir)
    method = _method_of(name, entry)
    if method.probabilities_from is None:
        return method, entry
    params = Imported.Params(file=method.probabilities_from, saved_to=method.probabilities_to)
    return Imported(params), entry


def _method_of(name: str, entry: ComponentEntry) -> Method:
    kind = method_class(entry.kind, Path(entry.file) if entry.file else None, entry.module)
    return build_method(name, kind, dict(entry.params), entry.where, entry.places)


def check_methods(config: Config, config_dir: Path | None) -> None:
    """Check the parameters that a configuration sets, also those of methods that are not in use.

    A method of the user's own is only imported where it is used.

    Raises:
        ConfigError: a value cannot be used.
    """
    for name in config.methods:
        entry = method_parameters(config, name, config_dir)
        if entry.file is None and entry.module is None:
            _method_of(name, entry)


def build_method(
    name: str,
    kind: type[Method],
    params: dict[str, Any],
    where: str,
    places: Mapping[str, str] | None = None,
) -> Method:
    """Make a method with checked parameters.

    Args:
        name: the method's configuration name.
        kind: its class.
        params: values by parameter name.
        where: the place they were set, for errors.
        places: the place of each one, where it is known.

    Raises:
        ConfigError: a parameter is unknown or its value cannot be used.
    """
    try:
        checked = kind.Params(**params)
    except ValidationError as error:
        key = first_complaint(error).key
        place = (places or {}).get(key) or _places_named(first_complaint(error).reason, places) or where
        if first_complaint(error).unknown:
            raise _unknown_parameter(name, kind, key, place) from error
        raise explain(error, kind.Params, name, place=place) from error
    made: Any = kind(checked)
    if not isinstance(made, kind):
        raise broken(kind, "the call", f"returns {shown(made)}", f"{kind.__name__}(params) makes the method.")
    if is_own(kind):
        check_method(made)
    return made


def _places_named(reason: str, places: Mapping[str, str] | None) -> str:
    """Return the places of the parameters that a complaint about several speaks of."""
    return ", ".join(place for key, place in (places or {}).items() if re.search(rf"\b{key}\b", reason))


def _unknown_parameter(name: str, kind: type[Method], key: str, place: str) -> ConfigError:
    accepted = [*kind.Params.model_fields, *COMMON]
    implementation = kind.__module__.rpartition(".")[2].removeprefix(OWN_MODULE)
    return ConfigError(
        f"{name}.{key} is not a parameter of {implementation}.{did_you_mean(key, accepted)} "
        f"The name '{key}' is from {place}.",
        f"{implementation} takes: {', '.join(accepted)}.",
        "Correct the name, or remove it; `dataflex methods` shows every method's parameters.",
    )
