"""The memory that this process may still take on its machine, in bytes.

The system ends a process that takes more than there is, without an error that could be caught, so it has to
be asked beforehand. What is free is the least of

- the machine's available memory (Linux: MemAvailable, which counts caches that can be dropped),
- what the limit of each control group of the process leaves, versions 1 and 2, up to the root: limit minus
  usage, where file caches that can be dropped (inactive_file) do not count as usage,
- what RLIMIT_AS and RLIMIT_DATA leave of this process's own address space and data.

The processes of a launch on one machine share the first two.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, MutableMapping
from pathlib import Path

from dataflex_pipeline.errors import DataflexError
from dataflex_pipeline.start import lacks_memory, too_little_address_space

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""What torch reads its allocator's settings from: by the first name up to 2.8, by the second since."""
LIBRARIES = 5 << 28
"""Address space that torch and transformers take on a CPU at least, beside what reads tables: 1.25 GiB."""
NO_LIMIT = 1 << 60
"""A limit above this is none: control groups of version 1 write a huge number for it."""


def memory_error(error: BaseException) -> DataflexError | None:
    """Return the error to show where the system gave no more memory, to Python or to map a library."""
    text = str(error).partition("\n")[0]
    if not (lacks_memory(error) or "can't allocate memory" in text):
        return None
    return DataflexError(
        f"There is not enough memory{f': {text}' if text else '.'}",
        "The machine has no more, or a limit of this process was reached (ulimit -v, a control group).",
        "Raise the limit, or make the work smaller; run the same command again: finished work is kept.",
    )


def check_libraries_fit() -> None:
    """Refuse to import what models need where a limit of this process is too low for it.

    A BLAS library that gets no buffers tries again for ever.

    Raises:
        DataflexError: it is.
    """
    if too_little_address_space(LIBRARIES):
        raise DataflexError(
            "There is not enough memory to load torch and transformers.",
            f"They take about {LIBRARIES / (1 << 30)} GiB of addresses, and the limit of this process is "
            "lower (ulimit -v).",
            "Raise the limit, and run the same command again.",
        )


def available_bytes(processes: int = 1, proc: Path = PROC, groups: Path = CGROUPS) -> int | None:
    """Return the bytes that this process may still take; None where the system does not tell.

    Args:
        processes: of this program on this machine, which share it. proc, groups: where Linux tells.
    """
    shared = [*_machine(proc), *_control_groups(proc, groups)]
    free = [left // max(1, processes) for left in shared] + list(_own_limits(proc))
    return max(0, min(free)) if free else None


def total_bytes() -> int | None:
    """Return the bytes of the machine's memory; None where the system does not tell."""
    if not {"SC_PHYS_PAGES", "SC_PAGE_SIZE"} <= os.sysconf_names.keys():
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def grow_segments(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let torch's allocator on GPUs grow its segments, unless something is said about it.

    Every batch has another length, and segments of fixed sizes leave holes that none of the next ones fits.
    It is read when the first GPU is used, so this has to come before.
    """
    if not any(name in environment for name in ALLOCATOR):
        environment.update(dict.fromkeys(ALLOCATOR, "expandable_segments:True"))


def give_back() -> None:
    """Return freed memory to the system; the C library keeps it for later, gigabytes after a training."""
    if sys.platform.startswith("linux"):
        import ctypes  # errors of memory come by this module, and may leave no room for it

        with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
            ctypes.CDLL(None).malloc_trim(0)


def local_processes() -> int:
    """Return how many processes of this launch run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE") or 1)


def _fields(path: Path) -> dict[str, int]:
    """Return the numbers of a file of lines such as ``MemAvailable: 123 kB``, in its own unit."""
    found = {}
    for line in _text(path).splitlines():
        words = line.replace(":", " ").split()
        if len(words) > 1 and words[1].isdigit():
            found[words[0]] = int(words[1])
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _machine(proc: Path) -> Iterator[int]:
    free = _fields(proc / "meminfo").get("MemAvailable")
    if free is not None:
        yield free * 1024
    elif (total := total_bytes()) is not None and not sys.platform.startswith("linux"):
        yield total // 2  # nothing tells what is free; other programs need some


def _control_groups(proc: Path, groups: Path) -> Iterator[int]:
    """Yield what each control group that limits this process leaves."""
    for line in _text(proc / "self" / "cgroup").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if not controllers:
            folder, names = groups, ("memory.max", "memory.current", "inactive_file")
            if not (folder / "cgroup.controllers").is_file() and (groups / "unified").is_dir():
                folder = groups / "unified"
        elif "memory" in controllers.split(","):
            folder = groups / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        yield from _levels(folder, path, names)


def _levels(root: Path, path: str, names: tuple[str, str, str]) -> Iterator[int]:
    """Yield what is left at each level of a path; inside a container its root is the group itself."""
    limit_name, usage_name, cache_name = names
    parts = [part for part in path.split("/") if part and part != ".."]
    for depth in range(len(parts) + 1):
        folder = root.joinpath(*parts[:depth])
        limit, usage = _text(folder / limit_name).strip(), _text(folder / usage_name).strip()
        if limit.isdigit() and usage.isdigit() and int(limit) < NO_LIMIT:
            cache = _fields(folder / "memory.stat").get(cache_name, 0)
            yield int(limit) - max(0, int(usage) - cache)


def _own_limits(proc: Path) -> Iterator[int]:
    """Yield what the limits of this process leave."""
    try:
        import resource
    except ImportError:  # Windows
        return
    status = _fields(proc / "self" / "status")
    for name, used in (("RLIMIT_AS", "VmSize"), ("RLIMIT_DATA", "VmData")):
        limit = resource.getrlimit(getattr(resource, name))[0]
        if limit != resource.RLIM_INFINITY and used in status:
            yield limit - status[used] * 1024
