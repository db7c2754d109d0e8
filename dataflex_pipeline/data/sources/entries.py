"""Entries of ``dataset_info.json``, checked, and the draw of some rows of many that they may ask for.

A draw is a slice in the notation of ``datasets``, or a seeded random sample in file order.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from dataflex_pipeline.data.sources.folders import INFO_FILE
from dataflex_pipeline.errors import DataError, did_you_mean
from dataflex_pipeline.seeds import derive_seed

_USED = frozenset(
    {
        "file_name",
        "file_sha1",
        "hf_hub_url",
        "subset",
        "split",
        "folder",
        "revision",
        "num_samples",
        "formatting",
        "columns",
        "tags",
    }
)
_ELSEWHERE = {
    "ms_hub_url": "data is fetched from the Hugging Face hub only",
    "om_hub_url": "data is fetched from the Hugging Face hub only",
    "script_url": "loading scripts are remote code, and are never run",
    "cloud_file_name": "cloud storage is not read",
}
_HUB_ONLY = ("subset", "folder", "revision")
_NO_MEANING = {
    "load_from": "file_name or hf_hub_url says where the rows come from",
    "description": "it does not change the rows",
    "citation": "it does not change the rows",
    "homepage": "it does not change the rows",
    "license": "it does not change the rows",
}
FORMATTINGS = ("alpaca", "sharegpt", "openai")
_PAIRS = ("chosen", "rejected")


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
    except (ValueError, RecursionError) as error:
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


def check_entry(given: str, entry: Mapping[str, Any], info: Path) -> None:
    """Refuse an entry that cannot be used, or that asks for what is not done here.

    Raises:
        DataError: which key, and why.
    """
    where = f"dataset '{given}' in {info}"
    _check_place(where, entry)
    unknown = sorted(set(entry) - _USED - _ELSEWHERE.keys() - _NO_MEANING.keys() - {"ranking"})
    if unknown:
        raise DataError(
            f"{where} has the key '{unknown[0]}'.{did_you_mean(unknown[0], _USED)}",
            f"The keys of an entry are {', '.join(sorted(_USED))}.",
            "Correct or remove it.",
        )
    columns = entry.get("columns") or {}
    pairs = [f"columns: {role}" for role in _PAIRS if isinstance(columns, dict) and columns.get(role)]
    if entry.get("ranking") or pairs:
        raise DataError(
            f"{where} sets {pairs[0] if pairs else 'ranking: true'}.",
            "Preference pairs have two answers to one prompt; rows here have one.",
            "Use a supervised data set, or list the wanted answer's column as response.",
        )
    if entry.get("formatting", "alpaca") not in FORMATTINGS:
        raise DataError(
            f"{where} sets formatting: {entry['formatting']}.",
            f"The known ones are {', '.join(FORMATTINGS)}.",
            "Use one of them.",
        )
    _check_values(where, entry)


def _check_place(where: str, entry: Mapping[str, Any]) -> None:
    if entry.get("file_name") or entry.get("hf_hub_url"):
        return
    for key in _ELSEWHERE:
        if entry.get(key):
            raise DataError(
                f"{where} sets {key}.", f"Here {_ELSEWHERE[key]}.", "Give file_name or hf_hub_url."
            )
    if not set(entry) - _USED - _NO_MEANING.keys() - {"ranking"}:
        raise DataError(f"{where} has no file_name.", "It does not say where the rows are.", "Add file_name.")


def _check_values(where: str, entry: Mapping[str, Any]) -> None:
    for key in ("split", "subset", "folder", "revision", "file_sha1", "file_name", "hf_hub_url"):
        if entry.get(key) is not None and not isinstance(entry[key], str):
            raise DataError(f"{where} sets {key}: {entry[key]!r}.", "It is a text.", "Correct it.")
    for key in ("columns", "tags"):
        if entry.get(key) is not None and not isinstance(entry[key], dict):
            raise DataError(f"{where} sets {key}: {entry[key]!r}.", "It is an object.", "Correct it.")
    count = entry.get("num_samples")
    if count is not None and not (isinstance(count, int) and not isinstance(count, bool) and count >= 1):
        raise DataError(
            f"{where} sets num_samples: {count!r}.", "It is a number of rows, 1 or more.", "Correct it."
        )


def entry_notices(given: str, entry: Mapping[str, Any], used: Collection[str] = ()) -> tuple[str, ...]:
    """Return what of a checked entry has no effect on its rows, one sentence each; ``used`` has after all."""
    from_hub = bool(entry.get("hf_hub_url"))
    why = {key: text for key, text in (_NO_MEANING | _ELSEWHERE).items() if entry.get(key)}
    if from_hub:
        local = {"file_name": "hf_hub_url comes first", "file_sha1": "rows come from the hub"}
        why |= {key: text for key, text in local.items() if entry.get(key)}
    else:
        why |= {key: "rows come from file_name, not from the hub" for key in _HUB_ONLY if entry.get(key)}
    return tuple(
        f"data set '{given}': {key}: {entry[key]} in its entry of {INFO_FILE} is not used ({text})"
        for key, text in why.items()
        if key not in used
    )


_BLOCK = 1 << 20

Positions = npt.NDArray[np.int64]
_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Draw:
    """How many rows are drawn at random, and by which stream.

    Attributes:
        count: rows asked for, ``num_samples``; more than there are means repeats. at_most: only the first so
            many of the draw; None for all. seed: of the stream.
    """

    count: int
    at_most: int | None
    seed: int

    def positions(self, n_rows: int) -> Positions:
        """Return the rows drawn of ``n_rows``, in rising order.

        Every row has a random number that depends on the seed and its position only, and those with the
        smallest are drawn: without replacement, and a smaller draw is part of a larger one. Beyond
        ``n_rows`` every row is there once and the others are drawn with replacement.
        """
        if n_rows == 0:
            return np.empty(0, np.int64)
        wanted = self._wanted
        if wanted < n_rows:
            return _smallest(n_rows, wanted, self.seed)
        words = np.random.Philox(key=derive_seed(self.seed, "again")).random_raw(wanted - n_rows)
        again = (words % np.uint64(n_rows)).astype(np.int64)
        return np.sort(np.concatenate([np.arange(n_rows, dtype=np.int64), again]))

    @property
    def _wanted(self) -> int:
        """Rows that are there in the end."""
        return self.count if self.at_most is None else min(self.count, self.at_most)

    def sentence(self, n_rows: int) -> str:
        """Return what was drawn, in words."""
        wanted, asked, first = self._wanted, f"num_samples: {self.count}", "max_samples"
        if wanted < self.count:
            asked, first = f"{asked}, and max_samples: {self.at_most} of that draw", "max_samples alone"
        if wanted <= n_rows:
            asked += ":" if wanted < self.count else ""
            rows = f"{wanted} of {n_rows}" if wanted < self.count else f"of {n_rows}"
            return f"{asked} {rows} rows are drawn at random by the run's seed ({first} takes the first ones)"
        return (
            f"{asked} is more than its {n_rows} rows: each is there once, and "
            f"{wanted - n_rows} are drawn again at random by the run's seed"
        )


def _smallest(n_rows: int, wanted: int, seed: int) -> Positions:
    stream = np.random.Philox(key=seed)
    keys, rows = np.empty(0, np.uint64), np.empty(0, np.int64)
    for start in range(0, n_rows, _BLOCK):
        stop = min(start + _BLOCK, n_rows)
        keys = np.concatenate([keys, stream.random_raw(stop - start)])
        rows = np.concatenate([rows, np.arange(start, stop, dtype=np.int64)])
        kept = np.argsort(keys, kind="stable")[:wanted]
        keys, rows = keys[kept], rows[kept]
    return np.sort(rows)


def picked(rows: Iterator[_Item], positions: Positions) -> Iterator[_Item]:
    """Yield the rows at some positions, which rise; a position given twice yields its row twice."""
    ahead = iter(positions.tolist())
    wanted = next(ahead, None)
    for number, row in enumerate(rows):
        while wanted == number:
            yield row
            wanted = next(ahead, None)
        if wanted is None:
            return


@dataclass(frozen=True)
class Slice:
    """Rows ``start`` to ``stop - 1`` of a split."""

    split: str
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


def slices(split: str, lengths: Mapping[str, int], given: str) -> list[Slice]:
    """Return the parts that a split such as ``train[:10%]+test[-5:]`` names, in its order.

    Args:
        split: in the notation of ``datasets``, by whose parser it is read.
        lengths: split -> its rows. given: what the user wrote, for messages.

    Raises:
        DataError: not in that notation.
    """
    from datasets import ReadInstruction

    try:
        instruction = ReadInstruction.from_spec(split)
        found = instruction.to_absolute(dict(lengths))
    except (ValueError, AssertionError) as error:
        raise DataError(
            f"dataset '{given}': split is {split} ({error}).",
            "A split is a name, a slice of one such as train[:10%] or train[-100:], or several with +.",
            "Correct split in its entry of dataset_info.json. Nothing was written.",
        ) from error
    return [Slice(each.splitname, each.from_, max(each.from_, each.to)) for each in found]
