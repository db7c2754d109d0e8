"""The processes of this launch, as a launcher (torchrun, accelerate launch) describes them.

Rank 0 runs the command as a single process would; the others wait for the jobs that it gives out (team.py).
A plain run has one process and no team, and never imports torch for this.
"""

from __future__ import annotations

import importlib
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dataflex_pipeline import accelerators
from dataflex_pipeline.errors import ConfigError, DataflexError

if TYPE_CHECKING:
    from dataflex_pipeline.launch.team import Team

VISIBLE = 120.0
"""Seconds until a file that another machine wrote has to be visible (NFS caches folders for up to 60)."""


def check_environment() -> None:
    """Check what the launcher says of this process, before it is asked for.

    Raises:
        ConfigError: a variable is no number, or they do not fit each other.
    """
    for name, least in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)):
        value = os.environ.get(name, str(least))
        if not (value.isascii() and value.isdecimal() and len(value) < 8 and int(value) >= least):
            raise ConfigError(
                f"The environment variable {name} is {value!r}.",
                f"A launcher sets it to a whole number of at least {least}.",
                "Start with torchrun or accelerate launch, or unset it for one process.",
            )
    if rank() >= world_size():
        raise ConfigError(
            f"The environment variable RANK is {rank()}, and WORLD_SIZE is {world_size()}.",
            "The processes of a launch are counted from 0.",
            "Start with torchrun or accelerate launch, or unset both for one process.",
        )


def world_size() -> int:
    """Return how many processes the launcher started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Return which of them this is, from 0."""
    return int(os.environ.get("RANK", "0"))


def command() -> str:
    """Return how a command of this program is started again on as many processes and machines.

    The ``--`` keeps torchrun from taking ``--run`` for the beginning of an option of its own.
    """
    world, here = world_size(), int(os.environ.get("LOCAL_WORLD_SIZE", str(world_size())))
    if world == 1:
        return "dataflex"
    if world == here:
        return f"torchrun --standalone --nproc_per_node {world} -m -- dataflex_pipeline"
    return (
        f"torchrun --nnodes {world // here} --nproc_per_node {here} --rdzv-backend c10d "
        "--rdzv-endpoint FIRST_MACHINE:29500 -m -- dataflex_pipeline"
    )


def claim_device(setting: str) -> None:
    """Make this process' own accelerator the one that its kind means; nothing on a CPU or in a plain run.

    Process k of a machine takes accelerator k. Where the launcher shows each process one of its own (srun
    with a GPU per task), it takes that one.

    Raises:
        ConfigError: one certain accelerator was set for several processes, or a machine has fewer than
            processes.
    """
    if world_size() == 1 or setting == "cpu":
        return
    import torch

    kind = accelerators.kind()
    if kind is None or setting.partition(":")[0] not in ("auto", kind):
        return
    if ":" in setting:
        raise ConfigError(
            f"device: {setting} was set, and {world_size()} processes were started.",
            "Each process takes a GPU of its own.",
            f"Set device: {kind}, and CUDA_VISIBLE_DEVICES (or what it is called for {kind}) to the GPUs "
            "that may be used.",
        )
    own, there = int(os.environ.get("LOCAL_RANK", "0")), accelerators.count()
    if there == 1 and not _sees_all():
        own = 0
    if own >= there:
        raise ConfigError(
            f"Process {own + 1} of this machine has no GPU: there are {there}.",
            "Each process takes a GPU of its own.",
            f"Start at most {there} processes per machine (--nproc_per_node {there}).",
        )
    torch.accelerator.set_device_index(own)


def _sees_all() -> bool:
    """Whether this process sees what its neighbours see: torchrun's share one environment, srun's do not."""
    return any(name.startswith("TORCHELASTIC_") for name in os.environ)


def await_file(path: Path, seconds: float = VISIBLE) -> None:
    """Wait until a file that another process wrote is visible here.

    Raises:
        TeamError: it does not become visible: the folder is not shared.
    """
    from dataflex_pipeline.launch.team import POLL, TeamError

    deadline = time.monotonic() + seconds
    while not path.is_file():
        if time.monotonic() > deadline:
            raise TeamError(
                f"{path} does not exist on {socket.gethostname()}.",
                f"Another process wrote it more than {seconds:.0f} s ago.",
                "Put the run folder on a file system that all machines mount at the same path.",
            )
        time.sleep(POLL)
        if path.parent.is_dir():
            os.listdir(path.parent)  # noqa: PTH208 (asks the server anew; NFS remembers what was not there)


_TEAM: list[Team] = []
"""The team of this process; empty in a plain run."""


def current() -> Team | None:
    """Return the team of this process, or None in a plain run."""
    return _TEAM[0] if _TEAM else None


def join(tell: Callable[[DataflexError], None]) -> Team:
    """Join the other processes of the launch; called once, and only where there are several.

    Raises:
        ConfigError: the launcher did not say where the others are.
    """
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise ConfigError(
                f"WORLD_SIZE is {world_size()}, and {name} is not set.",
                "A launcher sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT for every process.",
                "Start with torchrun or accelerate launch, or unset WORLD_SIZE.",
            )
    from dataflex_pipeline.launch.team import Team

    dist: Any = importlib.import_module("torch.distributed")
    store, number, size = next(dist.rendezvous("env://"))
    # A restart by the launcher finds the same store: what was said before it must not be read again.
    attempt = "/".join(os.environ.get(f"TORCHELASTIC_{name}", "") for name in ("RUN_ID", "RESTART_COUNT"))
    team = Team(dist.PrefixStore(f"dataflex/{attempt}", store), number, size, tell)
    _TEAM.append(team)
    return team


def leave_process_group() -> None:
    """End torch's process group where a training made one; all ranks come here, or some abort on exit."""
    if "torch.distributed" not in sys.modules:
        return
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        if dist.get_world_size() > 1:
            dist.barrier()
        dist.destroy_process_group()
