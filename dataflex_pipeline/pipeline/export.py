"""Export of a run for use elsewhere: model, adapter, selected rows, and a card."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from dataflex_pipeline.config.fields import DEMO
from dataflex_pipeline.data.sources.exported import EXPORT_MANIFEST
from dataflex_pipeline.errors import (
    ConfigError,
    CorruptError,
    StaleError,
    UserError,
    did_you_mean,
)
from dataflex_pipeline.export.bundle import Bundle, Part, describe, write_bundle
from dataflex_pipeline.export.conversations import Trainer
from dataflex_pipeline.export.formats import several_formats
from dataflex_pipeline.export.lines import Overwrite, write_lines
from dataflex_pipeline.export.origin import Origin, origin_of_adapter, origin_of_run
from dataflex_pipeline.export.selected import Choice, last_selected
from dataflex_pipeline.home import expanded
from dataflex_pipeline.models.source import model_digest, tokenizer_digest
from dataflex_pipeline.pipeline.damage import check_origin, check_outputs
from dataflex_pipeline.pipeline.open_run import OpenRun, require_run
from dataflex_pipeline.pipeline.output import Outcome
from dataflex_pipeline.pipeline.prepare import splits_of
from dataflex_pipeline.pipeline.select import Selection
from dataflex_pipeline.store.atomic import read_json
from dataflex_pipeline.store.chosen_files import check_folder, check_writable, in_the_way
from dataflex_pipeline.store.parts import PartedTable
from dataflex_pipeline.store.run import RunFolder
from dataflex_pipeline.store.stale import is_complete, named_changes

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
        what: to export.
        round: whose checkpoint; None for the best kept one, else the last. Of rows alone: that they were
            selected for; None for the last round with a selection.
        rows_of: the only round whose rows go with a model; None for all up to the checkpoint.
        selection: name of a selection beside the round's own.
        warm_up: whether the warm-up's rows are exported too.
        trainer: the form of the rows.
        hub: name of the repository to upload to.
        public: whether everybody may see it.
        folder: in place of export_dir.
    """

    what: What = "all"
    round: int | None = None
    rows_of: int | None = None
    selection: str | None = None
    warm_up: bool = False
    trainer: Trainer = "original"
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
    _check_asked(asked)
    token = check_upload(asked.hub) if asked.hub is not None else None
    bundle = _bundle(run, asked)
    current = _is_current(bundle, run.overwrite)
    if not current:
        check_writable(bundle.folder.parent)
        for line in () if bundle.origin is None else bundle.origin.notices:
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


def export_rows(run: OpenRun, file: Path, asked: Asked, *, replaces: bool = False) -> list[Outcome]:
    """Write selected rows as JSON lines: one file, or one per format beside each other.

    Args:
        run: that they were selected in.
        file: where to; of several formats each has its name as part of the file's.
        asked: which rows, and for whom; what is said of folders does not count.
        replaces: whether rows that were written there before make way, as in the run's own folder.

    Returns:
        One outcome per file.

    Raises:
        UserError: nothing is selected yet, another file is there, or a trainer has no form for the rows.
    """
    began = time.monotonic()
    _check_asked(asked)
    require_run(run)
    _check_outside(run, file)
    choice = _choice(run.store, asked)
    _check_tables(run, choice)
    overwrite: Overwrite = "replace" if replaces else "aside" if run.overwrite else "never"
    files = write_lines(choice, file, asked.trainer, run.progress.say, overwrite)
    seconds = time.monotonic() - began
    return [
        Outcome("export", path, done, seconds, f"{count:,} lines: {choice.words}")
        for path, count, done in files
    ]


FILE_SUFFIXES = (".json", ".txt", ".csv", ".tsv", ".parquet", ".arrow", ".gz", ".zst")
"""Endings of files that rows are not exported as; a folder of such a name is a slip of the pen."""


