"""The origin of an export: a checkpoint of a run, or an adapter on its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dataflex_pipeline.errors import CorruptError, RunError, UserError
from dataflex_pipeline.models.base import ADAPTER_CONFIG, ADAPTER_WEIGHTS, adapter_folder
from dataflex_pipeline.store.fingerprint import file_digest, files_digest
from dataflex_pipeline.store.run import BEST, RunFolder
from dataflex_pipeline.store.stale import is_complete
from dataflex_pipeline.training.finished import checkpoint_that_counts
from dataflex_pipeline.training.marker import Marker, read_marker, verify_checkpoint

if TYPE_CHECKING:
    from dataflex_pipeline.config.fields import Config


@dataclass(frozen=True)
class Origin:
    """Where the weights come from, and what is known of their training.

    Attributes:
        adapter: folder of the LoRA adapter, or None. full: folder of a fully fine-tuned checkpoint, or None.
        run: that trained it; None where none is known. round: whose checkpoint it is.
        rounds: whose rows go with it. trained_on: digest of the base model at the training.
        words: which checkpoint it is. notices: what has to be said.
    """

    adapter: Path | None
    full: Path | None
    run: RunFolder | None
    round: int | None
    rounds: tuple[int, ...]
    trained_on: str | None
    words: str
    notices: tuple[str, ...] = ()

    def weights_digest(self) -> str:
        """Return a digest of the weights that are exported."""
        folder = self.adapter or self.full
        assert folder is not None  # noqa: S101 (one of them is always there)
        paths = sorted([*folder.glob("adapter_*"), *folder.glob("model*.safetensors*")])
        return files_digest(paths, [path.name for path in paths])


def origin_of_run(config: Config, run: RunFolder, number: int | None, rows_of: int | None) -> Origin:
    """Choose the checkpoint of a run: of the round asked for, else the best kept one, else the last.

    Args:
        config: the run's configuration. run: the run.
        number: the round asked for. rows_of: the only round whose rows are exported.

    Raises:
        RunError: there is no such finished checkpoint. CorruptError: it is damaged.
    """
    folder = _checkpoint(config, run, number)
    marker = verify_checkpoint(folder)
    trained = int(marker.plan["round"])
    label = "the best checkpoint" if folder.name == BEST else "the checkpoint"
    words = f"{label}, of round {trained}, after {marker.step} optimizer steps"
    return _found(run, folder, marker, rows_of, words)


def _checkpoint(config: Config, run: RunFolder, number: int | None) -> Path:
    found = checkpoint_that_counts(config, run) if number is None else run.round(number).checkpoint
    if found is not None and is_complete(found):
        return found
    raise RunError(
        f"The run {run.folder} has no finished checkpoint{'' if number is None else f' of round {number}'}.",
        "A model is exported from what was trained; the selected rows need no training.",
        "Run `dataflex round` first, or export the rows alone: --what data.",
    )


def origin_of_adapter(config: Config, name: str, rows_of: int | None) -> Origin:
    """Describe an adapter that a configuration names; a run that it lies in is found.

    Args:
        config: the configuration given now. name: folder of the adapter.
        rows_of: the only round whose rows are exported.

    Raises:
        ConfigError: it is no folder of an adapter. CorruptError: it is damaged.
    """
    folder = adapter_folder(name)
    for run, checkpoint in _runs_around(folder):
        marker = read_marker(checkpoint)
        weights = marker.files.get(ADAPTER_WEIGHTS) if marker is not None else None
        if (
            marker is not None
            and weights is not None
            and weights["digest"] == file_digest(folder / ADAPTER_WEIGHTS)
        ):
            words = f"the adapter of round {marker.plan['round']}, after {marker.step} optimizer steps"
            found = _found(run, checkpoint, marker, rows_of, words)
            return _with_template_notice(found, run, config.template)
    _check_not_of_a_run(folder)
    notice = f"{folder} lies in no run: the card cannot say what it was trained on, and no rows are exported"
    if rows_of is not None:
        raise UserError(
            f"--rows-of-round {rows_of} was given, and {folder} lies in no run.",
            "Which rows an adapter was trained on is known only inside the run that trained it.",
            "Leave the option out, or name the run.",
        )
    return Origin(folder, None, None, None, (), None, f"the adapter {folder.resolve().name}", (notice,))


def _check_not_of_a_run(folder: Path) -> None:
    """Refuse an adapter whose weights are none of its run's: they were changed since they were written."""
    if read_marker(folder) is not None:
        verify_checkpoint(folder)
    elif (folder / "run.yaml").is_file():
        raise CorruptError(
            f"{folder / ADAPTER_WEIGHTS} is none of the adapters that the run {folder} trained.",
            "It was copied there by this program, so something else changed, replaced or truncated it.",
            "Run `dataflex round` again, which copies the adapter anew, or export the run itself.",
        )


def _runs_around(folder: Path) -> Iterator[tuple[RunFolder, Path]]:
    """Yield the checkpoints that an adapter's folder may be, or be a copy of: newest round first."""
    for parent in (folder, *folder.resolve().parents[:3]):
        if (parent / "run.yaml").is_file():
            run = RunFolder(parent)
            rounds = sorted(run.folder.glob("round-*/checkpoint"), reverse=True)
            yield from ((run, checkpoint) for checkpoint in [*rounds, run.folder / BEST])


def _with_template_notice(found: Origin, run: RunFolder, template: str | None) -> Origin:
    trained = run.read()[0].get("template")
    if trained == template:
        return found
    notice = f"template is {template} here, and the run was trained with {trained}: prompts will differ"
    return Origin(**{**vars(found), "notices": (*found.notices, notice)})


def _found(run: RunFolder, folder: Path, marker: Marker, rows_of: int | None, words: str) -> Origin:
    trained = int(marker.plan["round"])
    is_adapter = ADAPTER_WEIGHTS in marker.files
    if is_adapter and not (folder / ADAPTER_CONFIG).is_file():
        raise CorruptError(
            f"{folder} has no {ADAPTER_CONFIG}.",
            "Without it the adapter cannot be put on a base model.",
            "Train that round again with --overwrite.",
        )
    rounds = _rounds(run, trained, rows_of)
    return Origin(
        folder if is_adapter else None,
        None if is_adapter else folder,
        run,
        trained,
        rounds,
        marker.ingredients.get("model"),
        words,
    )


def _rounds(run: RunFolder, trained: int, rows_of: int | None) -> tuple[int, ...]:
    """Return the rounds whose rows go with a checkpoint: all up to it, without the warm-up.

    Raises:
        RunError: one was asked for that the checkpoint was not trained on.
    """
    if rows_of is None:
        return tuple(number for number in range(1, trained + 1) if run.round(number).index.is_file())
    if rows_of > trained:
        raise RunError(
            f"The rows of round {rows_of} were asked for, and the exported checkpoint is of round {trained}.",
            "A model is exported with what it was trained on.",
            f"Ask for a round from 0 to {trained}, or export the rows alone: --what data.",
        )
    return (rows_of,)
