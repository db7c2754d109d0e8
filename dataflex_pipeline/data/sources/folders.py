"""Files of a path: those of each split, in order, and what lies beside them and is not read.

A folder that ``datasets`` saved (state.json, dataset_dict.json) is read as it says, and one whose README.md
has configs by these. In any other folder the names of files tell their split as they do for ``datasets``:
``train``, ``validation`` or ``test`` as a word of its own.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from dataflex_pipeline.data.sources.compressed import COMPRESSIONS
from dataflex_pipeline.data.sources.readers import READERS, is_data
from dataflex_pipeline.data.sources.readme_configs import README, FolderConfig, folder_config, has_configs
from dataflex_pipeline.errors import DataError, did_you_mean

INFO_FILE, STATE_FILE, DICT_FILE = "dataset_info.json", "state.json", "dataset_dict.json"
_METADATA_FILES = frozenset({INFO_FILE, STATE_FILE, DICT_FILE, "dataset_infos.json"})
_COMPANIONS = re.compile(
    r"(readme|license|licence|notice|citation|makefile|_success|.*sums?$)"
    r"|.*\.(md|rst|py|sh|ya?ml|toml|bib|lock|log|png|jpe?g|gif|svg|pdf|html|md5|sha1|sha256|crc)$",
    re.IGNORECASE,
)
_WORDS = {
    "train": "train|training",
    "validation": "validation|valid|val|dev",
    "test": "test|testing|eval|evaluation",
}
_SHARD = re.compile(r"(.+)-\d{5}-of-(\d{5})\.")
_SPLIT_NAME = re.compile(r"\s*(\w+(?:\.\w+)*)")
_MOST, _MOST_INSIDE = 6, 20_000


@dataclass(frozen=True)
class Held:
    """The files that a name and a split stand for.

    Attributes:
        files: all that are read, in order. split: a slice or sum of splits, such as ``train[:10%]``; None
            where all rows of the files are meant. of_split: the files of each split that it names.
        notices: what of the folder is not read, one sentence each.
    """

    files: tuple[Path, ...]
    split: str | None = None
    of_split: Mapping[str, tuple[Path, ...]] = field(default_factory=dict)
    notices: tuple[str, ...] = ()


def has_data(path: Path) -> bool:
    """Whether a path is a file, or a folder with rows in it."""
    if not path.is_dir():
        return path.is_file()
    return (path / DICT_FILE).is_file() or has_configs(path) or bool(_data_files(path))


def held(path: Path, given: str, split: str | None, subset: str | None = None) -> Held:
    """Return the files of a path that a split asks for; without one, all that are to be read together.

    Args:
        path: a file or folder. given: what the user wrote. split: name, slice or sum of splits.
        subset: the config of the folder's README.md.

    Raises:
        DataError: there is no such split, none is named where one has to be, or there are no data files.
    """
    if path.is_file():
        own = split_by_name(path.name)
        return _chosen({"train": (path,)} | ({own: (path,)} if own else {}), given, split or "train", path)
    if (path / DICT_FILE).is_file():
        return _saved_splits(path, given, split)
    saved = _saved(path)
    if saved is not None:
        state, files = saved
        name = _base_names(state.get("_split") or "train")[0]
        found = _chosen({name: files}, given, split or name, path)
        return _with_notices(found, _saved_notices(path, given, state), _beside(path, files, given))
    config = folder_config(path, given, subset)
    if config is not None:
        return _configured(path, config, given, split)
    files = _data_files(path)
    if not files:
        raise _nothing_read(path, given)
    return _folder(path, files, given, split)


def _folder(path: Path, files: tuple[Path, ...], given: str, split: str | None) -> Held:
    names = {file: split_by_name(file.name) for file in files}
    beside = _beside(path, files, given)
    if split is None:
        chosen, notices = _by_default(path, names, given)
        return _with_notices(chosen, notices, _doubts(chosen.files, given), beside)
    of_split: dict[str, tuple[Path, ...]] = {}
    for file, kind in names.items():
        shard = _SHARD.match(file.name)
        implied = kind or ("" if "train" in names.values() else "train")
        for name in {implied, shard.group(1) if shard else "", file.stem} - {""}:
            of_split[name] = (*of_split.get(name, ()), file)
    found = _chosen(of_split, given, split, path)
    plain = [file.name for file in files if names[file] is None and file not in found.files]
    left_out = _not_read(given, path, plain, "their names tell no split")
    return _with_notices(found, left_out, _doubts(found.files, given), beside)


def _configured(path: Path, config: FolderConfig, given: str, split: str | None) -> Held:
    """Return the files of a split as README.md has it: train, the only one, or the one that is named."""
    of_split = config.of_split
    chosen = split or ("train" if "train" in of_split else next(iter(of_split)))
    if split is None and "train" not in of_split and len(of_split) > 1:
        raise DataError(
            f"dataset '{given}' is the folder {path}, and its {README} has the splits {', '.join(of_split)}.",
            "None of them is train, and which of them is meant is not said.",
            f"Name one with split in an entry of {INFO_FILE}: file_name: {path}, split: {chosen}.",
        )
    found = _chosen(of_split, given, chosen, path)
    notices = []
    named = {file for files in of_split.values() for file in files}
    if split is None and (len(of_split) > 1 or chosen != "train"):
        rest = [f"{name} ({listed(files)})" for name, files in of_split.items() if name != chosen]
        notices.append(
            f"of the folder {path} the split {chosen} is read ({listed(found.files)}), as its {README} has it"
            + (f"; not read: {', '.join(rest)}" if rest else "")
            + f". Another split is named by `split` in an entry of {INFO_FILE}"
        )
    if config.others:
        notices.append(
            f"the config '{config.name}' of {path / README} is read; not read: "
            f"{shortened(config.others)}. Another config is named by `subset` in an entry of {INFO_FILE}"
        )
    if config.unused:
        notices.append(
            f"{path / README} sets {', '.join(config.unused)} for the config '{config.name}', which is not "
            "used: files are read by what is in them"
        )
    inside = [file for file in islice(path.rglob("*"), _MOST_INSIDE) if is_data(file) and file.is_file()]
    names = [file.relative_to(path).as_posix() for file in sorted(set(inside) - named)]
    unnamed = [name for name in names if name not in _METADATA_FILES and not f"/{name}".count("/.")]
    beside = _not_read(given, path, unnamed, f"{README} does not name them for the config '{config.name}'")
    said = [f"data set '{given}': {line}" for line in notices]
    return _with_notices(found, said, _doubts(found.files, given), beside)


def _doubts(files: Sequence[Path], given: str) -> list[str]:
    """Say which of the files may hold the same rows, and of which numbered parts some are not there."""
    same: dict[str, list[str]] = {}
    parts: dict[tuple[str, int], int] = Counter()
    for file in files:
        same.setdefault(Path(_unpacked(file)).stem, []).append(file.name)
        shard = _SHARD.match(file.name)
        if shard is not None:
            parts[shard.group(1), int(shard.group(2))] += 1
    lines = [
        f"{shortened(names)} have one name but for the extension, and all are read: are they copies?"
        for names in same.values()
        if len(names) > 1
    ]
    lines += [
        f"{found} of the {whole} files of {name} are there ({name}-...-of-{whole:05d}); the rest is not read"
        for (name, whole), found in parts.items()
        if found < whole
    ]
    return [f"data set '{given}': {line}" for line in lines]


def _by_default(path: Path, names: Mapping[Path, str | None], given: str) -> tuple[Held, list[str]]:
    """Return the files to read where no split is named: train's beside others, else all; and what to say."""
    how = f"`split` in an entry of {INFO_FILE}"
    held_out = [file for file, kind in names.items() if kind not in (None, "train")]
    if held_out and "train" in names.values():
        chosen = tuple(file for file, kind in names.items() if kind == "train")
        return Held(chosen), [
            f"data set '{given}': of the folder {path} only the train split is read ({listed(chosen)}); "
            f"not read: {listed([file for file in names if file not in chosen])}. Another split is named by "
            f"{how}"
        ]
    if held_out and len(set(names.values())) > 1:
        return Held(tuple(names)), [
            f"data set '{given}': {listed(held_out)} in {path} is read together with the other files, though "
            f"by name it is a split of its own. A single split is named by {how}"
        ]
    return Held(tuple(names)), []


