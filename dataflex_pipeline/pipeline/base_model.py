"""The model as a run is given it: the base model, with ``adapter_name_or_path`` where that is set."""

from __future__ import annotations

from typing import Any

from dataflex_pipeline.models.base import adapter_folder
from dataflex_pipeline.models.source import model_digest
from dataflex_pipeline.pipeline.open_run import OpenRun
from dataflex_pipeline.store.fingerprint import digest, files_digest

_MARK = "base "


FRESH_ADAPTER = ("lora_rank", "lora_alpha", "lora_target", "seed")
"""Settings that the weights of a fresh adapter follow from."""


def is_given(run: OpenRun, checkpoint: int | str) -> bool:
    """Whether a checkpoint is the model as the run is given it: "base", or round 0 without a warm-up."""
    return checkpoint == "base" or (checkpoint == 0 and not run.given.warmup_step)


def base_fingerprint(run: OpenRun, *, of_trained_weights: bool = False) -> str:
    """Return what stands for the model as given in a feature's fingerprint, where others have a checkpoint.

    Runs that share features are told apart by it: the rows alone say nothing of the weights.

    Args:
        run: whose model it is.
        of_trained_weights: whether gradients are taken of the weights that would be trained; those of a fresh
            adapter then count, where none is given.
    """
    made_from: dict[str, Any] = {
        "model": model_digest(run.config, run.memo.digest),
        "adapter": adapter_digest(run),
        "finetuning_type": run.given.finetuning_type,
    }
    fresh = run.given.finetuning_type == "lora" and made_from["adapter"] is None
    if of_trained_weights and fresh:
        made_from |= {name: getattr(run.given, name) for name in FRESH_ADAPTER}
    return _MARK + digest(made_from)


def is_base(fingerprint: str | None) -> bool:
    """Whether a feature's checkpoint is the model as the run is given it."""
    return fingerprint is not None and fingerprint.startswith(_MARK)


def adapter_digest(run: OpenRun) -> str | None:
    """Return one digest over the files of ``adapter_name_or_path``; None where it is not set."""
    name = run.given.adapter_name_or_path
    if name is None:
        return None
    paths = sorted(adapter_folder(name).glob("adapter_*"))
    return files_digest(paths, [path.name for path in paths])
