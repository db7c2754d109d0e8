"""From a name in ``dataset:`` to the files, hub data set or ``dataset_info.json`` entry it stands for.

A name is looked for, in this order, as an entry of ``<dataset_dir>/dataset_info.json``, as a path
(as given, then below ``dataset_dir``, then there with each known extension), and on the hub.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from dataflex_pipeline.data.hub import HubName, read_hub
from dataflex_pipeline.data.readers import READERS, read_rows
from dataflex_pipeline.data.settings import DataSettings, Row
from dataflex_pipeline.errors import DataError, did_you_mean

INFO_FILE = "dataset_info.json"
_METADATA_FILES = frozenset({INFO_FILE, "state.json", "dataset_dict.json"})
_COLUMNAR = frozenset({".parquet", ".arrow", ".feather", ".ipc"})
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_ENTRY_KEYS = frozenset(
    {"file_name", "hf_hub_url", "subset", "split", "folder", "num_samples", "formatting", "columns", "tags"}
)
_ELSEWHERE = {
    "ms_hub_url": "data is fetched from the Hugging Face hub only",
    "om_hub_url": "data is fetched from the Hugging Face hub only",
    "script_url": "loading scripts are remote code, and are never run",
    "cloud_file_name": "cloud storage is not read",
}


@dataclass(frozen=True)
class Source:
    """One data set, resolved.

    Attributes:
        name: value of the ``source`` column, unique within a run. given: what the user wrote.
        files: its files in order; empty for a hub data set. hub: where it is on the hub.
        limit: only the first so many rows; None for all.
        formatting: 'alpaca' or 'sharegpt' where declared. columns, tags: declared roles.
    """

    name: str
    given: str
    files: tuple[Path, ...] = ()
    hub: HubName | None = None
    limit: int | None = None
    formatting: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)

    @property
    def columnar(self) -> bool:
        """Whether its rows come from Parquet, Arrow or the hub, where null members may be padding."""
        return self.hub is not None or any(path.suffix.lower() in _COLUMNAR for path in self.files)

    def rows(self) -> Iterator[Row]:
        """Yield the rows in order, up to the limit."""
        return islice(self._all_rows(), self.limit)

    def _all_rows(self) -> Iterator[Row]:
        if self.hub is not None:
            yield from read_hub(self.hub, self.given)
        for path in self.files:
            try:
                yield from read_rows(path)
            except OSError as error:
                raise DataError(
                    f"{path} cannot be read ({error.strerror or error}).",
                    "The system refuses it, so its rows are not known.",
                    "Check that it exists and that you may read it. Nothing was written.",
                ) from error


def resolve_sources(settings: DataSettings) -> tuple[Source, ...]:
    """Find every data set of the settings; names are made unique by a number.

    Raises:
        DataError: none is named, one is not found anywhere, or an entry cannot be used.
    """
    if not settings.datasets:
        raise DataError(
            "No data set is named.",
            "Rows have to come from somewhere.",
            "Set dataset= to a file, a folder, an entry of dataset_info.json or a hub name.",
        )
    entries = read_entries(Path(settings.dataset_dir))
    found: list[Source] = []
    for given in settings.datasets:
        source = _resolve(given, settings, entries)
        found.append(replace(source, name=_unique(source.name, [other.name for other in found])))
    return tuple(found)


def _unique(name: str, taken: Sequence[str]) -> str:
    candidate, count = name, 1
    while candidate in taken:
        count += 1
        candidate = f"{name}-{count}"
    return candidate


def read_entries(dataset_dir: Path) -> dict[str, dict[str, Any]]:
    """Return the entries of ``dataset_info.json``; empty where there is none.

    Raises:
        DataError: the file is not a JSON object of objects.
    """
    path = dataset_dir / INFO_FILE
    if not path.is_file():
        return {}
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        where = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise DataError(
            f"{path}{where}: not valid JSON ({error}).", "It describes the data sets.", "Repair that place."
        ) from error
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        raise DataError(
            f"{path} is not an object of objects.",
            "Each entry has to be a name with its description.",
            'Write it like {"my_data": {"file_name": "my_data.json"}}.',
        )
    return entries


def _resolve(given: str, settings: DataSettings, entries: Mapping[str, dict[str, Any]]) -> Source:
    base = Path(settings.dataset_dir)
    if given in entries:
        return _from_entry(given, entries[given], settings)
    plain = Source(
        given, given, limit=settings.max_samples, columns=dict(settings.columns), tags=dict(settings.tags)
    )
    path = _find_path(given, base)
    if path is not None:
        return replace(plain, name=path.stem if path.is_file() else path.name, files=_files(path, given))
    nearest = did_you_mean(given, _known_names(base, entries))
    is_path = _looks_like_path(given)
    if is_path or ("/" not in given and nearest):
        raise _not_found(given, base, nearest, hub=not is_path)
    return replace(plain, hub=HubName(given))


def _find_path(given: str, base: Path) -> Path | None:
    """Return the first file or folder of data by that name; a folder without data only if nothing else is."""
    named = [Path(given).expanduser(), base / given, *(base / f"{given}{suffix}" for suffix in READERS)]
    there = [path.resolve() for path in named if path.exists()]
    return next((path for path in there if path.is_file() or _data_files(path)), there[0] if there else None)


def _data_files(folder: Path) -> tuple[Path, ...]:
    found = (path for path in folder.iterdir() if path.is_file() and path.suffix.lower() in READERS)
    usable = [path for path in found if path.name not in _METADATA_FILES and not path.name.startswith(".")]
    return tuple(sorted(usable, key=lambda path: path.name))


def _files(path: Path, given: str) -> tuple[Path, ...]:
    files = (path,) if path.is_file() else _data_files(path)
    if files:
        return files
    held = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
    raise DataError(
        f"dataset '{given}' is the folder {path}, which holds {held}.",
        f"No file in it ends in {', '.join(READERS)} (folders inside it are not searched).",
        "Give a folder that holds data files, or the files themselves.",
    )


def _looks_like_path(given: str) -> bool:
    suffixed = Path(given).suffix.lower() in READERS
    return suffixed or given.startswith((".", "/", "~")) or not _HUB_NAME.fullmatch(given)


def _known_names(base: Path, entries: Mapping[str, Any]) -> list[str]:
    files = sorted(base.iterdir()) if base.is_dir() else []
    usable = [path for path in files if path.suffix.lower() in READERS and path.name != INFO_FILE]
    return [*entries, *(path.name for path in usable), *(path.stem for path in usable)]


def _not_found(given: str, base: Path, nearest: str, hub: bool) -> DataError:
    info = f"an entry of {base / INFO_FILE}" + ("" if (base / INFO_FILE).is_file() else " (no such file)")
    return DataError(
        f"dataset '{given}' is not there.{nearest}",
        f"Looked for {info}, the path {given}, and {base / given} (also with {', '.join(READERS)}).",
        "Correct the name, or set dataset_dir to the folder that holds it."
        + (" A hub name that is not so near to one of these is fetched as owner/name." if hub else ""),
    )


def _from_entry(given: str, entry: Mapping[str, Any], settings: DataSettings) -> Source:
    info = Path(settings.dataset_dir) / INFO_FILE
    _check_entry(given, entry, info)
    limits = [n for n in (entry.get("num_samples"), settings.max_samples) if n is not None]
    source = Source(
        given,
        given,
        limit=min(limits, default=None),
        formatting=entry.get("formatting", "alpaca"),
        columns={**settings.columns, **entry.get("columns", {})},
        tags={**settings.tags, **entry.get("tags", {})},
    )
    if entry.get("hf_hub_url"):
        hub = HubName(
            entry["hf_hub_url"], entry.get("subset"), entry.get("split", "train"), entry.get("folder")
        )
        return replace(source, hub=hub)
    path = Path(settings.dataset_dir) / entry["file_name"]
    if not path.exists():
        raise DataError(
            f"dataset '{given}' is the file {path}, which is not there.",
            f"Its entry in {info} says file_name: {entry['file_name']}, below dataset_dir.",
            "Put the file there, or correct the entry.",
        )
    return replace(source, files=_files(path.resolve(), given))


def _check_entry(given: str, entry: Mapping[str, Any], info: Path) -> None:
    where = f"dataset '{given}' in {info}"
    for key in [key for key in _ELSEWHERE if entry.get(key) and not entry.get("hf_hub_url")]:
        if not entry.get("file_name"):
            raise DataError(
                f"{where} sets {key}.", f"Here {_ELSEWHERE[key]}.", "Give file_name or hf_hub_url."
            )
    unknown = sorted(set(entry) - _ENTRY_KEYS - _ELSEWHERE.keys() - {"ranking"})
    if unknown:
        raise DataError(
            f"{where} has the key '{unknown[0]}'.{did_you_mean(unknown[0], _ENTRY_KEYS)}",
            f"The keys of an entry are {', '.join(sorted(_ENTRY_KEYS))}.",
            "Correct or remove it.",
        )
    if entry.get("ranking"):
        raise DataError(
            f"{where} sets ranking: true.",
            "Preference pairs have two answers to one prompt; rows here have one.",
            "Use a supervised data set.",
        )
    if not entry.get("file_name") and not entry.get("hf_hub_url"):
        raise DataError(f"{where} has no file_name.", "It does not say where the rows are.", "Add file_name.")
    if entry.get("formatting", "alpaca") not in ("alpaca", "sharegpt"):
        raise DataError(
            f"{where} sets formatting: {entry['formatting']}.",
            "The known ones are alpaca and sharegpt.",
            "Use one of them.",
        )
    if entry.get("num_samples") is not None and not _is_count(entry["num_samples"]):
        raise DataError(
            f"{where} sets num_samples: {entry['num_samples']!r}.",
            "It is a number of rows, 1 or more.",
            "Correct it.",
        )


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