def is_file_of_rows(place: Path, of_folder: bool) -> bool:
    """Whether a place is a file, for rows alone, rather than a folder.

    Args:
        place: as it was given. of_folder: whether anything was asked for that only a folder has.

    Raises:
        UserError: it is a file of another kind, or a file was named with options of a folder.
    """
    suffix = place.suffix.lower()
    if suffix in FILE_SUFFIXES:
        raise UserError(
            f"{place} was named.",
            "Rows are exported as JSON lines, all else as a folder.",
            "Name a file that ends in .jsonl, or a folder.",
        )
    if suffix == ".jsonl" and of_folder:
        raise UserError(
            f"{place} was named, with options of a folder (what, rows_of, hub, public).",
            "A file holds the rows of one round.",
            "Name a folder for the rest.",
        )
    return suffix == ".jsonl"


def check_place(run: OpenRun, file: Path, selection: Selection | None) -> None:
    """Find what would stop the export of rows that are not selected yet.

    Args:
        run: that they will be selected in. file: where to.
        selection: whose rows; None where a file that is there is to be set aside.

    Raises:
        UserError: it is no file of JSON lines, its folder is not there, or it holds other rows.
    """
    if file.suffix.lower() != ".jsonl":
        raise UserError(
            f"{file} was named.", "Rows are written as JSON lines.", "Name a file that ends in .jsonl."
        )
    check_folder(file)
    _check_outside(run, file)
    if file.exists() and selection is not None and not _is_made(selection):
        raise in_the_way(file)


def _is_made(selection: Selection) -> bool:
    try:
        return is_complete(selection.run.store.pool) and selection.is_current()
    except StaleError:
        return False


def _check_asked(asked: Asked) -> None:
    if asked.what not in PARTS:
        raise UserError(f"what is {asked.what!r}.", f"There are: {', '.join(PARTS)}.", "Choose one of them.")
    if asked.trainer not in get_args(Trainer):
        near = did_you_mean(asked.trainer, get_args(Trainer))
        raise UserError(
            f"Rows were asked for in the form for {asked.trainer!r}.{near}",
            f"There are: {', '.join(get_args(Trainer))}.",
            "Choose one of them; without one, rows keep the format that they came in.",
        )
    of_rows = {
        "--selection": asked.selection is not None,
        "--warm-up": asked.warm_up,
        "--for": asked.trainer != "original",
    }
    given = [name for name, there in of_rows.items() if there]
    if given and asked.what in ("model", "adapter"):
        raise UserError(
            f"--what {asked.what} was asked for, with {given[0]}.",
            f"{given[0]} is about rows, and none are exported.",
            "Leave it out, or use --what data.",
        )
    if asked.selection is not None and asked.what != "data":
        raise UserError(
            f"--selection {asked.selection} was given for an export with a model.",
            "A model goes with the rows that it was trained on: those of the rounds' own selections.",
            "Add --what data.",
        )


def _choice(store: RunFolder, asked: Asked) -> Choice:
    """Return the rows that are exported alone.

    Raises:
        UserError: two rounds are named, or nothing is selected.
    """
    if asked.round is not None and asked.rows_of not in (None, asked.round):
        raise UserError(
            f"--round {asked.round} and --rows-of-round {asked.rows_of} were given for rows alone.",
            "Both say which round the rows were selected for.",
            "Leave --rows-of-round out.",
        )
    number = asked.rows_of if asked.round is None else asked.round
    number = last_selected(store, asked.selection) if number is None else number
    warm_up = (0,) if asked.warm_up and number else ()
    return Choice(store, (number, *warm_up), asked.selection)


def _check_tables(run: OpenRun, choice: Choice) -> None:
    """Check the tables that rows are exported from against what was written."""
    for number, path in choice.tables():
        if choice.run.folder == run.folder:
            run.memo.check_output(path)
        check_origin(choice.run, number, path)


