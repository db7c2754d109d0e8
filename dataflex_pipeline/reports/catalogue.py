"""The tables there are: those of a run folder, and the one that a path names."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from dataflex_pipeline.api import Split
from dataflex_pipeline.errors import UserError
from dataflex_pipeline.pipeline.base_model import is_base
from dataflex_pipeline.store.fingerprint import FINGERPRINT_KEY, digest
from dataflex_pipeline.store.parquet import read_footer
from dataflex_pipeline.store.parts import PartedTable
from dataflex_pipeline.store.run import RunFolder
from dataflex_pipeline.store.stale import found_ingredients
from dataflex_pipeline.training.kept import kept_folder

Kind = Literal["pool", "target", "test", "feature", "scores", "probabilities", "selection", "index", "table"]
NOTE = b"dataflex."
PARQUET = b"PAR1"
_FEATURE = re.compile(r"(?P<name>\w+)-(?P<split>pool|target|test)-[0-9a-f]{16}")
_STEP = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class RunTable:
    """One finished table.

    Attributes:
        kind: what it is; "table" for a Parquet file that is none of a run's.
        path: its file, or the folder of its parts. files: the Parquet files, in row order.
        view: its name in queries.
        name: of the feature or method; empty for others. round: whose; of a feature, the checkpoint's.
        split: whose rows it has lines for.
    """

    kind: Kind
    path: Path
    files: tuple[Path, ...]
    view: str
    name: str = ""
    round: int | None = None
    split: Split = "pool"

    @property
    def n_rows(self) -> int:
        """Lines of the table, from the footers."""
        return sum(int(pq.read_metadata(file).num_rows) for file in self.files)

    @property
    def n_bytes(self) -> int:
        """Bytes on disk."""
        return sum(file.stat().st_size for file in self.files)

    @property
    def schema(self) -> pa.Schema:
        """Its columns."""
        return pq.read_schema(self.files[0])

    def notes(self) -> dict[str, str]:
        """Return what the footer says of the table: method, round, notices, fingerprint, version, ...

        Raises:
            CorruptError: the file is truncated or not Parquet.
        """
        footer = read_footer(self.files[0])
        return {
            key.removeprefix(NOTE).decode(errors="replace"): value.decode(errors="replace")
            for key, value in footer.items()
            if key.startswith(NOTE)
        }

    def ingredients(self) -> dict[str, Any]:
        """Return what the table was made from; empty for a table that is not of a run."""
        if self.kind == "table" and FINGERPRINT_KEY not in read_footer(self.files[0]):
            return {}
        return found_ingredients(self.path) or {}


def tables_of(run: RunFolder) -> list[RunTable]:
    """Return every finished table of a run; those set aside or cut off are none.

    Raises:
        CorruptError: a table is damaged.
    """
    found = [*_splits(run), *_features(run), *_rounds(run)]
    counts = Counter(table.view for table in found)
    return [
        replace(table, view=f"{table.view}_{table.path.name[-16:-8]}") if counts[table.view] > 1 else table
        for table in found
    ]


def _splits(run: RunFolder) -> Iterator[RunTable]:
    splits: tuple[Split, ...] = ("pool", "target", "test")
    for split in splits:
        folder = run.folder / split
        if PartedTable.is_complete(folder):
            yield RunTable(split, folder, _parts(folder), split, split=split)


def _parts(folder: Path) -> tuple[Path, ...]:
    return tuple(PartedTable.open(folder).files)


def _features(run: RunFolder) -> Iterator[RunTable]:
    checkpoints = _checkpoints(run)
    for folder, match in _feature_folders(run, checkpoints):
        checkpoint = PartedTable.open(folder).ingredients.get("checkpoint")
        number, step = checkpoints.get(checkpoint, (None, None))
        after = "" if number is None else f"_after_{number}" + ("" if step is None else f"_step_{step}")
        after = "_of_base" if is_base(checkpoint) else after
        view = f"{match['name']}_{match['split']}{after}"
        split: Any = match["split"]
        yield RunTable("feature", folder, _parts(folder), view, match["name"], number, split)


def _feature_folders(
    run: RunFolder, checkpoints: Mapping[str | None, object]
) -> Iterator[tuple[Path, re.Match[str]]]:
    """Yield the folders of finished features: all of the run's own, and of a shared cache those of the run.

    These are over its prepared rows, and computed with a model of its own or with none.
    """
    rows = {str(each.split): PartedTable.open(each.path).fingerprint for each in _splits(run)}
    own, *shared = run.feature_folders()
    seen: set[str] = set()
    for folder in [path for place in (own, *shared) for path in sorted(place.glob("*"))]:
        match = _FEATURE.fullmatch(folder.name)
        if match is None or folder.name in seen or not PartedTable.is_complete(folder):
            continue
        if folder.parent != own:
            made_from = found_ingredients(folder) or {}
            model = made_from.get("checkpoint")
            if made_from.get("rows") != rows.get(match["split"]):
                continue
            if model is not None and model not in checkpoints and not is_base(model):
                continue
        seen.add(folder.name)
        yield folder, match


def _checkpoints(run: RunFolder) -> dict[str | None, tuple[int | None, int | None]]:
    """Return round, and step where it is one inside the round, of every checkpoint's fingerprint."""
    found: dict[str | None, tuple[int | None, int | None]] = {}
    for number in rounds_of(run):
        checkpoint = run.round(number).checkpoint
        ingredients = found_ingredients(checkpoint)
        if ingredients is None:
            continue
        found[digest(ingredients)] = (number, None)
        for folder in kept_folder(checkpoint, 0).parent.glob("step-*[0-9]"):
            match = _STEP.fullmatch(folder.name)
            if match is not None:
                step = int(match[1])
                found[digest({**ingredients, "step": step})] = (number, step)
    return found


