"""The memory of a run: digests and layouts of files that were read; unchanged ones are not read again.

``sources.json`` of the run folder holds, per split, what the first pass over its data sets found, and the
digests of weight and tokenizer files, and those of the run's own tables; each with the state (size, times of
the last change) of every file that it came from. A file whose state differs in anything is read again.
Deleting sources.json is harmless, but for a table that was changed before the next command: that is then not
noticed before the table is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dataflex_pipeline import __version__
from dataflex_pipeline.data.formats.layout import Layout
from dataflex_pipeline.data.scan import Scan, ScannedSource
from dataflex_pipeline.data.settings import DataSettings
from dataflex_pipeline.data.sources.columns import OriginalColumn
from dataflex_pipeline.data.sources.hub import hub_fingerprint
from dataflex_pipeline.data.sources.named import Source
from dataflex_pipeline.errors import CorruptError
from dataflex_pipeline.store.atomic import read_json, write_json
from dataflex_pipeline.store.fingerprint import FINGERPRINT_KEY, digest, file_digest, file_state
from dataflex_pipeline.store.parquet import corrupt, read_footer

VERSION = 3
"""Raised when the file is laid out differently."""


class Memo:
    """The memory of one run.

    Args:
        path: the JSON file; it need not be there.

    Raises:
        CorruptError: it is there and is not what this class wrote.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._files: dict[str, dict[str, Any]] = {}
        self._splits: dict[str, dict[str, Any]] = {}
        self._outputs: dict[str, dict[str, Any]] = {}
        self._changed = False
        if path.is_file():
            content = read_json(path)
            if not isinstance(content, dict) or not {"files", "splits", "version"} <= set(content):
                raise CorruptError(
                    f"{path} is not what this program wrote.",
                    "It remembers what the sources looked like when they were last read.",
                    "Delete it: the sources are then read again.",
                )
            if content["version"] == VERSION:
                self._files, self._splits = content["files"], content["splits"]
                self._outputs = content.get("outputs", {})

    def digest(self, path: Path) -> str:
        """Return the digest of a file, reading it only if it is not the file that was read before."""
        name, now = str(path.resolve()), file_state(path)
        known = self._files.get(name)
        if known is None or known["state"] != now:
            known = self._files[name] = {"state": now, "digest": file_digest(path)}
            self._changed = True
        return str(known["digest"])

    def know(self, path: Path, known: str) -> None:
        """Remember the digest of a file of the run that was just written, without reading it."""
        self._outputs[self._inside(path)] = {"state": _state(path), "digest": known}
        self._changed = True

    def written(self, path: Path) -> None:
        """Remember a table of the run as it was just written."""
        self.know(path, file_digest(path))
        self._outputs[self._inside(path)]["fingerprint"] = _fingerprint(path)

    def output_digest(self, path: Path) -> str:
        """Return the digest of a file of the run, reading it only if its size or time is another one."""
        known = self._outputs.get(self._inside(path))
        if known is None or known["state"] != _state(path):
            self.know(path, file_digest(path))
        return str(self._outputs[self._inside(path)]["digest"])

    def check_output(self, path: Path) -> None:
        """Check that a table of the run is the one that was written; one not known yet is remembered.

        Raises:
            CorruptError: its content is another one.
        """
        known = self._outputs.get(self._inside(path))
        if known is not None and known["state"] == _state(path):
            return
        # One of another fingerprint was made anew, by a command that was killed before it remembered.
        same_table = known is not None and known["fingerprint"] == _fingerprint(path)
        if known is not None and same_table and file_digest(path) != known["digest"]:
            raise corrupt(path, "its content is not what was written")
        self.written(path)

    def forget_output(self, path: Path) -> None:
        """Forget a table that is made anew."""
        self._changed |= self._outputs.pop(self._inside(path), None) is not None

    def _inside(self, path: Path) -> str:
        return path.resolve().relative_to(self._path.parent.resolve()).as_posix()

    def scan(self, split: str, key: str, sources: tuple[Source, ...]) -> Scan | None:
        """Return what the first pass over these sources found, or None if it has to be made.

        Args:
            split: pool or target. key: from `sources_key`, now. sources: resolved now.
        """
        known = self._splits.get(split)
        if known is None or known["key"] != key:
            return None
        scanned = [
            ScannedSource(
                source,
                Layout.from_plain(each["layout"]),
                each["rows"],
                each["digest"],
                tuple((name, *state) for name, *state in each["stamps"]),
                tuple(each["notices"]),
                each["passed_over"],
            )
            for source, each in zip(sources, known["sources"], strict=True)
        ]
        return Scan(tuple(scanned), tuple(OriginalColumn(name, kind) for name, kind in known["originals"]))

    def keep(self, split: str, key: str, scan: Scan) -> None:
        """Remember the first pass over the sources of a split."""
        self._changed = True
        self._splits[split] = {
            "key": key,
            "originals": [[each.name, each.kind] for each in scan.columns],
            "sources": [
                {
                    "layout": each.layout.as_plain(),
                    "rows": each.n_rows,
                    "digest": each.digest,
                    "stamps": [list(stamp) for stamp in each.stamps],
                    "notices": list(each.notices),
                    "passed_over": dict(each.passed_over),
                }
                for each in scan.sources
            ],
        }

    def save(self) -> None:
        """Write the file if anything was learnt."""
        if self._changed:
            content = {"version": VERSION, "files": self._files, "splits": self._splits}
            write_json(self._path, {**content, "outputs": self._outputs})
            self._changed = False


def _state(path: Path) -> list[int]:
    """Return size and time (ns) of the last change of a file of the run; a copy of the run has the same."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _fingerprint(path: Path) -> str:
    return read_footer(path).get(FINGERPRINT_KEY, b"").decode(errors="replace")


def sources_key(settings: DataSettings, sources: tuple[Source, ...]) -> str:
    """Return a digest of all that decides what the first pass finds: declarations and the files' states."""
    return digest(
        {
            "version": __version__,  # another edition may read the same bytes differently
            "group_column": settings.group_column,
            "sources": [{**_declared(source), "state": _source_state(source)} for source in sources],
        }
    )


def _declared(source: Source) -> Mapping[str, Any]:
    of_split = {name: [str(path) for path in files] for name, files in source.of_split.items()}
    return {**asdict(source), "files": [str(path) for path in source.files], "of_split": of_split}


def _source_state(source: Source) -> Any:
    if source.hub is not None:
        return hub_fingerprint(source.hub, source.given)
    return [file_state(path) for path in source.files]