def split_by_name(name: str) -> str | None:
    """Return the split that a file's name tells: train, validation or test; None for none or several."""
    found = [
        split
        for split, words in _WORDS.items()
        if re.search(rf"(^|[-._ 0-9])({words})[-._ 0-9]", name.lower())
    ]
    return found[0] if len(found) == 1 else None


def _chosen(of_split: Mapping[str, tuple[Path, ...]], given: str, split: str, path: Path) -> Held:
    if split in of_split:
        return Held(of_split[split])
    names = _base_names(split)
    for name in names:
        if name not in of_split:
            known = ", ".join(sorted(of_split))
            raise DataError(
                f"dataset '{given}': split is {split}, and {path} has no split "
                f"'{name}'.{did_you_mean(name, of_split)}",
                f"Its splits are {known}; a single file is the train split, unless its name says another.",
                f"Correct split in its entry of {INFO_FILE}, or take it out.",
            )
    wanted = {name: of_split[name] for name in dict.fromkeys(names)}
    files = dict.fromkeys(file for each in wanted.values() for file in each)
    return Held(tuple(files), split, wanted)


def _base_names(split: str) -> list[str]:
    """Return the names of the splits in a sum of slices: 'train[:10%]+test' names train and test."""
    found = [_SPLIT_NAME.match(part) for part in str(split).split("+")]
    return [
        match.group(1) if match else part for match, part in zip(found, str(split).split("+"), strict=True)
    ]


