"""The day that a chat template is told: always the same, since rows must not depend on when they are made.

Templates ask for it as ``date_string`` or by calling ``strftime_now(format)``. A function cannot be handed to
a template (transformers 5.24 makes text of whatever is no plain value), and the one that is there tells the
real day; a macro of that name, written before the template, is taken instead.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime

DAY = datetime(2024, 7, 26, tzinfo=UTC)
"""The day."""
VARIABLES = {"date_string": f"{DAY:%d %b %Y}"}
"""What a template finds beside a conversation."""

_LETTERS = "aAbBcCdDeFfGgHhIjmMnpRSTtuUVwWxXyYzZ"
_UNPADDED = "dHIjmMSUWy"


def asks_for_the_day(template: str) -> bool:
    """Whether a template may write the day."""
    return re.search(r"strftime_now|date_string", template) is not None


def with_day(template: str) -> str:
    """Return a template in which ``strftime_now`` tells the day."""
    return _macro() + template if "strftime_now" in template else template


def _macro() -> str:
    """Return the macro: directives replaced one by one, ``%%`` kept out of it.

    It ends with a line break, which the template's environment drops behind a block (``trim_blocks``), so
    that the template's own first line begins a line.
    """
    texts = {f"%{letter}": DAY.strftime(f"%{letter}") for letter in _LETTERS}
    texts |= {f"%-{letter}": texts[f"%{letter}"].lstrip("0") or "0" for letter in _UNPADDED}
    pairs = [("%%", "\x00"), *texts.items(), ("\x00", "%")]
    filters = "".join(f" | replace({form!r}, {text!r})" for form, text in pairs)
    return "{% macro strftime_now(format) %}{{ format" + filters + " }}{% endmacro %}\n"
