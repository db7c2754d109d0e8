"""Export of a run for use elsewhere: model, adapter, selected rows, and a card."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dataflex_pipeline.config.fields import DEMO
from dataflex_pipeline.errors import ConfigError, CorruptError, RunError, StaleError, UserError
from dataflex_pipeline.export.bundle import MANIFEST, Bundle, Part, describe, write_bundle
from dataflex_pipeline.export.origin import Origin, origin_of_adapter, origin_of_run
from dataflex_pipeline.export.subset import selected_rows, several_formats, write_subset
from dataflex_pipeline.models.source import model_digest, tokenizer_digest
from dataflex_pipeline.pipeline.damage import check_outputs, check_tables
from dataflex_pipeline.pipeline.index import read_index
from dataflex_pipeline.pipeline.open_run import OpenRun, require_run
from dataflex_pipeline.pipeline.output import Outcome
from dataflex_pipeline.store.atomic import read_json
from dataflex_pipeline.store.parts import PartedTable
from dataflex_pipeline.store.stale import named_changes

What = Literal["all", "model", "adapter", "data"]
PARTS: dict[What, tuple[Part, ...]] = {
    "all": ("model", "adapter", "data"),
    "model": ("model",),
    "adapter": ("adapter",),
    "data": ("data",),
}


@dataclass(frozen=True)
class Asked:
    """The options of the command.

    Attributes:
        what: to export. round: whose checkpoint; None for the best kept one, else the last.
        rows_of: the only round whose rows the subset has; None for all up to the checkpoint.
        hub: name of the repository to upload to.
        public: whether everybody may see it.
        folder: in place of export_dir.
    """

    what: What = "all"
    round: int | None = None
    rows_of: int | None = None
    hub: str | None = None
    public: bool = False
    folder: Path | None = None


@dataclass(frozen=True)
class Exported:
    """A finished export.

    Attributes:
        bundle: what was exported and where.
        outcomes: for the summary; an upload has one of its own.
    """

    bundle: Bundle
    outcomes: tuple[Outcome, ...]


def export(run: OpenRun, asked: Asked) -> Exported:
    """Export a run, or merge an adapter as a configuration with ``adapter_name_or_path`` says.

    Raises:
        UserError: nothing to export, the folder is taken, base and adapter do not fit, no token for the hub.
    """
    from dataflex_pipeline.export.upload import check_upload, upload

    began = time.monotonic()
    token = check_upload(asked.hub) if asked.hub is not None else None
    bundle = _bundle(run, asked)
    current = _is_current(bundle, run.overwrite)
    if not current:
        for line in bundle.origin.notices:
            run.progress.say(f"  export: {line}")
        write_bundle(bundle, lambda line: run.progress.say(f"  export: {line}"), overwrite=run.overwrite)
    seconds = time.monotonic() - began
    outcomes = [Outcome("export", bundle.folder, not current, seconds, describe(bundle))]
    if asked.hub is not None and token is not None:
        began = time.monotonic()
        where = upload(
            bundle.folder, asked.hub, token, asked.public, "data" if asked.what == "data" else "model"
        )
        outcomes.append(Outcome("upload", Path(asked.hub), True, time.monotonic() - began, where))
    return Exported(bundle, tuple(outcomes))


def export_rows(run: OpenRun, file: Path, round: int | None = None) -> Path:
    """Write the rows of one round's index as JSON lines, each row once, in the format of their source.

    Args:
        run: that they were selected in.
        file: where to; something that is there is only replaced where the run is to overwrite.
        round: the round; by default the last one whose index is there.

    Raises:
        UserError: nothing is selected yet, the file is there, or rows of several formats do not fit one file.
    """
    require_run(run)
    chosen = _selected_round(run) if round is None else round
    read_index(run, chosen)
    if not file.absolute().parent.is_dir():
        raise UserError(
            f"{file} was named.",
            f"There is no folder {file.parent}.",
            "Make it first, or name a file in a folder that is there.",
        )
    if file.exists() and not run.overwrite:
        raise UserError(
            f"{file} exists.",
            "A file of yours is never overwritten.",
            "Name another file, or make the run with overwrite=True.",
        )
    check_tables(run, chosen)
    pool = PartedTable.open(run.store.pool)
    with tempfile.TemporaryDirectory(dir=file.absolute().parent, prefix=".dataflex-export-") as scratch:
        rows = selected_rows(run.store, [chosen])
        written = write_subset(pool, rows, Path(scratch), run.progress.say)["files"]
        if len(written) > 1:
            raise UserError(
                f"The selected rows are in {len(written)} formats: {', '.join(sorted(written))}.",
                "Rows of several formats cannot be read from one file.",
                "Name a folder instead: each format then has its file there.",
            )
        (Path(scratch) / next(iter(written))).replace(file)
    return file


def _selected_round(run: OpenRun) -> int:
    for number in range(run.given.last_round, 0, -1):
        if run.store.round(number).index.is_file():
            return number
    raise RunError(
        f"No round of {run.folder} has an index.",
        "Rows are selected from the scores of a round; the warm-up draws them uniformly.",
        "Select first: run.select(1), or `dataflex select --round 1`.",
    )


def _bundle(run: OpenRun, asked: Asked) -> Bundle:
    origin = _origin(run, asked)
    if origin.run is not None and origin.run.folder == run.folder:
        check_outputs(run, origin.round or 0)
    if asked.what not in PARTS:
        raise UserError(f"what is {asked.what!r}.", f"There are: {', '.join(PARTS)}.", "Choose one of them.")
    parts = PARTS[asked.what]
    if origin.full is not None and asked.what == "adapter":
        raise UserError(
            "--what adapter was asked for, and the run trained all weights (finetuning_type: full).",
            "There is no adapter.",
            "Use --what model.",
        )
    if origin.run is None and asked.what == "data":
        raise UserError(
            f"--what data was asked for, and {origin.adapter} lies in no run.",
            "Which rows an adapter was trained on is known only inside the run that trained it.",
            "Name the run: dataflex export RUN --what data.",
        )
    missing = {"adapter"} if origin.full is not None else set()
    missing |= {"data"} if origin.run is None else set()
    kept = tuple(part for part in parts if part not in missing)
    # Only the model counts here: a demo pool that is not needed is not made.
    config = run.config if run.given.model_name_or_path == DEMO else run.given
    folder = asked.folder or _folder(run, origin)
    wanted: dict[str, Any] = {
        "output": "export",
        "parts": list(kept),
        "weights": origin.weights_digest(),
        "rounds": list(origin.rounds),
        "round": origin.round,
    }
    if set(kept) != {"data"}:
        model = model_digest(config, run.memo.digest)
        _check_base(origin, model, config.model_name_or_path)
        wanted |= {"model": model, "tokenizer": tokenizer_digest(config, run.memo.digest)}
        wanted |= {"template": config.template, "export_size": config.export_size}
    if "data" in kept and origin.run is not None:
        formats = several_formats(PartedTable.open(origin.run.pool))
        wanted |= {"formats": formats} if formats else {}
    return Bundle(config, origin, folder, kept, wanted)


def _origin(run: OpenRun, asked: Asked) -> Origin:
    adapter = run.given.adapter_name_or_path
    if run.store.exists() or adapter is None:
        require_run(run)
        return origin_of_run(run.given, run.store, asked.round, asked.rows_of)
    if asked.round is not None:
        raise UserError(
            f"--round {asked.round} was given, and the configuration names the adapter {adapter}.",
            "The adapter is what is exported.",
            "Leave --round out, or name the run: dataflex export RUN --round N.",
        )
    run.progress.say(f"There is no run at {run.folder}: the adapter {adapter} is exported.")
    return origin_of_adapter(run.given, adapter, asked.rows_of)


def _folder(run: OpenRun, origin: Origin) -> Path:
    given = run.given.export_dir
    if given is not None:
        return Path(given).expanduser()
    if origin.run is None:
        raise ConfigError(
            "export_dir is not set.",
            "An adapter outside of a run has no folder of its own for an export.",
            "Set export_dir=FOLDER.",
        )
    return origin.run.folder / "export"


def _check_base(origin: Origin, model: str, name: str) -> None:
    trained = origin.trained_on
    if trained is not None and trained != model:
        raise StaleError(
            f"The base model {name} is not the one that this was trained on.",
            f"Its weights have another digest ({trained} -> {model}); merged into another base, an adapter "
            "gives a model that nobody trained.",
            "Set model_name_or_path to the model that the run was trained with.",
        )


def _is_current(bundle: Bundle, overwrite: bool) -> bool:
    """Whether the folder holds this very export.

    Raises:
        UserError: it holds something else. StaleError: an export of other settings.
    """
    folder = bundle.folder
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    manifest = folder / MANIFEST
    if not manifest.is_file():
        raise UserError(
            f"export_dir is {folder}, and there is something that no export wrote.",
            "It is never mixed with an export, or moved away, --overwrite or not.",
            "Choose another folder with export_dir=FOLDER.",
        )
    content = read_json(manifest)
    found = content.get("ingredients") if isinstance(content, Mapping) else None
    if found is None and not overwrite:
        raise CorruptError(
            f"{manifest} is not what export wrote.",
            "It says what an export was made from.",
            "Use --overwrite.",
        )
    differing = named_changes(found or {}, bundle.wanted)
    whole = found is not None and _is_whole(folder, content.get("files", {}))
    if not differing and whole:
        return True
    if overwrite:
        return False
    if not differing:
        raise CorruptError(
            f"{folder} is not the export that was written there: files are missing or of another size.",
            "Something else changed it.",
            "Use --overwrite to export again; the old folder is kept beside it.",
        )
    shown = "\n".join(f"  {line}" for line in differing)
    raise StaleError(
        f"{folder} holds another export:\n{shown}",
        "An existing export is not replaced without being told.",
        "Choose another folder with export_dir=FOLDER, or use --overwrite (the old one is kept beside it).",
    )


def _is_whole(folder: Path, files: Mapping[str, int]) -> bool:
    return all((folder / name).is_file() and (folder / name).stat().st_size == n for name, n in files.items())
