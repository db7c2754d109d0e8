"""Python files of the user's own: a method, a metric."""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType


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
        ImportError: there is no such file. Whatever the file raises comes through.
    """
    if not path.is_file():
        raise ImportError(f"there is no Python file {path}")
    loader = _FromSource(name, str(path))
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    assert spec is not None  # noqa: S101 (with a loader given there always is one)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
