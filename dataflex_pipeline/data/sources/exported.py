"""Folders that `dataflex export` wrote: one data set for each of their files of rows.

The manifest ``dataflex_export.json`` names the files and says how each is read. Such a folder stands for all
of its rows, each once: where a JSONL and a Parquet file hold the same rows, the JSONL file is read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataflex_pipeline.errors import DataError

EXPORT_MANIFEST = "dataflex_export.json"
ROWS_FOLDER = "data"
"""Folder of an export that holds its rows."""


@dataclass(frozen=True)
class ExportedFile:
    """One file of exported rows.

    Attributes:
        path: the file.
        entry: how it is read, as in ``dataset_info.json``; empty where its columns say it all.
    """

    path: Path
    entry: Mapping[str, Any]


def exported_files(path: Path) -> list[ExportedFile] | None:
    """Return the files of rows of an export.

    Args:
        path: the export's folder, the folder of rows in it, or one file of these.

    Returns:
        One entry per file; None where the path belongs to no export with rows.

    Raises:
        DataError: a file that the export had is gone, in both its forms.
    """
    folder = path if path.is_dir() else path.parent
    if path.is_dir() and (path / EXPORT_MANIFEST).is_file():
        folder = path / ROWS_FOLDER
    names = _listed(folder)
    if names is None:
        return None
    if path.is_file():
        stem = path.stem
        return [ExportedFile(path, names[stem])] if stem in names else None
    return [ExportedFile(_there(folder, stem), entry) for stem, entry in names.items()]


def _listed(folder: Path) -> dict[str, Mapping[str, Any]] | None:
    """Return the stem of each file of rows and its entry; None where no manifest lists any."""
    manifest = folder.parent / EXPORT_MANIFEST
    if folder.name != ROWS_FOLDER or not manifest.is_file():
        return None
    try:
        noted = json.loads(manifest.read_text(encoding="utf-8")).get("data")
        entries = noted["entries"]
        return {Path(name).stem: dict(entries.get(Path(name).stem) or {}) for name in noted["files"]}
    except (ValueError, AttributeError, TypeError, KeyError, RecursionError):
        return None  # an export without rows, or of an older version: its files are read by what is in them


def _there(folder: Path, stem: str) -> Path:
    for suffix in (".jsonl", ".parquet"):
        if (folder / f"{stem}{suffix}").is_file():
            return folder / f"{stem}{suffix}"
    raise DataError(
        f"{folder / stem}.jsonl is not there.",
        f"{folder.parent / EXPORT_MANIFEST} says that it holds a part of the exported rows.",
        "Export again, or name the files to read one by one. Nothing was written.",
    )
