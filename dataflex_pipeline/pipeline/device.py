"""The device that a command computes on: what is said of it, and what ``bf16: auto`` comes to on it.

A run keeps what auto came to in its run.yaml, so that it goes on in the same number format on any machine.
"""

from __future__ import annotations

from dataclasses import replace

from dataflex_pipeline import accelerators, launch
from dataflex_pipeline.config.fields import Config
from dataflex_pipeline.config.load import Loaded
from dataflex_pipeline.pipeline.open_run import OpenRun
from dataflex_pipeline.store.run import RunFolder


def settle_bf16(loaded: Loaded, run: RunFolder | None) -> Loaded:
    """Put true or false in place of ``bf16: auto``: what the run recorded, else what its device has.

    Args:
        loaded: the configuration. run: to be gone on with; None: what is recorded does not count.

    Raises:
        ConfigError: the run is new, and this machine does not have its device.
    """
    if loaded.config.bf16 != "auto":
        return loaded
    recorded = run.read()[0].get("bf16") if run is not None and run.exists() else None
    value = recorded if isinstance(recorded, bool) else _has_bf16(loaded.config)
    return replace(loaded, config=loaded.config.model_copy(update={"bf16": value}))


def _has_bf16(config: Config) -> bool:
    if config.device == "cpu" or not accelerators.is_likely():
        return False
    from dataflex_pipeline.models.base import precision, resolve_device

    return precision(config, resolve_device(config.device)).dtype == "bfloat16"


def say_device(run: OpenRun) -> None:
    """Say what is easily missed of the device, once: an accelerator that is not used, a slow format."""
    for line in device_notices(run.given):
        if line not in run.said:
            run.said.add(line)
            run.progress.say(f"note: {line}")


def device_notices(config: Config) -> list[str]:
    """Return what has to be said of the device that a configuration computes on here.

    Raises:
        ConfigError: this machine does not have it, or it has no bfloat16 and ``bf16: true`` is set.
    """
    if config.device == "cpu" or not accelerators.is_likely():
        return []
    from dataflex_pipeline.models.base import BF16_ON_A_CPU, precision, resolve_device

    device = resolve_device(config.device)
    lines = [line for line in precision(config, device).notices if line != BF16_ON_A_CPU]  # training says it
    if device == "cpu":
        found = accelerators.driver()
        unused = f"there is {found}, but torch sees no accelerator, so everything runs on the CPU, far slower"
        return lines + ([] if found is None else [f"{unused}: `dataflex doctor` says what to install"])
    idle = accelerators.count() - 1
    if idle > 0 and launch.world_size() == 1 and ":" not in config.device:
        every = f"torchrun --standalone --nproc_per_node {idle + 1} -m -- dataflex_pipeline ..."
        which = f"{idle} of {idle + 1} {device} devices stay idle"
        lines.append(f"{which}: one process uses one; for all of them start `{every}`")
    return lines
