"""Python files of the user's own: a method, a feature, a metric, a rewarder."""

from __future__ import annotations

import importlib.util
import sys
import traceback
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType

from dataflex_pipeline.errors import DataflexError, UserError

_FILES: set[str] = set()
"""The files that were loaded, as tracebacks name them."""


class _FromSource(SourceFileLoader):
    """Compiles the file every time.

    Python's own cache takes a file of the same size, changed within the same second, for unchanged; and it
    would lie in the user's folder.
    """

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)


def load_source(name: str, path: Path) -> ModuleType:
    """Run a Python file as a module, also where one of that name was loaded before.

    Args:
        name: what the module is called; it stands in ``sys.modules`` under it, where dataclasses and pydantic
            look for the meaning of annotations.
        path: the file.

    Raises:
        ImportError: there is no such file, or it ends the program. Whatever else the file raises comes
            through.
    """
    if not path.is_file():
        raise ImportError(f"there is no Python file {path}")
    loader = _FromSource(name, str(path))
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    assert spec is not None  # noqa: S101 (with a loader given there always is one)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    _FILES.add(str(path))
    try:
        loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if isinstance(error, SystemExit):
            raise ImportError(in_one_line(error)) from error
        raise
    return module


def in_one_line(error: BaseException) -> str:
    """Return an error that a file of the user's own raised: its kind, its text, and the line there."""
    kind, text = type(error).__name__, str(error).partition("\n")[0]
    place = _place(error)
    where = "" if place is None else f" (line {place.lineno}: {place.line})"
    return f"{kind}{text and ': '}{text}{where}"


def own_error(error: BaseException) -> DataflexError | None:
    """Return the error to show for one that came out of a file of the user's own; None for any other.

    So is a SystemExit there: the work would end half done, and as if all were well.
    """
    place = _place(error)
    if place is None or isinstance(error, DataflexError):
        return None
    return UserError(
        f"{place.filename}, line {place.lineno}: {in_one_line(error)}.",
        "The file is your own, and what it raised there ends the command.",
        "Correct it, and run the same command again: finished work is kept. From Python (Run) the whole "
        "traceback is shown.",
    )


def _place(error: BaseException) -> traceback.FrameSummary | None:
    """Return the innermost line of a file of the user's own that an error, or its cause, came through."""
    seen: BaseException | None = error
    while seen is not None:
        frames = traceback.extract_tb(seen.__traceback__)
        if own := [frame for frame in frames if frame.filename in _FILES]:
            return own[-1]
        seen = seen.__cause__
    return None
