"""Names that become files and folders of a run: methods, selections, features.

A name is used as it stands in a path, so it holds nothing that a path could read otherwise, on any system.
"""

from __future__ import annotations

import re

from dataflex_pipeline.errors import ConfigError

LONGEST = 100
"""Bytes of a name in UTF-8; with what is put around it, every file system takes it."""
_NAME = re.compile(r"[^\W_][\w.-]*")


def check_name(name: str, what: str) -> str:
    """Return a name that can be used in a path.

    Args:
        name: the name.
        what: what it names and where it was read, as the beginning of a sentence: "The method in my.yaml".

    Raises:
        ConfigError: it holds other characters, begins with a dot or dash, or is too long.
    """
    size = len(name.encode("utf-8", "replace"))
    if size <= LONGEST and _NAME.fullmatch(name):
        return name
    shown = name if size <= LONGEST else f"{name[:20]}... ({len(name)} characters)"
    raise ConfigError(
        f"{what} is named {shown!r}.",
        "The name becomes part of the names of files in the run.",
        "Use letters, digits, dots, dashes and underscores, beginning with a letter or digit, at most "
        f"{LONGEST} bytes: top-5-percent.",
    )
