"""Python files of the user's own: a method, a feature, a metric, a rewarder."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import traceback
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType

from dataflex_pipeline.errors import DataflexError, UserError

_FILES: set[str] = set()
"""The files that were loaded, as tracebacks name them."""
_PROGRAM = str(Path(__file__).parent)
LONGEST = 300
"""Characters of an error's text that are shown."""


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
        ImportError: there is no such file, or it ends the program, or changes the working directory, which
            paths of the configuration begin at. Whatever else the file raises comes through.
    """
    if not path.is_file():
        raise ImportError(f"there is no Python file {path}")
    loader = _FromSource(name, str(path))
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    assert spec is not None  # noqa: S101 (with a loader given there always is one)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    _FILES.add(str(path))
    here = _here()
    try:
        loader.exec_module(module)
        if _here() != here:
            raise ImportError(f"it changes the working directory, to {_here()}")
    except BaseException as error:
        del sys.modules[name]
        if isinstance(error, SystemExit):
            raise ImportError(in_one_line(error)) from error
        raise
    finally:
        if here is not None and _here() != here:
            os.chdir(here)
    return module


def _here() -> Path | None:
    """Return the working directory; None where it was removed."""
    try:
        return Path.cwd()
    except OSError:
        return None


def load_module(name: str) -> ModuleType:
    """Import a module of the user's own; its file counts as such a file from then on.

    Args:
        name: of the module, in full.

    Raises:
        ImportError: there is no such module, or it ends the program. Whatever else it raises comes through.
    """
    if not name or name.startswith("."):
        raise ImportError(f"a module has a full name, such as package.module, and this is '{name}'")
    found = importlib.util.find_spec(name)
    if found is not None and found.origin is not None:
        _FILES.add(found.origin)
    try:
        return importlib.import_module(name)
    except SystemExit as error:
        raise ImportError(in_one_line(error)) from error


def in_one_line(error: BaseException) -> str:
    """Return an error that a file of the user's own raised: its kind, its text, and the line there."""
    kind, place = type(error).__name__, own_place(error)
    try:
        text = str(error).partition("\n")[0][:LONGEST]
    except Exception:  # noqa: BLE001 (the user's own __str__ may raise anything)
        text = ""
    where = "" if place is None else f" (line {place.lineno}: {place.line})"
    return f"{kind}{text and ': '}{text}{where}"


def own_error(error: BaseException, *, at_once: bool = False) -> DataflexError | None:
    """Return the error to show for one that came out of a file of the user's own; None for any other.

    So is a SystemExit there: the work would end half done, and as if all were well.

    Args:
        at_once: only where the file raised it by itself, and nothing of this program that it called.
    """
    place = own_place(error, at_once)
    if place is None or isinstance(error, DataflexError):
        return None
    return UserError(
        f"{place.filename}, line {place.lineno}: {in_one_line(error)}.",
        "The file is your own, and what it raised there ends the command.",
        "Correct it, and run the same command again: finished work is kept. From Python (Run) the whole "
        "traceback is shown.",
    )


def own_place(error: BaseException, at_once: bool = False) -> traceback.FrameSummary | None:
    """Return the innermost line of a file of the user's own that an error, or its cause, came through.

    Args:
        at_once: not where a line of this program was called from there.
    """
    seen: BaseException | None = error
    while seen is not None:
        frames = traceback.extract_tb(seen.__traceback__)
        places = [number for number, frame in enumerate(frames) if frame.filename in _FILES]
        if places:
            inner = frames[places[-1] + 1 :]
            ours = at_once and any(frame.filename.startswith(_PROGRAM) for frame in inner)
            return None if ours else frames[places[-1]]
        seen = seen.__cause__
    return None
