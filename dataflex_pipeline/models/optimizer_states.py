"""Adam's states of a checkpoint, by parameter name.

torch numbers the entries of ``optimizer.pt``; the training puts the parameters' names into each group
when it creates the optimizer (``param_names``), and they survive saving and loading.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dataflex_pipeline.errors import CorruptError, RunError

if TYPE_CHECKING:
    from torch import Tensor

OPTIMIZER = "optimizer.pt"


@dataclass(frozen=True)
class AdamState:
    """What AdamW knows about one parameter after ``step`` steps.

    Attributes:
        exp_avg, exp_avg_sq: running means m, v of the gradient and of its square; shape of the parameter.
        step: optimizer steps that went into them.
        learning_rate: of the step that would come next.
        betas, eps, weight_decay: the optimizer's own settings for this parameter.
    """

    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: int
    learning_rate: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float


def adam_states(checkpoint: Path) -> dict[str, AdamState]:
    """Read Adam's states of a checkpoint, on the CPU.

    Returns:
        Parameter name (as in ``named_parameters()`` of `load_for_scoring`'s model) -> state, in the
        optimizer's order. A parameter that never had a gradient has no state and is not in it.

    Raises:
        RunError: the checkpoint has no optimizer.pt.
        CorruptError: the file is truncated, not an optimizer's, or has no parameter names.
    """
    path = checkpoint / OPTIMIZER
    if not path.is_file():
        raise RunError(
            f"{checkpoint} has no {OPTIMIZER}.",
            "Adam's running means are needed, and a checkpoint without them (no warm-up, weights only, or "
            "states sharded by DeepSpeed) does not have them.",
            "Use the checkpoint of a round that this program trained; the warm-up makes the first one.",
        )
    saved = _read(path)
    states: dict[str, AdamState] = {}
    for group in saved["param_groups"]:
        names = group.get("param_names")
        if names is None or len(names) != len(group["params"]):
            raise _not_ours(path, "its parameter groups carry no parameter names")
        for name, number in zip(names, group["params"], strict=True):
            if number in saved["state"]:
                states[name] = _state(path, group, saved["state"][number])
    return states


def _read(path: Path) -> dict[str, Any]:
    import torch

    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise _not_ours(path, f"it cannot be read ({str(error).splitlines()[0]})") from error
    if not isinstance(saved, dict) or not {"state", "param_groups"} <= saved.keys():
        raise _not_ours(path, "it does not hold the state of an optimizer")
    return saved


def _state(path: Path, group: dict[str, Any], entry: dict[str, Any]) -> AdamState:
    if not {"exp_avg", "exp_avg_sq", "step"} <= entry.keys():
        raise _not_ours(path, "it is not of Adam: exp_avg, exp_avg_sq or step is missing")
    return AdamState(
        exp_avg=entry["exp_avg"],
        exp_avg_sq=entry["exp_avg_sq"],
        step=int(entry["step"]),
        learning_rate=float(group["lr"]),
        betas=(float(group["betas"][0]), float(group["betas"][1])),
        eps=float(group["eps"]),
        weight_decay=float(group["weight_decay"]),
    )


def _not_ours(path: Path, found: str) -> CorruptError:
    return CorruptError(
        f"{path}: {found}.",
        "Adam's states are looked up by parameter name in the file that the training wrote.",
        "Train that round again with --overwrite; do not edit or replace files of a checkpoint.",
    )
