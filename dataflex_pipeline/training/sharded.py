"""DeepSpeed's sharded states: Adam's, gathered by name, and the processes that can read a checkpoint.

DeepSpeed keeps each process' share of the optimizer in files that only the same number of processes under
the same ZeRO stage can load. LESS and NICE need the states of whole parameters, so these are gathered when a
checkpoint is written (one parameter at a time, all processes together) and kept beside those files.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dataflex_pipeline.errors import RunError
from dataflex_pipeline.models.optimizer_states import AdamState, write_adam_states

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Parameter

    from dataflex_pipeline.training.trainer import WeightedTrainer

MOMENTS = ("exp_avg", "exp_avg_sq")
SHARD = re.compile(r".*zero_pp_rank_(\d+)_mp_rank_\d+_(optim|model)_states\.pt")


def save_adam_states(trainer: WeightedTrainer, folder: Path) -> None:
    """Gather Adam's states on all processes; the first one writes them into the checkpoint's folder."""
    states = _gathered(trainer)
    if trainer.args.should_save:
        write_adam_states(folder, states)
    for _ in states:  # gathering takes part of every process
        pass


def _gathered(trainer: WeightedTrainer) -> Iterator[tuple[str, AdamState]]:
    optimizer: Any = trainer.optimizer
    groups = {name: group for group in optimizer.param_groups for name in group["param_names"]}
    copies = _fp32_copies(optimizer)
    for name, parameter in trainer.model.named_parameters():
        if not parameter.requires_grad:
            continue
        stepped = copies.get(parameter, parameter)
        exp_avg, exp_avg_sq = (_whole(optimizer, name, stepped, key) for key in MOMENTS)
        group = groups[name]
        yield (
            name,
            AdamState(
                exp_avg=exp_avg,
                exp_avg_sq=exp_avg_sq,
                step=trainer.state.global_step,
                learning_rate=float(group["lr"]),
                betas=(float(group["betas"][0]), float(group["betas"][1])),
                eps=float(group["eps"]),
                weight_decay=float(group["weight_decay"]),
            ),
        )


def _fp32_copies(optimizer: Any) -> dict[Parameter, Parameter]:
    """Return the fp32 copies of bf16 weights that the optimizer steps on under ZeRO stage 0; else nothing."""
    inner = getattr(optimizer, "optimizer", optimizer)
    if not (hasattr(inner, "fp16_groups") and hasattr(inner, "fp32_groups")):
        return {}
    pairs = zip(inner.fp16_groups, inner.fp32_groups, strict=True)
    return {weight: copy for group in pairs for weight, copy in zip(*group, strict=True)}


def _whole(optimizer: Any, name: str, parameter: Parameter, key: str) -> Tensor:
    """Return one state of a parameter, whole, on the CPU."""
    found = importlib.import_module("deepspeed.utils").safe_get_full_optimizer_state(parameter, key)
    if found is None:  # ZeRO stage 0 keeps the optimizer as torch made it
        inner = getattr(optimizer, "optimizer", optimizer)
        found = inner.state.get(parameter, {}).get(key)
    if found is None:
        raise RunError(
            f"DeepSpeed's {type(optimizer).__name__} does not give Adam's states of {name}.",
            "The methods that use them could not score with this checkpoint.",
            "Use one of the shipped files in configs/deepspeed with ZeRO stage 2 or 3.",
        )
    whole: Tensor = found.detach().float().cpu()
    return whole


def release(engine: Any) -> None:
    """Take apart DeepSpeed's engine, which is not used any more, so that its memory can be given back.

    Under ZeRO-3 a list of DeepSpeed's module keeps every model that was ever trained, with its fp32 weights
    and Adam's states: each round would leave one more set of them on the GPU.
    """
    engine.destroy()
    importlib.import_module("deepspeed.runtime.zero.parameter_offload").FWD_MODULE_STACK.clear()


@dataclass(frozen=True)
class Sharding:
    """How a checkpoint's optimizer is split: over how many processes, and whether the weights are too."""

    processes: int
    weights: bool

    @classmethod
    def of(cls, names: Collection[str]) -> Sharding | None:
        """Read it off a checkpoint's files; None where DeepSpeed did not write it."""
        if "latest" not in names:
            return None
        found = [match for name in names if (match := SHARD.fullmatch(name))]
        ranks = {match[1] for match in found}
        return cls(len(ranks), any(match[2] == "model" for match in found))


def check_sharding(names: Collection[str], checkpoint: Path, stage: int | None, world: int) -> None:
    """Refuse to go on from a checkpoint that the optimizer of this launch could not load.

    Args:
        names: the checkpoint's files. checkpoint: its folder, for the message.
        stage: ZeRO stage of the configuration; None without DeepSpeed. world: processes of this launch.

    Raises:
        RunError: it was made with or without DeepSpeed, at another stage, or by another number of processes.
    """
    made = Sharding.of(names)
    if made is None and stage is None:
        return
    if made is None:
        raise _mismatch(checkpoint, "without DeepSpeed", "Leave the key deepspeed out (deepspeed=null).")
    kind = "3" if made.weights else "1 or 2" if made.processes else "0"
    if stage is None:
        raise _mismatch(
            checkpoint, f"by DeepSpeed, ZeRO stage {kind}", "Set deepspeed to the file that it was made with."
        )
    same = (stage == 3) == made.weights and (stage == 0) == (made.processes == 0)
    if not same:
        raise _mismatch(
            checkpoint,
            f"under ZeRO stage {kind}, and deepspeed says stage {stage}",
            "Set deepspeed to the file that it was made with.",
        )
    if made.processes and made.processes != world:
        raise _mismatch(
            checkpoint,
            f"by {made.processes} processes under ZeRO, and {world} were started",
            f"Start {made.processes} processes (NPROC={made.processes}) to go on; scoring and selecting work "
            "with any number.",
        )


def _mismatch(checkpoint: Path, made: str, fix: str) -> RunError:
    return RunError(
        f"{checkpoint} was made {made}.",
        "Its optimizer cannot be loaded here, and without it the training would start anew.",
        f"{fix} Or train from the warm-up on under another run name.",
    )
