"""The untouched model: the run's base model, with ``adapter_name_or_path`` where that is set."""

from __future__ import annotations

from dataflex_pipeline.models.base import adapter_folder
from dataflex_pipeline.models.source import model_digest
from dataflex_pipeline.pipeline.open_run import OpenRun
from dataflex_pipeline.store.fingerprint import digest, files_digest

_MARK = "base "


def base_fingerprint(run: OpenRun) -> str:
    """Return what stands for the untouched model in a feature's fingerprint, where others have a checkpoint.

    Runs that share features are told apart by it: the rows alone say nothing of the weights.
    """
    made_from = {
        "model": model_digest(run.config, run.memo.digest),
        "adapter": adapter_digest(run),
        "finetuning_type": run.given.finetuning_type,
    }
    return _MARK + digest(made_from)


def is_base(fingerprint: str | None) -> bool:
    """Whether a feature's checkpoint is the untouched model."""
    return fingerprint is not None and fingerprint.startswith(_MARK)


def adapter_digest(run: OpenRun) -> str | None:
    """Return one digest over the files of ``adapter_name_or_path``; None where it is not set."""
    name = run.given.adapter_name_or_path
    if name is None:
        return None
    paths = sorted(adapter_folder(name).glob("adapter_*"))
    return files_digest(paths, [path.name for path in paths])
