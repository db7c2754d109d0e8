"""The run folder: its paths, its lock, and the record of its settings.

runs/<name>/
  run.yaml              the resolved configuration, and how the run came about
  pool/  target/        prepared rows
  features/             costly tables, shared by methods and rounds; with features_dir they lie there
  round-00/             index.parquet  checkpoint/           (the warm-up)
  round-01/             scores/  probabilities/  selection.parquet  index.parquet  checkpoint/
                        passed_over.parquet  (with max_similarity)
                        selections/<name>/  (others that were tried; nothing is trained on them)
  history.jsonl         one line per finished piece of work
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataflex_pipeline.config.yaml_files import dump_yaml, parse_value
from dataflex_pipeline.errors import ConfigError, CorruptError, RunError
from dataflex_pipeline.home import expanded
from dataflex_pipeline.store.atomic import write_text
from dataflex_pipeline.store.locks import InUseError, held
from dataflex_pipeline.store.versions import installed_versions

_ROUND = re.compile(r"round-(\d+)")
BEST = "best"
"""Folder of a run that holds a copy of its best checkpoint."""
PROBABILITIES = "probabilities.parquet"
"""The probabilities of a selection with a name, in its folder."""
PASSED_OVER_FILE = "passed_over.parquet"
"""The rows that a selection passed over for being too like others, beside it."""
RECORD = "run"
"""Key of run.yaml that holds what is not configuration."""


@dataclass(frozen=True)
class RoundFolder:
    """The files of one round."""

    folder: Path
    number: int

    def scores(self, method: str) -> Path:
        """Path of a method's score table."""
        return self.folder / "scores" / f"{method}.parquet"

    def probabilities(self, method: str) -> Path:
        """Path of a method's probability table."""
        return self.folder / "probabilities" / f"{method}.parquet"

    @property
    def selection(self) -> Path:
        """Path of the selection that the round's index is made from."""
        return self.folder / "selection.parquet"

    def selection_named(self, name: str) -> Path:
        """Path of another selection, which has a name and is never trained on."""
        return self.folder / "selections" / name / "selection.parquet"

    def named_selections(self) -> list[Path]:
        """Return the selections there are that have a name, sorted by it."""
        return sorted(self.folder.glob("selections/*/selection.parquet"))

    @property
    def index(self) -> Path:
        """Path of the weighted index that the round trains on."""
        return self.folder / "index.parquet"

    @property
    def checkpoint(self) -> Path:
        """Folder of the round's final checkpoint."""
        return self.folder / "checkpoint"

    @property
    def metrics(self) -> Path:
        """Path of the table of `dataflex evaluate`: one line per task and metric."""
        return self.folder / "evaluation" / "metrics.parquet"

    @property
    def work(self) -> Path:
        """Folder of checkpoints inside the round, while it trains."""
        return self.folder / "training"


