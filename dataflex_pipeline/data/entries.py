"""An entry of ``dataset_info.json``: its keys checked, and what of them is not used said."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from dataflex_pipeline.data.folders import INFO_FILE
from dataflex_pipeline.errors import DataError, did_you_mean

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
