"""The configuration as a commented YAML file: every key with its meaning."""

from __future__ import annotations

import textwrap
from itertools import groupby
from typing import Any

from dataflex_pipeline.config.fields import SECRETS, Config, group_of
from dataflex_pipeline.config.values import accepted
from dataflex_pipeline.config.yaml_files import dump_yaml

_WIDTH = 100


def commented_yaml(config: Config | None = None) -> str:
    """Write every key, by section, with its meaning as a comment; it loads back to the same configuration.

    Args:
        config: the values to write; by default the default of every key. Secrets are written as null.
    """
    config = config or Config()
    lines = [
        "# A run of DataFlex Pipeline. Every key is optional: what is left out or null takes its default.",
        "# Values can also be given on the command line, as key=value.",
    ]
    for group, names in groupby(Config.model_fields, key=group_of):
        lines += ["", "#" * 3 + f" {group}"]
        for name in names:
            value = None if name in SECRETS else getattr(config, name)
            lines += ["", *_comment(name), _line(name, value)]
    return "\n".join(lines) + "\n"


def _comment(name: str) -> list[str]:
    text = f"{Config.model_fields[name].description} ({accepted(name)})"
    return textwrap.wrap(text, _WIDTH, initial_indent="# ", subsequent_indent="# ", break_long_words=False)


def _line(name: str, value: Any) -> str:
    return dump_yaml({name: value}).rstrip("\n")
