"""The marker that makes a folder a checkpoint: its ingredients, and exactly the files that it has.

It is written last, after every other file is on the disk, and the folder is renamed into its final place
only then. A folder without a marker is an unfinished one, whatever it holds.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from dataflex_pipeline import __version__
from dataflex_pipeline.errors import CorruptError
from dataflex_pipeline.models.optimizer_states import GATHERED
from dataflex_pipeline.store.atomic import TEMPORARY, fsync_path, read_json, write_json
from dataflex_pipeline.store.fingerprint import digest, file_digest
from dataflex_pipeline.store.stale import MARKER
from dataflex_pipeline.store.versions import installed_versions

PICKLES = (".bin", ".pkl", ".pickle", ".pt", ".pth", ".safetensors")


@dataclass(frozen=True)
class Marker:
    """What COMPLETE.json says.

    Attributes:
        fingerprint: digest of the ingredients.
        ingredients: what the checkpoint is made from.
        plan: the round's numbers and the digest of its index (`RoundPlan.describe`).
        step: optimizer steps of the whole run that are in it.
        finished: whether it is a round's end (True) or a checkpoint inside a round.
        course: what later steps need to know of earlier ones (best evaluation, patience, seconds).
        result: the round's result (`RoundResult.plain`), when finished.
        files: name -> {"bytes", "digest"} of every other file.
        version: of this package. versions: of the packages it was made with; empty where not recorded.
        own_digest: `content_digest`; empty in markers of an earlier edition.
    """

    fingerprint: str
    ingredients: dict[str, Any]
    plan: dict[str, Any]
    step: int
    finished: bool
    course: dict[str, Any]
    result: dict[str, Any] | None
    files: dict[str, dict[str, Any]]
    version: str = __version__
    versions: dict[str, str] = field(default_factory=dict)
    own_digest: str = ""

    @property
    def content_digest(self) -> str:
        """Digest of all that the marker says, but for this digest itself."""
        return digest({name: value for name, value in asdict(self).items() if name != "own_digest"})


def write_marker(
    folder: Path,
    ingredients: Mapping[str, Any],
    plan: Mapping[str, Any],
    step: int,
    course: Mapping[str, Any],
    result: Mapping[str, Any] | None,
) -> Marker:
    """Flush every file of the folder, then write its marker; ``result`` makes it a finished one."""
    files = {}
    for path in sorted(_files(folder)):
        fsync_path(path)
        files[path.relative_to(folder).as_posix()] = {
            "bytes": path.stat().st_size,
            "digest": file_digest(path),
        }
    marker = Marker(
        fingerprint=digest(ingredients),
        ingredients=dict(ingredients),
        plan=dict(plan),
        step=step,
        finished=result is not None,
        course=dict(course),
        result=None if result is None else dict(result),
        files=files,
        versions=installed_versions(),
    )
    marker = replace(marker, own_digest=marker.content_digest)
    write_json(folder / MARKER, asdict(marker))
    return marker


def _files(folder: Path) -> list[Path]:
    return [
        path
        for path in folder.rglob("*")
        if path.is_file() and path.name != MARKER and not path.name.endswith(TEMPORARY)
    ]


def read_marker(checkpoint: Path) -> Marker | None:
    """Return a checkpoint's marker without looking at its other files; None where there is none.

    Raises:
        CorruptError: the marker is there and is not one.
    """
    path = checkpoint / MARKER
    if not path.is_file():
        return None
    content = read_json(path)
    fields, later = set(Marker.__dataclass_fields__), {"versions", "own_digest"}
    # Markers of an earlier edition do not have the later fields.
    if not isinstance(content, dict) or not fields - later <= set(content) <= fields:
        raise _damaged(path, "it is not the marker of a checkpoint")
    marker = Marker(**content)
    if marker.own_digest and marker.own_digest != marker.content_digest:
        raise _damaged(path, "its content is not what was written")
    return marker


def verify_checkpoint(checkpoint: Path, digest_of: Callable[[Path], str] = file_digest) -> Marker:
    """Check that a checkpoint is complete and that each of its files is the one that was written.

    Args:
        checkpoint: its folder.
        digest_of: gives the digest of a file, for callers that remember those of unchanged files.

    Raises:
        CorruptError: there is no marker, or a file is missing, of another size, replaced, or was put
            there afterwards and could be loaded in place of the real weights or states.
    """
    marker = read_marker(checkpoint)
    if marker is None:
        raise CorruptError(
            f"{checkpoint} has no {MARKER}.",
            "It is no finished checkpoint: the marker is written last.",
            "Run the command that makes it again, with --overwrite if this stays.",
        )
    for name, known in marker.files.items():
        path = checkpoint / name
        if not path.is_file():
            raise _damaged(path, "the marker names it and it is missing", _consequence(name))
        if path.stat().st_size != known["bytes"]:
            raise _damaged(path, f"it has {path.stat().st_size} bytes where {known['bytes']} were written")
        if digest_of(path) != known["digest"]:
            raise _damaged(path, "its content is not what was written")
    for path in _files(checkpoint):
        if path.suffix in PICKLES and path.relative_to(checkpoint).as_posix() not in marker.files:
            raise _damaged(path, "it was put there after the checkpoint was finished")
    return marker


def _consequence(name: str) -> str:
    if name in ("optimizer.pt", "scheduler.pt"):
        return "Without it the optimizer or the learning-rate schedule would start anew, unnoticed. "
    if name.startswith("rng_state"):
        return "Without it dropout would differ from an uninterrupted run. "
    return ""


def _damaged(path: Path, found: str, why: str = "") -> CorruptError:
    return CorruptError(
        f"{path}: {found}.",
        f"{why}The checkpoint was written whole by this program, so something else changed it.",
        "Put the file back, or train that round again with --overwrite.",
    )


def missing_pieces(names: Collection[str], full: bool, sharded_states: bool) -> list[str]:
    """Return what a checkpoint with these files lacks to be continued from.

    Args:
        names: the files it has.
        full: all weights were trained (model.safetensors, possibly in shards) rather than an adapter.
        sharded_states: DeepSpeed keeps optimizer and schedule in folders of its own.
    """
    missing = [name for name in ("trainer_state.json",) if name not in names]
    missing += [] if sharded_states else [n for n in ("optimizer.pt", "scheduler.pt") if n not in names]
    missing += ["latest"] if sharded_states and "latest" not in names else []
    if sharded_states and not any(fnmatch(name, GATHERED) for name in names):
        missing.append(GATHERED)
    if not any(name.startswith("rng_state") for name in names):
        missing.append("rng_state.pth")
    weights = (
        ("model.safetensors", "model.safetensors.index.json") if full else ("adapter_model.safetensors",)
    )
    return missing + ([] if any(name in names for name in weights) else [weights[0]])
