"""The accelerators of this machine: what torch computes on, and what a driver shows that torch does not see.

torch names an accelerator by its kind: cuda (NVIDIA, and AMD under ROCm), xpu (Intel), npu (Ascend, through
torch_npu), mps (Apple). One process has at most one kind.
"""

from __future__ import annotations

import importlib
import importlib.util
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

WITHOUT_COUNTERS = ("cpu", "mps")
"""Devices whose memory torch does not count: that of the process is all there is to see."""
PROGRAMS = {
    "nvidia-smi": "an NVIDIA driver (nvidia-smi)",
    "rocm-smi": "an AMD driver (rocm-smi)",
    "amd-smi": "an AMD driver (amd-smi)",
    "npu-smi": "an Ascend driver (npu-smi)",
    "xpu-smi": "an Intel driver (xpu-smi)",
}
"""A driver's own program -> what is said of it."""
PACKAGES = ("torch_npu", "intel_extension_for_pytorch")
"""Packages that are installed for an accelerator, and for nothing else."""
NODES = ("/dev/nvidiactl", "/dev/kfd", "/dev/davinci_manager", "/dev/dxg", "/dev/dri")
"""Files that a driver makes: NVIDIA, AMD, Ascend, Windows' subsystem for Linux, Intel."""


def kind() -> str | None:
    """Return the kind of the accelerator that torch computes on here: cuda, xpu, npu, mps; None for none."""
    import torch

    found = torch.accelerator.current_accelerator(check_available=True)
    return None if found is None else str(found.type)


def count() -> int:
    """Return how many accelerators torch sees."""
    import torch

    return int(torch.accelerator.device_count()) if kind() is not None else 0


def is_likely() -> bool:
    """Whether there may be one at all; torch, which takes seconds to import, is only then worth asking."""
    if "torch" in sys.modules or (sys.platform == "darwin" and platform.machine() == "arm64"):
        return True
    return driver() is not None or any(Path(node).exists() for node in NODES)


def driver() -> str | None:
    """Return what speaks for an accelerator here, whether torch sees one or not; None for nothing."""
    for program, said in PROGRAMS.items():
        if shutil.which(program):
            return said
    for package in PACKAGES:
        if importlib.util.find_spec(package) is not None:
            return f"the package {package}"
    return None


def has_bf16(device: str) -> bool | None:
    """Return whether a device computes in bfloat16 without emulating it; None where torch cannot tell.

    Args:
        device: cpu, or the kind of an accelerator with or without its number.
    """
    found = device.partition(":")[0]
    if found == "cpu":
        return False
    import torch

    ask: Any = getattr(getattr(torch, found, None), "is_bf16_supported", None)
    if ask is None:
        return None
    return bool(ask(including_emulation=False) if found == "cuda" else ask())


def with_index(device: str) -> str:
    """Return a device with its number: cuda is the GPU that this process claimed, or the first one."""
    if device == "cpu" or ":" in device:
        return device
    import torch

    return f"{device}:{torch.accelerator.current_device_index()}"


def release() -> None:
    """Give the memory back that torch keeps for later on the accelerator."""
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.accelerator.is_available():
        torch.accelerator.empty_cache()


def counts_memory(device: str) -> bool:
    """Whether torch counts the memory that is in use on a device."""
    return device.partition(":")[0] not in WITHOUT_COUNTERS