class RunFolder:
    """One run on disk.

    Args:
        folder: the run's folder; nothing is created until something is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.settings = folder / "run.yaml"
        self.features = folder / "features"
        self.history = folder / "history.jsonl"

    @property
    def pool(self) -> Path:
        """Folder of the prepared pool."""
        return self.split("pool")

    def split(self, name: str) -> Path:
        """Return the folder of the prepared pool, target or test rows."""
        return self.folder / name

    def round(self, number: int) -> RoundFolder:
        """Return the files of round ``number``."""
        return RoundFolder(self.folder / f"round-{number:02d}", number)

    def rounds(self) -> list[int]:
        """Return the numbers of the rounds that have a folder, sorted."""
        matches = (_ROUND.fullmatch(path.name) for path in self.folder.glob("round-*"))
        return sorted(int(match[1]) for match in matches if match is not None)

    @property
    def base_metrics(self) -> Path:
        """Path of the table of `dataflex evaluate --round base`: the figures of the base model."""
        return self.folder / "base" / "evaluation" / "metrics.parquet"

    def feature_folders(self) -> list[Path]:
        """Return where the run's features may lie: its own folder, and the cache that run.yaml names."""
        shared = self.read()[0].get("features_dir") if self.exists() else None
        return [self.features, *([] if shared is None else [expanded(shared)])]

    def exists(self) -> bool:
        """Whether the run was ever started."""
        return self.settings.is_file()

    def read(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the configuration and the record (global batch, provenance) of run.yaml.

        Raises:
            CorruptError: run.yaml is not what this program wrote.
        """
        try:
            content = parse_value(self.settings.read_text(encoding="utf-8"), self.settings.name)
        except (ConfigError, UnicodeDecodeError) as error:
            raise self.unreadable(str(error).splitlines()[0].rstrip(".")) from error
        if not isinstance(content, dict) or not isinstance(content.get(RECORD), dict):
            raise self.unreadable(f"the section '{RECORD}:' is missing")
        return {key: value for key, value in content.items() if key != RECORD}, content[RECORD]

    def unreadable(self, found: str) -> CorruptError:
        """Return the error for a run.yaml that is not what this program wrote; ``found`` says why."""
        return CorruptError(
            f"{self.settings} cannot be read: {found}.",
            "It records what the run was made with, so nothing can be trusted without it.",
            "Restore it, or start a run of another name.",
        )

    def write(self, configuration: Mapping[str, Any], record: Mapping[str, Any]) -> None:
        """Write run.yaml if it would change."""
        text = dump_yaml({**configuration, RECORD: dict(record)})
        if not self.settings.is_file() or self.settings.read_text(encoding="utf-8") != text:
            write_text(self.settings, text)

    def settings_text(self) -> str | None:
        """Return run.yaml as it stands; None where there is none."""
        return self.settings.read_text(encoding="utf-8") if self.settings.is_file() else None

    def take_back(self, text: str | None) -> None:
        """Put run.yaml back to what `settings_text` returned before settings that turned out unusable."""
        if text is None:
            self.settings.unlink(missing_ok=True)
        elif self.settings_text() != text:
            write_text(self.settings, text)

    def made(self, *, begins: bool) -> dict[str, int]:
        """Return the files that were made with the settings, each with its time of change [ns].

        Args:
            begins: leave out what a run that only begins has at once: its rows, and the index of round 0.
        """
        patterns = ["features/*/*", "round-*/scores/*", "round-*/checkpoint/*", "round-*/training/*"]
        patterns += [] if begins else ["pool/*.json", "target/*.json", "round-*/*.parquet"]
        paths = (path for pattern in patterns for path in self.folder.glob(pattern))
        return {str(path): path.stat().st_mtime_ns for path in paths}

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Own the run for writing; the lock ends with the process, however it ends.

        Raises:
            RunError: another process owns it, or something else lies where it keeps its files.
        """
        self.check_places()
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(held(self.folder / ".lock"))
            except InUseError as error:
                raise RunError(
                    f"The run {self.folder} is in use by another process ({error.who}).",
                    "Two processes writing to one run would mix their results.",
                    "Wait until it is done, or use another run name.",
                ) from error
            yield

    def records(self) -> list[Path]:
        """Return the files at the top of the folder that say what the run is, whether there or not."""
        return [self.settings, self.history, self.folder / "sources.json"]

    def check_places(self) -> None:
        """Check that nothing else has the name of a file or folder that the run needs.

        Raises:
            RunError: a link leads nowhere, a folder or a device lies where a file belongs, or a file where a
                folder does.
        """
        files = self.records()
        rounds = [self.round(number).folder for number in self.rounds()]
        folders = [self.folder, self.features, *map(self.split, ("pool", "target", "test")), *rounds]
        for path in (*files, *folders):
            is_right = path.is_file() if path in files else path.is_dir()
            if not is_right and (path.is_symlink() or path.exists()):
                raise RunError(
                    f"{path} is no {'file' if path in files else 'folder'}, or a link that leads nowhere.",
                    "The run keeps something of its own by that name.",
                    "Move it away, or use another run name.",
                )

    def note(self, **entry: Any) -> None:
        """Append one line to the history: what was done, when, and how long it took."""
        line = json.dumps({"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **entry}, ensure_ascii=False)
        with self.history.open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")


def provenance() -> dict[str, Any]:
    """Return versions and hardware, for run.yaml; nothing that names a user or holds a secret."""
    return {
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": installed_versions(),
        "hardware": {"machine": platform.machine(), "system": platform.system(), "cores": os.cpu_count()},
        "git": _git_commit(),
    }


def _git_commit() -> str | None:
    """Return the commit of the package's own checkout, or None outside of one."""
    root = Path(__file__).resolve().parents[2] / ".git"
    head = root / "HEAD"
    if not head.is_file():
        return None
    text = head.read_text().strip()
    if not text.startswith("ref: "):
        return text
    reference = root / text.removeprefix("ref: ")
    return reference.read_text().strip() if reference.is_file() else None
