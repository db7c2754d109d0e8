"""The memory of this process, and the seconds that its libraries take to load."""

from __future__ import annotations

import importlib
import resource
import sys
import time
from collections.abc import Sequence

from dataflex_pipeline.accelerators import counts_memory


def import_seconds(names: Sequence[str]) -> float:
    """Import packages, and return how long that took; next to nothing where they are loaded already."""
    began = time.perf_counter()
    for name in names:
        importlib.import_module(name)
    return time.perf_counter() - began


def begin_peak(device: str) -> None:
    """Begin to watch the memory of a GPU; that of a process on a CPU is only known from its start."""
    if counts_memory(device):
        import torch

        torch.accelerator.reset_peak_memory_stats(torch.device(device))


def peak_bytes(device: str) -> int:
    """Return the most memory in use: of a GPU since `begin_peak`, else of this process since it started."""
    if counts_memory(device):
        import torch

        return int(torch.accelerator.max_memory_allocated(torch.device(device)))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