def rounds_of(run: RunFolder) -> list[int]:
    """Return the numbers of the rounds that have a folder, sorted."""
    return run.rounds()


def _rounds(run: RunFolder) -> Iterator[RunTable]:
    kinds: tuple[Literal["scores", "probabilities"], ...] = ("scores", "probabilities")
    for number in rounds_of(run):
        where = run.round(number)
        for kind in kinds:
            for path in sorted((where.folder / kind).glob("*.parquet")):
                read_footer(path)
                view = f"{kind}_{number}_{path.stem}"
                yield RunTable(kind, path, (path,), view, path.stem, number)
        own = [where.selection] if where.selection.is_file() else []
        for path in [*own, *where.named_selections()]:
            read_footer(path)
            name = "" if path == where.selection else path.parent.name
            view = f"selection_{number}" + (f"_{name}" if name else "")
            yield RunTable("selection", path, (path,), view, name, number)
        if where.index.is_file():
            read_footer(where.index)
            yield RunTable("index", where.index, (where.index,), f"idx_{number}", "", number)


def run_above(path: Path) -> RunFolder | None:
    """Return the run that a path lies in, or None."""
    for folder in (path, *path.parents, *path.resolve().parents):
        if (folder / "run.yaml").is_file():
            return RunFolder(folder)
    return None


def table_at(path: Path, tables: list[RunTable]) -> RunTable:
    """Return the table that a path names.

    Args:
        path: a Parquet file, or a folder of parts. tables: of the run that it lies in.

    Raises:
        UserError: it is neither. CorruptError: it is damaged or unfinished.
    """
    for table in tables:
        if path.resolve() in (table.path.resolve(), *(file.resolve() for file in table.files)):
            return table
    if path.is_dir() and any(path.glob("part-*.parquet")):
        return _alone(path, _parts(path))
    if path.is_file() and is_parquet(path):
        return _alone(path, (path,))
    raise UserError(
        f"{path} is no table.",
        "A table is a Parquet file or a folder of parts (part-00000.parquet, ...), as runs have them.",
        "Name one of those, or a run; `dataflex inspect RUN` lists the tables of a run.",
    )


def is_parquet(path: Path) -> bool:
    """Whether a file begins as Parquet files do; one that then cannot be read is damaged."""
    with path.open("rb") as stream:
        return stream.read(len(PARQUET)) == PARQUET


def _alone(path: Path, files: tuple[Path, ...]) -> RunTable:
    """Return a table that lies in no run, as what its footer says that it is."""
    made_from = found_ingredients(path) if FINGERPRINT_KEY in read_footer(files[0]) else None
    found = made_from or {}
    kinds: tuple[Kind, ...] = ("scores", "probabilities", "selection", "index")
    of_round: Kind = next((each for each in kinds if each == found.get("table")), "table")
    kind: Kind = "feature" if "feature" in found else of_round
    split = found.get("split", "pool")
    if kind == "table" and split in ("pool", "target", "test") and "sources" in found:
        kind = split
    name = str(found.get("feature") or found.get("method") or "")
    return RunTable(kind, path, files, "this", name, found.get("round"), split)
