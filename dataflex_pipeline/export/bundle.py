"""One export: a folder that becomes visible whole, with a manifest of what it was made from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

from dataflex_pipeline import __version__
from dataflex_pipeline.data.sources.exported import EXPORT_MANIFEST, ROWS_FOLDER
from dataflex_pipeline.export.card import Facts, RoundLine, model_card, public_name
from dataflex_pipeline.export.conversations import Trainer
from dataflex_pipeline.export.data_card import data_card, data_facts
from dataflex_pipeline.export.origin import Origin
from dataflex_pipeline.export.selected import Choice
from dataflex_pipeline.export.subset import write_info, write_subset
from dataflex_pipeline.models.base import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from dataflex_pipeline.store.atomic import atomic_folder, read_json, set_aside
from dataflex_pipeline.store.parts import PartedTable
from dataflex_pipeline.store.run import RunFolder
from dataflex_pipeline.store.tables import TableFile
from dataflex_pipeline.training.marker import read_marker

if TYPE_CHECKING:
    from dataflex_pipeline.config.fields import Config

Part = Literal["model", "adapter", "data"]
Say = Callable[[str], None]
MEANINGS: dict[Part, tuple[str, str]] = {
    "model": ("model*.safetensors", "the weights with the training merged in, for from_pretrained()"),
    "adapter": ("adapter/", "the LoRA adapter alone, for the base model named above"),
    "data": (
        f"{ROWS_FOLDER}/",
        "the selected rows as JSONL and Parquet, in the format of their sources, a file for each format",
    ),
}


@dataclass(frozen=True)
class Bundle:
    """One export worked out and not yet made.

    Attributes:
        config: base model, template, sizes. folder: where it will be. parts: what is in it.
        wanted: what it is made from.
        origin: of the weights; None where rows alone are exported.
        choice: the rows; None where none are exported. trainer: the form of the rows.
    """

    config: Config
    folder: Path
    parts: tuple[Part, ...]
    wanted: dict[str, Any]
    origin: Origin | None
    choice: Choice | None = None
    trainer: Trainer = "original"


def describe(bundle: Bundle) -> str:
    """Return one line about an export."""
    if bundle.origin is None:
        assert bundle.choice is not None  # noqa: S101 (one of them is always there)
        return bundle.choice.words
    return f"{', '.join(bundle.parts)} of {bundle.origin.words}"


def write_bundle(bundle: Bundle, say: Say, *, overwrite: bool = False) -> None:
    """Make an export; its folder appears whole or not at all.

    Args:
        bundle: what to make. say: is told what a user should know.
        overwrite: set an older export aside, once the new one is ready.

    Raises:
        UserError: base and adapter cannot be loaded or do not fit, or a trainer has no form for the rows.
    """
    with atomic_folder(bundle.folder) as folder:
        notes: dict[str, Any] = {}
        if bundle.choice is not None:
            notes["data"] = _write_data(bundle.choice, bundle.trainer, folder / ROWS_FOLDER, say)
        if "adapter" in bundle.parts:
            _copy_adapter(bundle, folder / "adapter")
        if "model" in bundle.parts:
            _write_model(bundle, folder, say)
        elif "adapter" in bundle.parts:
            _write_tokenizer(bundle, folder / "adapter", say)
        (folder / "README.md").write_text(_card(bundle, notes), encoding="utf-8")
        _write_manifest(bundle, folder, notes)
        if overwrite and bundle.folder.exists() and any(bundle.folder.iterdir()):
            aside = set_aside(bundle.folder)
            say(f"the old export is now {aside}")


def _card(bundle: Bundle, notes: Mapping[str, Any]) -> str:
    """Return the text of README.md: the card of a data set where rows are all there is."""
    if bundle.origin is not None:
        return model_card(_facts(bundle, bundle.origin))
    assert bundle.choice is not None  # noqa: S101 (one of them is always there)
    return data_card(data_facts(bundle.choice, notes["data"]["files"], bundle.trainer))


def _write_model(bundle: Bundle, folder: Path, say: Say) -> None:
    from dataflex_pipeline.export.merged import save_merged
    from dataflex_pipeline.models.base import resolve_device

    device = resolve_device(bundle.config.export_device)
    origin = _origin(bundle)
    save_merged(bundle.config, origin.adapter, origin.full, device, folder, say)


def _origin(bundle: Bundle) -> Origin:
    assert bundle.origin is not None  # noqa: S101 (weights are a part only where there are some)
    return bundle.origin


def _write_tokenizer(bundle: Bundle, folder: Path, say: Say) -> None:
    from dataflex_pipeline.export.merged import exported_tokenizer

    exported_tokenizer(bundle.config, say)[0].save_pretrained(folder)


def _copy_adapter(bundle: Bundle, folder: Path) -> None:
    """Copy the adapter; its configuration names the base without the folders of this machine."""
    source = _origin(bundle).adapter
    assert source is not None  # noqa: S101 (the part is there only where an adapter is)
    folder.mkdir()
    shutil.copyfile(source / ADAPTER_WEIGHTS, folder / ADAPTER_WEIGHTS)
    content = read_json(source / ADAPTER_CONFIG)
    content["base_model_name_or_path"] = public_name(bundle.config.model_name_or_path)
    (folder / ADAPTER_CONFIG).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", "utf-8")


def _write_data(choice: Choice, trainer: Trainer, folder: Path, say: Say) -> dict[str, Any]:
    folder.mkdir()
    written = write_subset(PartedTable.open(choice.run.pool), choice.lines(), folder, say, trainer)
    write_info(folder, written.entries)
    return written.notes()


def _write_manifest(bundle: Bundle, folder: Path, notes: Mapping[str, Any]) -> None:
    files = {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    content = {"ingredients": bundle.wanted, "files": files, "version": __version__, **notes}
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False)
    (folder / EXPORT_MANIFEST).write_text(text + "\n", encoding="utf-8")


def _facts(bundle: Bundle, origin: Origin) -> Facts:
    run = origin.run
    settings, record = run.read() if run is not None else ({}, {})
    upto = [] if run is None else [n for n in range((origin.round or 0) + 1) if run.round(n).index.is_file()]
    return Facts(
        title=public_name(str(run.folder if run is not None else bundle.folder)),
        base=bundle.config.model_name_or_path,
        kind="lora" if origin.adapter is not None else "full",
        exported=origin.words,
        contents=dict(MEANINGS[part] for part in bundle.parts),
        settings=settings,
        rounds=[_round_line(run, number) for number in upto] if run is not None else [],
        sources=_sources(run, upto) if run is not None else {},
        versions=_versions(run, origin.round, record) if run is not None else {},
    )


def _versions(run: RunFolder, number: int | None, record: Mapping[str, Any]) -> Mapping[str, str]:
    """Return the versions that the exported round was made with; the run's where it did not record any."""
    marker = read_marker(run.round(number or 0).checkpoint)
    found: Mapping[str, str] = (marker.versions if marker is not None else {}) or record.get("versions", {})
    return found


def _round_line(run: RunFolder, number: int) -> RoundLine:
    where = run.round(number)
    index = TableFile(where.index)
    made_from = json.loads(index.metadata["ingredients"])
    method = made_from.get("method")
    params = {}
    if method is not None and where.probabilities(method).is_file():
        params = json.loads(TableFile(where.probabilities(method)).metadata["ingredients"]).get("params", {})
    marker = read_marker(where.checkpoint)
    rows = pa.Table.from_batches(list(index.blocks(["row"])))
    result = (marker.result if marker is not None else None) or {}
    distinct = pc.count_distinct(rows.column("row")).as_py()
    name = method or "drawn uniformly"
    return RoundLine(number, name, params, made_from.get("draw", {}), index.n_rows, distinct, result)


def _sources(run: RunFolder, rounds: list[int]) -> dict[str, int]:
    pool = PartedTable.open(run.pool)
    found: dict[str, int] = {}
    for number in rounds:
        rows = pa.Table.from_batches(list(TableFile(run.round(number).index).blocks(["row"])))
        names = pool.take(rows.column("row").to_numpy(), ["source"]).column("source")
        for each in pc.value_counts(names).to_pylist():
            found[each["values"]] = found.get(each["values"], 0) + each["counts"]
    return found