def _check_outside(run: OpenRun, file: Path) -> None:
    """Refuse a file in a folder that is a data set of the run: it would be read as rows of it.

    Raises:
        UserError: it is in one.
    """
    for name in (each for split in splits_of(run) if not run.is_demo(split) for each in run.datasets(split)):
        if Path(name).is_dir() and file.resolve().is_relative_to(Path(name).resolve()):
            raise UserError(
                f"{file} was named, in the folder of the data set {name}.",
                "All files of that folder are read as its rows, the exported ones too from then on.",
                "Name a file elsewhere.",
            )


def _bundle(run: OpenRun, asked: Asked) -> Bundle:
    if asked.what == "data" and (run.store.exists() or run.given.adapter_name_or_path is None):
        require_run(run)
        return _rows_alone(run, asked, _choice(run.store, asked), run.folder)
    origin = _origin(run, asked)
    if origin.run is not None and origin.run.folder == run.folder:
        check_outputs(run, origin.round or 0)
    if asked.what == "data":
        found = _origins_run(origin)
        return _rows_alone(run, asked, Choice(found, origin.rounds), found.folder)
    parts = PARTS[asked.what]
    if origin.full is not None and asked.what == "adapter":
        raise UserError(
            "--what adapter was asked for, and the run trained all weights (finetuning_type: full).",
            "There is no adapter.",
            "Use --what model.",
        )
    choice = _with_model(run, origin, asked) if "data" in parts else None
    missing = {"adapter"} if origin.full is not None else set()
    missing |= {"data"} if choice is None else set()
    kept = tuple(part for part in parts if part not in missing)
    # Only the model counts here: a demo pool that is not needed is not made.
    config = run.config if run.given.model_name_or_path == DEMO else run.given
    model = model_digest(config, run.memo.digest)
    _check_base(origin, model, config.model_name_or_path)
    wanted: dict[str, Any] = {
        "output": "export",
        "parts": list(kept),
        "weights": origin.weights_digest(),
        "round": origin.round,
        "model": model,
        "tokenizer": tokenizer_digest(config, run.memo.digest),
        "template": config.template,
        "export_size": config.export_size,
    }
    if choice is not None:
        wanted |= _inputs(choice, asked.trainer)
    return Bundle(config, asked.folder or _folder(run, origin), kept, wanted, origin, choice, asked.trainer)


def _rows_alone(run: OpenRun, asked: Asked, choice: Choice, place: Path) -> Bundle:
    """Return an export of rows; nothing of a model is looked at."""
    _check_tables(run, choice)
    wanted = {"output": "export", "parts": ["data"], **_inputs(choice, asked.trainer)}
    given = run.given.export_dir
    folder = asked.folder or (place / "export" if given is None else expanded(given))
    return Bundle(run.given, folder, ("data",), wanted, None, choice, asked.trainer)


def _inputs(choice: Choice, trainer: Trainer) -> dict[str, Any]:
    """Return what decides exported rows, for a fingerprint."""
    made = choice.inputs() | ({"form": trainer} if trainer != "original" else {})
    formats = several_formats(PartedTable.open(choice.run.pool))
    return made | ({"formats": formats} if formats else {})


def _with_model(run: OpenRun, origin: Origin, asked: Asked) -> Choice | None:
    """Return the rows that go with a model; None where none were selected, or no run is known."""
    if origin.run is None:
        return None
    warm_up = (0,) if asked.warm_up and 0 not in origin.rounds else ()
    rounds = (*origin.rounds, *warm_up)
    if not rounds:
        run.progress.say(
            "  export: no rows: the model was trained on the warm-up's alone (--warm-up adds them)"
        )
        return None
    choice = Choice(origin.run, rounds)
    _check_tables(run, choice)
    return choice


def _origins_run(origin: Origin) -> RunFolder:
    if origin.run is None or not origin.rounds:
        raise UserError(
            f"--what data was asked for, and {origin.adapter} lies in no run with selected rows.",
            "Which rows an adapter was trained on is known only inside the run that trained it.",
            "Name the run: dataflex export RUN --what data.",
        )
    return origin.run


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
        return expanded(given)
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
    manifest = folder / EXPORT_MANIFEST
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