def _saved_splits(path: Path, given: str, split: str | None) -> Held:
    names = _json(path / DICT_FILE).get("splits")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise _damaged(path / DICT_FILE, "it names no splits")
    if split is None and len(names) > 1:
        raise DataError(
            f"dataset '{given}' is the folder {path}, which holds the splits {', '.join(names)}.",
            "They were saved apart, and which of them is meant is not said.",
            f"Give one of them as {path / names[0]}, or an entry of {INFO_FILE} with split: {names[0]}.",
        )
    found = {name: _saved(path / name) for name in names}
    gone = [name for name, saved in found.items() if saved is None]
    if gone:
        raise _damaged(
            path / DICT_FILE, f"it names the split {gone[0]}, and {path / gone[0]} is no saved one"
        )
    of_split = {name: saved[1] for name, saved in found.items() if saved is not None}
    chosen = _chosen(of_split, given, split or names[0], path)
    notices: list[str] = []
    for name, saved in found.items():
        if saved is not None and set(saved[1]) & set(chosen.files):
            notices += _saved_notices(path / name, given, saved[0])
            notices += _beside(path / name, saved[1], given)
    other = [entry.name for entry in _visible(path) if entry.is_file() and is_data(entry)]
    return _with_notices(chosen, notices, _not_read(given, path, other, f"{DICT_FILE} does not name them"))


def _saved(path: Path) -> tuple[dict[str, Any], tuple[Path, ...]] | None:
    """Return state.json of a folder that `datasets` saved, and the files that it names; None for another."""
    if not (path / STATE_FILE).is_file():
        return None
    state = _json(path / STATE_FILE)
    if "_data_files" not in state:
        return None
    try:
        files = tuple(path / str(each["filename"]) for each in state["_data_files"])
    except (TypeError, KeyError) as error:
        raise _damaged(path / STATE_FILE, "_data_files is no list of files") from error
    gone = [file.name for file in files if not file.is_file()]
    if gone:
        raise _damaged(path / STATE_FILE, f"it names {gone[0]}, which is not there")
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise DataError(
            f"{path} was saved with an index of rows beside the data ({STATE_FILE} names one).",
            "Early versions of `datasets` did that; the files alone hold other rows, in another order.",
            "Load it with that version, call flatten_indices() and save it again.",
        )
    return state, files


