"""Parameters of a method that are other names of the run's own data sets, as users of the peer know them.

    candidate_path       dataset
    query_path, query    eval_dataset

They count for the configured method, if it is a shipped one; one of the user's own may mean something else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from dataflex_pipeline.config.components import known_methods, method_parameters
from dataflex_pipeline.config.fields import Config
from dataflex_pipeline.errors import ConfigError

ALIASES = {"candidate_path": "dataset", "query_path": "eval_dataset", "query": "eval_dataset"}


def data_of_method(
    config: Config, config_dir: Path | None, given: Callable[[str], str | None]
) -> Mapping[str, tuple[str, str]]:
    """Return the data sets that the configured method's parameters name.

    Args:
        config: the configuration without them. config_dir: folder of the configuration file.
        given: tells where a key was set by the user; None where it was not.

    Returns:
        key -> (value, parameter and place that it comes from).

    Raises:
        ConfigError: a key and a parameter, or two parameters, name different data sets.
    """
    name = config.component_name
    if name not in known_methods(config, config_dir):
        return {}  # an unknown method is an error of its own, once it is used
    entry = method_parameters(config, name, config_dir)
    if entry.file is not None or entry.module is not None:
        return {}
    found: dict[str, tuple[str, str]] = {}
    for parameter, key in ALIASES.items():
        value = entry.params.get(parameter)
        if not isinstance(value, str):
            continue
        said = f"{name}.{parameter} ({entry.places[parameter]})"
        place = found[key][1] if key in found else given(key)
        set_now = found[key][0] if key in found else getattr(config, key)
        if place is not None and set_now != value:
            raise ConfigError(
                f"{said} is {value}, and {key} ({place}) is {set_now}.",
                f"{parameter} is another name of {key}: both say which rows the run works on.",
                "Keep one of them.",
            )
        found[key] = (value, said)
    return found
