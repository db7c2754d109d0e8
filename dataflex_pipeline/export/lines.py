"""Selected rows as files of JSON lines, at a place of the user's choice."""

from __future__ import annotations

import filecmp
import glob
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from dataflex_pipeline.data.sources.folders import INFO_FILE
from dataflex_pipeline.export.conversations import Trainer
from dataflex_pipeline.export.selected import Choice
from dataflex_pipeline.export.subset import Written, write_info, write_subset
from dataflex_pipeline.store.atomic import commit, set_aside
from dataflex_pipeline.store.chosen_files import check_folder, in_the_way
from dataflex_pipeline.store.parts import PartedTable

Say = Callable[[str], None]
Overwrite = Literal["never", "aside", "replace"]
"""What becomes of a file that is there with another content: refused, renamed, or replaced."""


def write_lines(
    choice: Choice, file: Path, trainer: Trainer, say: Say, overwrite: Overwrite = "never"
) -> list[tuple[Path, int, bool]]:
    """Write rows as JSON lines: one file, or beside each other one for each format.

    Args:
        choice: the rows. file: where to; several formats put their names before its ending.
        trainer: the form of the rows. say: is told what a user should know.
        overwrite: what becomes of a file that is there with another content, and of those that an earlier
            export of other formats left beside it.

    Returns:
        Each file, its lines, and whether it was written: one that has this content already is left alone.

    Raises:
        UserError: there is no such folder, another file is there, or a trainer has no form for the rows.
    """
    check_folder(file)
    place = file.absolute().parent
    with _scratch(place / f".{file.name}.dataflex-export") as made:
        pool = PartedTable.open(choice.run.pool)
        written = write_subset(pool, choice.lines(), made, say, trainer, file.stem, parquet=False)
        several = len(written.files) > 1
        places = {made / name: file.with_name(name) if several else file for name in written.files}
        new = {source: final for source, final in places.items() if not _is_there(source, final, overwrite)}
        for old in [*_of_another_export(file, places.values()), *filter(Path.exists, new.values())]:
            if overwrite == "never":
                raise in_the_way(old)
            if overwrite == "replace":
                old.unlink()
            else:
                say(f"the old {old} is now {set_aside(old)}")
        for source, final in new.items():
            commit(source, final)
    _say_how(written, place, trainer, say)
    counts = written.files.values()
    return [
        (final, count, source in new) for (source, final), count in zip(places.items(), counts, strict=True)
    ]


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """Yield an empty folder beside the file; the next call removes what a killed one left."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _of_another_export(file: Path, places: Iterable[Path]) -> list[Path]:
    """Return files of rows beside a file that an export of it would have written, and this one does not."""
    named = (file, *sorted(file.parent.glob(f"{glob.escape(file.stem)}-*{glob.escape(file.suffix)}")))
    return [path for path in named if path not in {*places} and path.is_file() and _is_exported(path)]


def _is_exported(path: Path) -> bool:
    with path.open("rb") as stream:
        return b'"_row_id"' in stream.readline()


def _is_there(source: Path, final: Path, overwrite: Overwrite) -> bool:
    """Whether a file with this very content is there.

    Raises:
        UserError: another one is, and nothing says to set it aside.
    """
    if not final.exists():
        return False
    if final.is_file() and filecmp.cmp(source, final, shallow=False):
        return True
    if overwrite == "never" or not final.is_file():
        raise in_the_way(final)
    return False


def _say_how(written: Written, place: Path, trainer: Trainer, say: Say) -> None:
    """Say how files are read where their columns alone do not tell."""
    info = place / INFO_FILE
    if trainer == "llama-factory":
        if not info.exists():
            write_info(place, written.entries)
            say(f"{info} says how LLaMA-Factory reads them: dataset: {','.join(written.entries)}")
        elif not _has(info, written.entries):
            text = json.dumps(dict(written.entries), indent=2)
            say(f"{info} is not ours, and stays as it is; paste into it:\n{text}")
        return
    for stem in written.untold:
        entry = json.dumps({stem: written.entries.get(stem)})
        say(f"{stem}.jsonl is read by the columns set for its data. An entry of {INFO_FILE}: {entry}")


def _has(info: Path, entries: Mapping[str, Any]) -> bool:
    """Whether a file has these entries already."""
    try:
        found = json.loads(info.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return isinstance(found, dict) and all(found.get(name) == entry for name, entry in entries.items())