def _saved_notices(path: Path, given: str, state: Mapping[str, Any]) -> list[str]:
    shown = state.get("_format_columns")
    if not shown or state.get("_output_all_columns"):
        return []
    return [
        f"data set '{given}': {path / STATE_FILE} shows only the columns {', '.join(shown)} (set_format); "
        "here all columns of the files are read"
    ]


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"it is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise _damaged(path, "it is not an object")
    return content


def _damaged(path: Path, why: str) -> DataError:
    return DataError(
        f"{path} cannot be used: {why}.",
        "It says which files hold the rows of a saved data set, and in which order.",
        "Save the data set again, or give the data files themselves. Nothing was written.",
    )


def _with_notices(found: Held, *more: Sequence[str]) -> Held:
    notices = (*found.notices, *(line for lines in more for line in lines))
    return Held(found.files, found.split, found.of_split, notices)


def _visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.name[0] != "." and path.name != "__pycache__")


def _data_files(folder: Path) -> tuple[Path, ...]:
    """Return the data files of a folder; of one that `datasets` saved, those that it names."""
    saved = _saved(folder)
    if saved is not None:
        return saved[1]
    named = [path for path in _visible(folder) if path.is_file() and is_data(path)]
    files = [path for path in named if path.name not in _METADATA_FILES]
    first = {_unpacked(path): path for path in reversed(files)}  # a.jsonl comes before a.jsonl.gz
    return tuple(path for path in files if first[_unpacked(path)] == path)


def _unpacked(path: Path) -> str:
    """Return the name that a file has without compression."""
    return path.stem if path.suffix.lower() in COMPRESSIONS else path.name


def _beside(folder: Path, files: Sequence[Path], given: str) -> tuple[str, ...]:
    """Say what else is in the folder and looks like data."""
    caches, others, folders, copies = [], [], [], []
    names = {_unpacked(file) for file in _data_files(folder)}
    for entry in _visible(folder):
        if entry.is_dir():
            folders += [f"{entry.name}/"] if _inside(entry) else []
        elif entry in files or entry.name in _METADATA_FILES or _COMPANIONS.match(entry.name):
            continue
        elif (folder / STATE_FILE).is_file():
            caches.append(entry.name)
        elif is_data(entry) and _unpacked(entry) in names:
            copies.append(entry.name)
        else:
            others.append(entry.name)
    kinds = f"no data in a form that is read ({', '.join(READERS)}; text also with {', '.join(COMPRESSIONS)})"
    return (
        *_not_read(given, folder, caches, f"{STATE_FILE} does not name them"),
        *_not_read(given, folder, copies, "by name it holds the rows of a file that is read"),
        *_not_read(given, folder, others, kinds),
        *_not_read(given, folder, folders, "folders inside a folder are not searched"),
    )


def _inside(folder: Path) -> bool:
    """Whether there are data files somewhere below a folder; of a very large one only a part is looked at."""
    return any(is_data(path) and path.is_file() for path in islice(folder.rglob("*"), _MOST_INSIDE))


def _not_read(given: str, folder: Path, names: Sequence[str], why: str) -> tuple[str, ...]:
    if not names:
        return ()
    return (f"data set '{given}': not read in {folder}: {shortened(names)} ({why})",)


def listed(files: Sequence[Path]) -> str:
    """Return the names of files, shortened."""
    return shortened([file.name for file in files])


def shortened(names: Sequence[str]) -> str:
    """Return names as one text; of many, the first ones and how many there are."""
    more = f" and {len(names) - _MOST} more" if len(names) > _MOST else ""
    return ", ".join(names[:_MOST]) + more


def _nothing_read(path: Path, given: str) -> DataError:
    names = shortened(sorted(entry.name for entry in path.iterdir())) or "nothing"
    inside = [entry for entry in _visible(path) if entry.is_dir() and _inside(entry)]
    nearer = f", for example {inside[0]}" if inside else ""
    return DataError(
        f"dataset '{given}' is the folder {path}, which holds {names}.",
        f"No file in it ends in {', '.join(READERS)}, for text also with {', '.join(COMPRESSIONS)} (folders "
        "inside it are not searched).",
        f"Give a folder that holds data files{nearer}, or the files themselves.",
    )
