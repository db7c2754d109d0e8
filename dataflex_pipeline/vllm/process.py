"""The process of a vLLM engine, seen from outside: its start, one question at a time, its end.

It leads a process group of its own, which holds all that vLLM starts. Its standard error goes to a file
without a name, of which the last lines are shown when it fails.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

import dataflex_pipeline
from dataflex_pipeline import launch
from dataflex_pipeline.data.prepare import available_cores

WORKER = "dataflex_pipeline.vllm.worker"
CLOSE_SECONDS = 30.0
LOG_LINES = 12
LOG_LINE_LENGTH = 300
LAUNCHER = (
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT"),
    *("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE"),
)
"""What torchrun sets; an engine is no member of our process group."""


class WorkerError(Exception):
    """The process failed: why, in one line; ``log`` has its last lines."""

    def __init__(self, why: str, log: list[str]) -> None:
        super().__init__(why)
        self.log = log


def vllm_installed() -> bool:
    """Return whether vLLM can be imported, without importing it."""
    return importlib.util.find_spec("vllm") is not None


def environment(parallel: bool, offline: bool, device: str | None) -> dict[str, str]:
    """Return the environment of the process.

    Args:
        parallel: the engine is spread over several accelerators, each with a process of its own.
        offline: the hub is not asked. device: cpu, cuda or cuda:N; None: as vLLM finds it. Of several
            processes of a launch each gives its engine its own GPU (that of LOCAL_RANK) whatever is said.
    """
    env = {
        key: value
        for key, value in os.environ.items()
        if key not in LAUNCHER and not key.startswith("TORCHELASTIC_")
    }
    root = str(Path(dataflex_pipeline.__file__).resolve().parents[1])
    env["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [env.get("PYTHONPATH")])])
    env["VLLM_NO_USAGE_STATS"] = "1"
    env["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # bound to cores that are busy, a CPU is 20 times slower
    env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1" if parallel else "0"
    env.setdefault("OMP_NUM_THREADS", str(available_cores()))
    if offline:
        env["HF_HUB_OFFLINE"] = "1"
    kind, _, number = (device or "cuda").partition(":")
    if launch.world_size() > 1:
        number = number or os.environ.get("LOCAL_RANK", "0")
    if kind == "cuda" and number and not parallel:
        visible = [each for each in env.get("CUDA_VISIBLE_DEVICES", "").split(",") if each]
        env["CUDA_VISIBLE_DEVICES"] = visible[int(number)] if visible else number
    return env


class WorkerProcess:
    """One started process.

    Args:
        env: its environment.
    """

    def __init__(self, env: Mapping[str, str]) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed by kill)
        self._process = subprocess.Popen(
            [sys.executable, "-m", WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=dict(env),
            start_new_session=True,
        )
        self._code: int | None = None

    @property
    def pid(self) -> int:
        """Its process id, which is also that of its group."""
        return self._process.pid

    def ask(self, request: Mapping[str, Any]) -> tuple[dict[str, Any], np.ndarray]:
        """Send a request; return the reply and the array that came with it (empty where none did).

        Raises:
            WorkerError: the process refused the request, which ends it, or died.
        """
        requests, replies = self._pipes()
        with contextlib.suppress(BrokenPipeError):  # it died; what it had to say is read below
            requests.write(json.dumps(request).encode() + b"\n")
            requests.flush()
        line = replies.readline()
        if not line.endswith(b"\n"):
            raise self._failure(None)
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise self._failure(reply["error"])
        shape = tuple(reply.get("shape") or (0,))
        raw = replies.read(4 * math.prod(shape))
        if len(raw) != 4 * math.prod(shape):
            raise self._failure(None)
        return reply, np.frombuffer(raw, dtype="<f4").reshape(shape).copy()

    def close(self) -> None:
        """Let it leave by itself, within 30 s; then nothing of it is left."""
        if self._code is None:
            requests, _ = self._pipes()
            with contextlib.suppress(BrokenPipeError):  # it has left already
                requests.write(b'{"op": "close"}\n')
                requests.flush()
            self._wait(CLOSE_SECONDS)
        self.kill()

    def kill(self) -> None:
        """End it and all that it started, at once."""
        if self._code is not None:
            return
        # not reaped yet, so the group's number is still its own
        os.killpg(self.pid, signal.SIGKILL)
        self._code = self._process.wait()
        for pipe in self._pipes():
            with contextlib.suppress(BrokenPipeError):  # unsent bytes for a process that is gone
                pipe.close()
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").splitlines()
        self._log.close()
        self._lines = [line[:LOG_LINE_LENGTH] for line in lines if line.strip(" ^~")][-LOG_LINES:]

    def _failure(self, why: str | None) -> WorkerError:
        self._wait(1.0)
        self.kill()
        if why is None and self._code == -signal.SIGKILL:
            why = "Its process was killed from outside, most often by a system running out of memory."
        return WorkerError(why or f"Its process ended with code {self._code}.", self._lines)

    def _wait(self, seconds: float) -> None:
        """Wait for the end of the process without reaping it."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                return
            time.sleep(0.01)

    def _pipes(self) -> tuple[IO[bytes], IO[bytes]]:
        if self._process.stdin is None or self._process.stdout is None:
            raise RuntimeError("the engine's process was started without pipes")
        return self._process.stdin, self._process.stdout
