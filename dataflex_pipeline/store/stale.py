"""Freshness of an output on disk: whether it is the one that the present settings would make."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dataflex_pipeline.errors import CorruptError, StaleError
from dataflex_pipeline.store.atomic import read_json, set_aside
from dataflex_pipeline.store.fingerprint import INGREDIENTS_KEY, changes, digest
from dataflex_pipeline.store.parquet import check_fingerprint, corrupt, read_blocks, read_footer
from dataflex_pipeline.store.parts import MANIFEST, PartedTable

MARKER = "COMPLETE.json"
"""A checkpoint is complete when this file is in it."""
SHOWN_CHANGES = 12
DIGESTS = {
    "adapter": "the files of adapter_name_or_path",
    "before": "the scores of the round before",
    "candidates": "the candidates",
    "checkpoint": "the checkpoint that it is computed from",
    "chosen": "the rows that are candidates",
    "digest": "the content of the data set",
    "embeddings": "the embeddings that max_similarity compares",
    "file_content": "the content of the file of scores",
    "index": "the index of the round",
    "model": "the files of model_name_or_path",
    "pool": "the prepared pool",
    "previous": "the checkpoint of the round before",
    "probabilities": "the probability table",
    "rows": "the prepared rows",
    "scores": "the score table",
    "target": "the prepared target",
    "template_text": "the text of the template",
    "weights": "the weights that are exported",
    "tokenizer": "the tokenizer's files in model_name_or_path",
}
"""What ingredients stand for that are known by a digest."""
_EDITION = re.compile(r"(^|\.)(version: |rows_per_part: \d+ -> \(not set\)$)")
"""Changes that come with the program: its version numbers, and what no longer decides a table."""
_DIGEST = re.compile(r'"?[0-9a-f]{32}"?')
_OWN_FILE = re.compile(r'"?file ([0-9a-f]{8})[0-9a-f]{24}"?')
LookUp = Callable[[str], Mapping[str, Any] | None]
"""Ingredients by their digest, or None where they are not known."""


def found_ingredients(output: Path) -> dict[str, Any] | None:
    """Return what an output on disk was made from, or None if there is nothing.

    Args:
        output: a Parquet file, the folder of a parted table (finished or not), or a checkpoint folder.

    Raises:
        CorruptError: the output is there and does not say what it was made from.
    """
    if output.is_file():
        return _footer_ingredients(output)
    for name in (MANIFEST, MARKER):
        if (output / name).is_file():
            return _listed_ingredients(output / name)
    for part in sorted(output.glob("part-*.parquet"))[:1]:
        return _footer_ingredients(part)
    return None


def _listed_ingredients(path: Path) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("ingredients"), dict):
        raise CorruptError(
            f"{path} does not say what the table or checkpoint beside it was made from.",
            "It was written whole by this program, so something else changed it.",
            "Restore it, or use --overwrite.",
        )
    ingredients: dict[str, Any] = content["ingredients"]
    return ingredients


def _footer_ingredients(path: Path) -> dict[str, Any]:
    text = read_footer(path).get(INGREDIENTS_KEY)
    if text is None:
        raise _not_ours(path)
    try:
        ingredients: dict[str, Any] = json.loads(text)
    except ValueError as error:
        raise corrupt(path, f"what it was made from is no JSON ({error})") from error
    return ingredients


def _not_ours(path: Path) -> CorruptError:
    return CorruptError(
        f"{path} does not say what it was made from.",
        "Everything of a run carries that, so this file was not written by this program.",
        "Move it out of the run folder, or use --overwrite.",
    )


def is_complete(output: Path) -> bool:
    """Whether an output is finished: a single file, or a folder with its manifest or marker."""
    return output.is_file() or (output / MANIFEST).is_file() or (output / MARKER).is_file()


def is_kept(output: Path, wanted: Mapping[str, Any], what: str, *, overwrite: bool = False) -> bool:
    """Decide like `is_current`, but leave an outdated output in place, until its successor is made."""
    try:
        return is_current(output, wanted, what)
    except (CorruptError, StaleError):
        if not overwrite:
            raise
        return False


def is_current(
    output: Path,
    wanted: Mapping[str, Any],
    what: str,
    *,
    overwrite: bool = False,
    look_up: LookUp = lambda digest: None,
) -> bool:
    """Decide whether an output can be kept.

    Args:
        output: where it is or will be. wanted: what the present settings would make it from.
        what: its name for messages. overwrite: set an output of other settings, or a damaged one, aside.
        look_up: finds what a digest among the ingredients stands for, to name what changed in it.

    Returns:
        True if it is complete and current; False if it has to be made (or finished).

    Raises:
        StaleError: it was made from other settings and ``overwrite`` is not set.
        CorruptError: it cannot be read and ``overwrite`` is not set.
    """
    try:
        found = found_ingredients(output)
        if overwrite and found is not None and not (output / MARKER).is_file():
            check_parts(output, digest(found))
    except CorruptError:
        if not overwrite:
            raise
        set_aside(output)
        return False
    if found is None:
        return False
    if digest(found) == digest(wanted):
        return is_complete(output)
    if overwrite:
        set_aside(output)
        return False
    raise stale(output, what, named_changes(found, wanted, look_up))


def named_changes(
    old: Mapping[str, Any], new: Mapping[str, Any], look_up: LookUp = lambda digest: None
) -> list[str]:
    """Return `changes` in which every digest is replaced by what changed in that which it stands for."""
    lines = []
    for line in changes(old, new):
        key, _, values = line.partition(": ")
        before, _, after = values.partition(" -> ")
        own = _OWN_FILE.fullmatch(before), _OWN_FILE.fullmatch(after)
        if own[0] and own[1]:
            lines.append(f"{key}: the content of your own file changed ({own[0][1]} -> {own[1][1]})")
            continue
        if not (_DIGEST.fullmatch(before) and _DIGEST.fullmatch(after)):
            lines.append(line)
            continue
        known, wanted = look_up(before.strip('"')), look_up(after.strip('"'))
        if known is not None and wanted is not None:
            lines += [f"{key}.{inner}" for inner in named_changes(known, wanted, look_up)]
        else:
            meant = DIGESTS.get(key.rpartition(".")[2], "what it is made from")
            lines.append(f"{key}: {meant} changed ({before[1:9]} -> {after[1:9]})")
    return list(dict.fromkeys(lines))


def check_parts(folder: Path, fingerprint: str) -> None:
    """Raise CorruptError unless every part there is, and the manifest if there is one, is of this table."""
    for part in sorted(folder.glob("part-*.parquet")):
        check_fingerprint(part, fingerprint)
    if PartedTable.is_complete(folder) and PartedTable.open(folder).fingerprint != fingerprint:
        raise corrupt(folder / MANIFEST, f"it belongs to another table (expected {fingerprint})")


def set_aside_damaged(folder: Path, wanted: Mapping[str, Any]) -> None:
    """Set a parted table, finished or not, aside if a part or the manifest is not of this table.

    Every page is read: one that was changed shows in no footer.
    """
    if is_damaged(folder, wanted):
        set_aside(folder)


def is_damaged(folder: Path, wanted: Mapping[str, Any]) -> bool:
    """Whether a part of a table, a page of it, or the manifest is not what was written."""
    try:
        check_parts(folder, digest(wanted))
        for part in sorted(folder.glob("part-*.parquet")):
            for _ in read_blocks(part):
                pass
    except CorruptError:
        return True
    return False


def stale(output: Path, what: str, changed: list[str]) -> StaleError:
    """Return the error for an output of other settings, naming each of them."""
    shown = "\n".join(f"  {line}" for line in changed[:SHOWN_CHANGES])
    more = f"\n  ... and {len(changed) - SHOWN_CHANGES} more" if len(changed) > SHOWN_CHANGES else ""
    if all(_EDITION.search(line) for line in changed):
        return StaleError(
            f"{what} ({output}) was made by another edition of this program:\n{shown}{more}",
            "This one would make another table from the same settings, and going on would mix the two.",
            "Use another run name, or go on with the edition that began this one, or --overwrite "
            "to make it anew (the old one is kept beside it under another name).",
        )
    return StaleError(
        f"{what} ({output}): settings changed since it was made:\n{shown}{more}",
        "Going on would mix results of two configurations in one run.",
        "Set the old values again, or use another run name, or --overwrite "
        "to make it anew (the old one is kept beside it under another name).",
    )
