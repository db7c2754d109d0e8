"""A process with everything heavy imported that forks one child per command and reports its end.

A cold start imports for seconds; a fork takes milliseconds. The process imports and computes nothing, so
that it has a single thread when it forks; each lane (a fork of its own) serves one client at a time.
Run as a program with the file descriptors of its lanes' sockets.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue

try:
    from crash.kill_points import Book, Kill, install
except ImportError:  # run as a program, with its own folder on the path
    from kill_points import Book, Kill, install

HEAVY = (
    "torch",
    "trl",
    "peft",
    "deepspeed",  # accelerate loads it in every training where it is installed
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
    "trl.trainer.sft_trainer",
    "dataflex_pipeline.stages.cli",
    "dataflex_pipeline.pipeline.run",
    "dataflex_pipeline.generate.transformers",
    "dataflex_pipeline.features.generations",
    "dataflex_pipeline.features.losses",
    "dataflex_pipeline.features.policy_gradients",
    "dataflex_pipeline.features.rewards",
    "dataflex_pipeline.features.influence",
    "dataflex_pipeline.features.target_directions",
    "dataflex_pipeline.gradients.directions",
    "dataflex_pipeline.gradients.influence",
    "dataflex_pipeline.gradients.stream",
    "dataflex_pipeline.methods.loss",
    "dataflex_pipeline.methods.delta_loss",
    "dataflex_pipeline.methods.nice",
    "dataflex_pipeline.models.adapters",
    "dataflex_pipeline.models.base",
    "dataflex_pipeline.models.optimizer_states",
    "dataflex_pipeline.models.tokenizer",
    "dataflex_pipeline.training.arguments",
    "dataflex_pipeline.training.conductor",
    "dataflex_pipeline.training.plot",
    "dataflex_pipeline.training.positions",
)
ALLOCATOR_THREAD = "jemalloc_bg_thd"
"""A thread of Arrow's allocator, which prepares itself for forks."""
PATIENCE = 300.0
"""Seconds of wall time after which a child counts as hung."""


@dataclass(frozen=True)
class Order:
    """One command to run in a child.

    Attributes:
        arguments: of `dataflex`. folder: working directory; its `book` and `output` files are appended to.
        kill: durable write to die at. after: seconds of the child's CPU time to be killed at.
        file_bytes: limit of the size of a file that the child may write (RLIMIT_FSIZE).
        hold: file that the child waits for after its first durable write, made by the test.
    """

    arguments: tuple[str, ...]
    folder: str
    kill: Kill | None = None
    after: float | None = None
    file_bytes: int | None = None
    hold: str | None = None


@dataclass(frozen=True)
class End:
    """How a child ended.

    Attributes:
        code: exit code, or minus the signal. cpu: seconds of CPU time. output: what it printed.
    """

    code: int
    cpu: float
    output: str

    @property
    def killed(self) -> bool:
        return self.code == -signal.SIGKILL


class Lanes:
    """The client's side: `run` may be called from as many threads as there are lanes, and more."""

    def __init__(self, count: int) -> None:
        pairs = [socket.socketpair() for _ in range(count)]
        numbers = [theirs.fileno() for _, theirs in pairs]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, __file__, *map(str, numbers)]
        self.process = subprocess.Popen(command, pass_fds=numbers, env=environment)
        self.free: SimpleQueue[socket.socket] = SimpleQueue()
        self.sockets = [ours for ours, _ in pairs]
        for ours, theirs in pairs:
            theirs.close()
            self.free.put(ours)
        self.cpu = 0.0
        self.children = 0
        self.kills: dict[str, int] = {}
        self._lock = threading.Lock()

    def run(self, order: Order) -> End:
        """Run one command and wait for its end."""
        lane = self.free.get()
        try:
            lane.sendall(json.dumps(asdict(order)).encode() + b"\n")
            with lane.makefile("r") as stream:
                answer = stream.readline()
        finally:
            self.free.put(lane)
        if not answer:
            raise RuntimeError(f"the lane died on {order}")
        end = End(**json.loads(answer))
        with self._lock:
            self.cpu += end.cpu
            self.children += 1
            if end.killed:
                kind = "at a random time" if order.kill is None else f"{order.kill.when} a durable write"
                self.kills[kind] = self.kills.get(kind, 0) + 1
        return end

    def close(self) -> None:
        """End the lanes; nothing stays behind."""
        for one in self.sockets:
            one.close()
        self.process.wait(30)


def serve(descriptors: Sequence[int]) -> None:
    """Import, fork a lane per descriptor, wait for their ends."""
    for name in HEAVY:
        importlib.import_module(name)
    own = str(os.getpid())
    others = [path for path in Path("/proc/self/task").iterdir() if path.name != own]
    names = [(path / "comm").read_text().strip() for path in others]
    if set(names) - {ALLOCATOR_THREAD}:
        raise RuntimeError(f"threads {names} after the imports: a fork would copy their locks without them")
    gc.freeze()  # else each collection in a child goes through, and so copies, all that the imports made
    lanes = []
    for number in descriptors:
        pid = os.fork()
        if pid == 0:
            for other in set(descriptors) - {number}:
                os.close(other)
            _lane(socket.socket(fileno=number))
            os._exit(0)
        lanes.append(pid)
    for number in descriptors:
        os.close(number)
    for pid in lanes:
        os.waitpid(pid, 0)


def _lane(client: socket.socket) -> None:
    for line in client.makefile("r"):
        content = json.loads(line)
        kill = content.pop("kill")
        order = Order(**content, kill=Kill(**kill) if kill else None)
        output = Path(order.folder) / "output"
        start = output.stat().st_size if output.exists() else 0
        pid = os.fork()
        if pid == 0:
            client.close()
            _child(order, output)
        code, cpu = _wait(pid, order.after)
        text = output.read_bytes()[start:].decode(errors="replace")
        client.sendall(json.dumps(asdict(End(code, cpu, text))).encode() + b"\n")


def _wait(pid: int, after: float | None) -> tuple[int, float]:
    clock = (~pid << 3) | 2  # the kernel's id of that process' CPU clock
    deadline = time.monotonic() + PATIENCE
    while True:
        found, status, usage = os.wait4(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime
        late = time.monotonic() > deadline
        if late or (after is not None and time.clock_gettime(clock) >= after):
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.002)


def _child(order: Order, output: Path) -> None:
    code = 70
    try:
        descriptor = os.open(output, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.chdir(order.folder)
        code = _command(order)
    finally:
        if sys.exc_info()[0] is not None:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _command(order: Order) -> int:
    import resource

    import torch
    from dataflex_pipeline.stages.cli import main

    torch.set_num_threads(1)
    install(Book(Path(order.folder) / "book", Path(order.folder)), order.kill, order.hold)
    if order.file_bytes is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write fails instead, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (order.file_bytes, order.file_bytes))
    sys.argv = ["dataflex", *order.arguments]
    try:
        main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(bool(end.code))
    return 0


if __name__ == "__main__":
    serve([int(argument) for argument in sys.argv[1:]])
