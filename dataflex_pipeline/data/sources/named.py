"""Sources by name in ``dataset:``: files, a hub data set or an entry of ``dataset_info.json``.

A name is looked for, in this order, as an entry of ``<dataset_dir>/dataset_info.json``, as a path
(as given, then below ``dataset_dir``, then there with each known extension), and on the hub.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from dataflex_pipeline.data.settings import DataSettings, NumberedRow, Row
from dataflex_pipeline.data.sources.compressed import COMPRESSIONS, data_suffix
from dataflex_pipeline.data.sources.entries import (
    Draw,
    check_entry,
    entry_notices,
    picked,
    read_entries,
    slices,
)
from dataflex_pipeline.data.sources.exported import EXPORT_MANIFEST, ExportedFile, exported_files
from dataflex_pipeline.data.sources.folders import INFO_FILE, has_data, held
from dataflex_pipeline.data.sources.hub import HubName, count_hub, read_hub
from dataflex_pipeline.data.sources.readers import READERS, count_rows, is_columnar, is_data, read_numbered
from dataflex_pipeline.data.sources.readme_configs import has_configs
from dataflex_pipeline.errors import DataError, did_you_mean
from dataflex_pipeline.home import expanded
from dataflex_pipeline.seeds import derive_seed

_Placed = tuple[str | None, int | None, Row]
"""Name of the file, place in it from 1, and the row."""
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_ENDINGS = (
    *READERS,
    *(f"{suffix}{ending}" for suffix in (".jsonl", ".json", ".csv") for ending in COMPRESSIONS),
)


@dataclass(frozen=True)
class Source:
    """One data set, resolved.

    Attributes:
        name: value of the ``source`` column, unique within a run. given: what the user wrote.
        files: its files in order; empty for a hub data set. hub: where it is on the hub.
        split: a slice or sum of splits of local files; None for all their rows. of_split: their files.
        draw: rows to draw at random; None for all. limit: only the first so many rows; None for all.
        formatting: 'alpaca', 'sharegpt' or 'openai' where declared. columns, tags: declared roles.
        sha1: what an entry says is the checksum of its file.
        notices: what of an entry or a folder is not used or read otherwise, one plain sentence each.
    """

    name: str
    given: str
    files: tuple[Path, ...] = ()
    hub: HubName | None = None
    split: str | None = None
    of_split: Mapping[str, tuple[Path, ...]] = field(default_factory=dict)
    draw: Draw | None = None
    limit: int | None = None
    formatting: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    sha1: str | None = None
    notices: tuple[str, ...] = ()

    @cached_property
    def columnar(self) -> bool:
        """Whether rows come from columnar files, which fill every object with the keys of all the others."""
        return self.hub is not None or any(is_columnar(path) for path in self.files)

    def rows(self) -> Iterator[Row]:
        """Yield the rows in order, up to the limit."""
        return (row for _, _, row in self.placed_rows())

    def placed_rows(self) -> Iterator[_Placed]:
        """Yield the rows as `rows` does, each after its file and place in it (see `PlacedRow`)."""
        rows = self._all_rows()
        if self.draw is not None:
            rows = picked(rows, self.draw.positions(self._count()))
        return islice(rows, self.limit)

    def late_notices(self) -> list[str]:
        """Return what is to be said and shows only when files are read: draws and checksums."""
        lines = [self.draw.sentence(self._count())] if self.draw is not None else []
        if self.sha1 is not None:
            lines += _checksum_notice(self.sha1, self.files)
        return [f"data set '{self.given}': {line}" for line in lines]

    def _all_rows(self) -> Iterator[_Placed]:
        if self.hub is not None:
            for line, row in enumerate(read_hub(self.hub, self.given), 1):
                yield None, line, row
        elif self.split is None:
            yield from self._read_all(self.files)
        else:
            for part in slices(self.split, self._lengths(), self.given):
                yield from islice(self._read_all(self.of_split[part.split]), part.start, part.stop)

    def _read_all(self, files: Sequence[Path]) -> Iterator[_Placed]:
        for path in files:
            name = self.file_name(path)
            for line, row in _read(path):
                yield name, line, row

    def file_name(self, path: Path) -> str:
        """Return what one of the data set's files is called in tables: its path below the folder of all.

        Where the data set itself lies is not in it, so that tables do not depend on that.
        """
        return path.relative_to(self._folder).as_posix()

    @cached_property
    def _folder(self) -> Path:
        return Path(os.path.commonpath([path.parent for path in self.files]))

    def _lengths(self) -> dict[str, int]:
        return {name: sum(map(count_rows, files)) for name, files in self.of_split.items()}

    def _count(self) -> int:
        """Return how many rows there are before any are drawn."""
        if self.hub is not None:
            return count_hub(self.hub, self.given)
        if self.split is not None:
            return sum(map(len, slices(self.split, self._lengths(), self.given)))
        return sum(map(count_rows, self.files))


def _read(path: Path) -> Iterator[NumberedRow]:
    try:
        yield from read_numbered(path)
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror or error}).",
            "The system refuses it, so its rows are not known.",
            "Check that it exists and that you may read it. Nothing was written.",
        ) from error


def _checksum_notice(expected: str, files: Sequence[Path]) -> list[str]:
    if len(files) != 1:
        return ["file_sha1 is not checked: it is the checksum of one file, and this is a folder"]
    with files[0].open("rb") as stream:
        found = hashlib.file_digest(stream, "sha1").hexdigest()
    if found == expected.lower():
        return []
    return [
        f"file_sha1 says {expected}, and {files[0]} has {found}: it is another file than the entry "
        "describes, and is read as it is"
    ]


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
        for source in _resolve(given, settings, entries):
            found.append(replace(source, name=_unique(source.name, [other.name for other in found])))
    return tuple(found)


def _unique(name: str, taken: Sequence[str]) -> str:
    candidate, count = name, 1
    while candidate in taken:
        count += 1
        candidate = f"{name}-{count}"
    return candidate


def _resolve(given: str, settings: DataSettings, entries: Mapping[str, dict[str, Any]]) -> list[Source]:
    """Return the data set of a name: one source, or one per format of rows that were exported."""
    base = Path(settings.dataset_dir)
    if given in entries:
        return [_from_entry(given, entries[given], settings)]
    plain = Source(
        given, given, limit=settings.max_samples, columns=_named(settings.columns), tags=dict(settings.tags)
    )
    path = _find_path(given, base)
    if path is not None:
        exported = exported_files(path)
        if exported is not None:
            return [_of_export(plain, each, path) for each in exported]
        return [_of_files(replace(plain, name=_name_of(path)), path, None)]
    nearest = did_you_mean(given, _known_names(base, entries))
    is_path = _looks_like_path(given)
    if is_path or ("/" not in given and nearest):
        raise _not_found(given, base, nearest, hub=not is_path)
    return [replace(plain, hub=HubName(given))]


def _of_export(plain: Source, each: ExportedFile, path: Path) -> Source:
    """Return a file of an export, read as its manifest says."""
    entry = each.entry
    said = (
        f"data set '{plain.given}': {path} is an export; {each.path.name} is read as {EXPORT_MANIFEST} says"
    )
    source = replace(
        plain,
        name=_name_of(each.path),
        formatting=entry.get("formatting"),
        columns=_named({**plain.columns, **(entry.get("columns") or {})}),
        tags={**plain.tags, **(entry.get("tags") or {})},
        notices=(said,) if path.is_dir() else (),
    )
    return _of_files(source, each.path, None)


def _of_files(source: Source, path: Path, split: str | None, subset: str | None = None) -> Source:
    _check_place(path, source.given)
    found = held(path, source.given, split, subset)
    _check_names(found.files, source.given)
    kinds = {is_columnar(file) for file in found.files}
    mixed = (
        f"data set '{source.given}': Parquet or Arrow lies beside text files; null members are taken for "
        "padding in all of them, as columnar files need it",
    )
    return replace(
        source,
        files=found.files,
        split=found.split,
        of_split=found.of_split,
        notices=(*source.notices, *found.notices, *(mixed if len(kinds) > 1 else ())),
    )


def _check_place(path: Path, given: str) -> None:
    """Refuse what is neither a file nor a folder: a pipe gives its bytes once, a device may never end."""
    if path.is_file() or path.is_dir():
        return
    kind = "a pipe" if path.is_fifo() else "a socket" if path.is_socket() else "a device"
    raise DataError(
        f"dataset '{given}' is {path}, which is {kind}.",
        "Rows are read more than once: first to check them, then to prepare them.",
        "Write them to a file first, and give that. Nothing was written.",
    )


def _check_names(files: Sequence[Path], given: str) -> None:
    """Refuse a path that is no text: files are named in tables and messages."""
    for path in files:
        try:
            str(path).encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(
                f"dataset '{given}': the path {os.fsencode(path)!r} is not UTF-8.",
                "Its bytes are no text, so tables and messages could not name the file.",
                "Rename it (or the folder), for example with convmv. Nothing was written.",
            ) from error


def _name_of(path: Path) -> str:
    stem = path.stem if path.is_file() else path.name
    return Path(stem).stem if path.suffix.lower() in COMPRESSIONS and path.is_file() else stem


def _named(columns: Mapping[str, Any]) -> dict[str, Any]:
    """Return the declared roles that name a column; an entry may leave a name empty."""
    return {role: name for role, name in columns.items() if name not in (None, "")}


def _find_path(given: str, base: Path) -> Path | None:
    """Return the first file or folder of data by that name; a folder without data only if nothing else is."""
    named = [expanded(given), base / given, *(base / f"{given}{ending}" for ending in _ENDINGS)]
    there = [path.resolve() for path in named if path.exists()]
    return next((path for path in there if has_data(path)), there[0] if there else None)


def _looks_like_path(given: str) -> bool:
    suffixed = data_suffix(Path(given)) in READERS
    return suffixed or given.startswith((".", "/", "~")) or not _HUB_NAME.fullmatch(given)


def _known_names(base: Path, entries: Mapping[str, Any]) -> list[str]:
    files = sorted(base.iterdir()) if base.is_dir() else []
    usable = [path for path in files if is_data(path) and path.name != INFO_FILE]
    return [*entries, *(path.name for path in usable), *map(_name_of, usable)]


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
    check_entry(given, entry, info)
    count = entry.get("num_samples")
    stream = derive_seed(settings.seed, "num_samples", given)
    source = Source(
        given,
        given,
        draw=None if count is None else Draw(count, settings.max_samples, stream),
        limit=settings.max_samples,
        formatting=entry.get("formatting", "alpaca"),
        columns=_named({**settings.columns, **(entry.get("columns") or {})}),
        tags={**settings.tags, **(entry.get("tags") or {})},
        sha1=None if entry.get("hf_hub_url") else entry.get("file_sha1"),
        notices=entry_notices(given, entry),
    )
    if entry.get("hf_hub_url"):
        names = [entry.get(key) for key in ("subset", "split", "folder", "revision")]
        return replace(source, hub=HubName(entry["hf_hub_url"], names[0], names[1] or "train", *names[2:]))
    path = Path(settings.dataset_dir) / entry["file_name"]
    if not path.exists():
        raise DataError(
            f"dataset '{given}' is the file {path}, which is not there.",
            f"Its entry in {info} says file_name: {entry['file_name']}, below dataset_dir.",
            "Put the file there, or correct the entry.",
        )
    path = path.resolve()
    subset = entry.get("subset") if path.is_dir() and has_configs(path) else None
    source = replace(source, notices=entry_notices(given, entry, {"subset"} if subset else ()))
    return _of_files(source, path, entry.get("split"), subset)
