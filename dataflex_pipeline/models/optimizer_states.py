"""Adam's states of a checkpoint, by parameter name.

torch numbers the entries of ``optimizer.pt``; the training puts the parameters' names into each group
when it creates the optimizer (``param_names``), and they survive saving and loading. Where DeepSpeed shards
the optimizer there is no such file; the training then gathers the states into ``adam_states-*.safetensors``.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dataflex_pipeline.errors import CorruptError, RunError

if TYPE_CHECKING:
    from torch import Tensor

OPTIMIZER = "optimizer.pt"
GATHERED = "adam_states-*.safetensors"
PIECE_BYTES = 4 << 30
"""Bytes of states per file and in memory while they are written, at most about."""
NUMBERS = ("step", "learning_rate", "betas", "eps", "weight_decay")
"""What a file's header holds of each state."""


@dataclass(frozen=True)
class AdamState:
    """What AdamW knows about one parameter after ``step`` steps.

    Attributes:
        exp_avg, exp_avg_sq: running means m, v of the gradient and of its square; shape of the parameter.
        step: optimizer steps that went into them. 0: the parameter never had a gradient; m and v are 0, the
            file has none, and they are of shape [0] here.
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
        optimizer's order.

    Raises:
        RunError: the checkpoint has neither optimizer.pt nor gathered states.
        CorruptError: the file is truncated, not an optimizer's, or has no parameter names.
    """
    path = checkpoint / OPTIMIZER
    gathered = sorted(checkpoint.glob(GATHERED))
    if gathered and not path.is_file():
        return {name: state for piece in gathered for name, state in _read_piece(piece).items()}
    if not path.is_file():
        raise RunError(
            f"{checkpoint} has no {OPTIMIZER}.",
            "Adam's running means are needed, and a checkpoint without them (no warm-up, or weights only) "
            "does not have them.",
            "Use the checkpoint of a round that this program trained; the warm-up makes the first one.",
        )
    saved = _read(path)
    states: dict[str, AdamState] = {}
    for group in saved["param_groups"]:
        names = group.get("param_names")
        if names is None or len(names) != len(group["params"]):
            raise _not_ours(path, "its parameter groups carry no parameter names")
        for name, number in zip(names, group["params"], strict=True):
            states[name] = _state(path, group, saved["state"].get(number))
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


def _state(path: Path, group: dict[str, Any], entry: dict[str, Any] | None) -> AdamState:
    import torch

    if entry is None:
        entry = {"exp_avg": torch.zeros(0), "exp_avg_sq": torch.zeros(0), "step": 0}
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


def write_adam_states(folder: Path, states: Iterable[tuple[str, AdamState]]) -> None:
    """Write states beside a checkpoint's other files, some gigabytes at a time.

    Args:
        folder: of a checkpoint that is being written. states: (parameter name, state), on the CPU.
    """
    held: dict[str, AdamState] = {}
    number = size = 0
    for name, state in states:
        held[name] = state
        size += 2 * state.exp_avg.nbytes
        if size >= PIECE_BYTES:
            _write_piece(folder / GATHERED.replace("*", f"{number:05d}"), held)
            held, number, size = {}, number + 1, 0
    if held:
        _write_piece(folder / GATHERED.replace("*", f"{number:05d}"), held)


def _write_piece(path: Path, states: dict[str, AdamState]) -> None:
    from safetensors.torch import save_file

    tensors = {f"{name}.exp_avg": state.exp_avg.contiguous() for name, state in states.items()}
    tensors |= {f"{name}.exp_avg_sq": state.exp_avg_sq.contiguous() for name, state in states.items()}
    numbers = {name: {key: getattr(state, key) for key in NUMBERS} for name, state in states.items()}
    save_file(tensors, path, metadata={"adam": json.dumps(numbers)})


def _read_piece(path: Path) -> dict[str, AdamState]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            numbers = json.loads((file.metadata() or {})["adam"])
            return {
                name: AdamState(
                    exp_avg=file.get_tensor(f"{name}.exp_avg"),
                    exp_avg_sq=file.get_tensor(f"{name}.exp_avg_sq"),
                    **{**known, "betas": tuple(known["betas"])},
                )
                for name, known in numbers.items()
            }
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise _not_ours(path, f"it cannot be read ({str(error).splitlines()[0]})") from error


def _not_ours(path: Path, found: str) -> CorruptError:
    return CorruptError(
        f"{path}: {found}.",
        "Adam's states are looked up by parameter name in the file that the training wrote.",
        "Train that round again with --overwrite; do not edit or replace files of a checkpoint.",
    )
