"""Seconds and peak memory of a piece of work: of this process on a CPU, of the GPU on one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import psutil
import torch

from dataflex_pipeline.accelerators import counts_memory


def seconds_of(work: Callable[[], Any], device: str) -> float:
    """Return the CPU seconds of this process, where other programs do not count, or a GPU's wall seconds."""
    on_gpu = device != "cpu"
    clock = time.perf_counter if on_gpu else time.process_time
    if on_gpu:
        torch.accelerator.synchronize()
    began = clock()
    work()
    if on_gpu:
        torch.accelerator.synchronize()
    return clock() - began


def fastest(work: Mapping[str, Callable[[], Any]], repeat: int, device: str) -> dict[str, float]:
    """Return the fewest seconds of each piece of work; the pieces take turns, so that load hits all alike."""
    seconds = dict.fromkeys(work, float("inf"))
    for _ in range(repeat):
        for name, function in work.items():
            seconds[name] = min(seconds[name], seconds_of(function, device))
    return seconds


def peak_mib(work: Callable[[], Any], device: str) -> float:
    """Return how much more memory is held at most while something runs, in MiB."""
    if counts_memory(device):
        before = torch.accelerator.memory_allocated()
        torch.accelerator.reset_peak_memory_stats()
        work()
        return (torch.accelerator.max_memory_allocated() - before) / 2**20
    process, done = psutil.Process(), threading.Event()
    before = highest = process.memory_info().rss

    def watch() -> None:
        nonlocal highest
        while not done.wait(0.002):
            highest = max(highest, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        work()
    finally:
        done.set()
        watcher.join()
    return (highest - before) / 2**20
