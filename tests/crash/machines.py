"""Two machines on one: network and host name of their own (namespaces of the kernel), one shared folder."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from crash.launches import BIN, Launch, environment

NETWORK = "10.217.43"
"""Of the cable between the two; the kernel keeps it apart from every other network."""
PORT = 29471


class Machine:
    """A network namespace with one end of a cable, and the name that commands on it see as the host's.

    Args:
        number: 1 or 2. tag: makes names unique among the tests that run at once. hosts: file of names and
            addresses that it has in place of /etc/hosts.
    """

    def __init__(self, number: int, tag: str, hosts: Path) -> None:
        self.number, self.hosts = number, hosts
        self.name = f"df{tag}-{number}"
        self.address = f"{NETWORK}.{number}"

    def inside(self, command: list[str]) -> list[str]:
        """Return a command line that runs a command on this machine."""
        named = 'hostname "$0" && mount --bind "$1" /etc/hosts && shift && exec "$@"'
        own = ["ip", "netns", "exec", self.name, "unshare", "--uts", "--mount"]
        return [*own, "sh", "-c", named, self.name, str(self.hosts), *command]

    def start(self, folder: Path, arguments: tuple[str, ...]) -> OnMachine:
        """Start this machine's share of a launch: a torchrun with one process, met at machine 1."""
        meet = [
            "--rdzv-backend",
            "c10d",
            "--rdzv-endpoint",
            f"{NETWORK}.1:{PORT}",
            "--rdzv-id",
            "test",
            "--shutdown-timeout",
            "2",
        ]
        torchrun = [str(BIN / "torchrun"), "--nnodes", "2", "--nproc_per_node", "1", *meet]
        return OnMachine(folder, self.inside([*torchrun, *arguments]))


class OnMachine(Launch):
    """One machine's share of a launch."""

    def __init__(self, folder: Path, line: list[str]) -> None:
        self.started(folder, 1, line, environment())


def _ip(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *words], capture_output=True, text=True, timeout=20)


@contextlib.contextmanager
def two_machines(folder: Path) -> Iterator[tuple[Machine, Machine]]:
    """Make two machines with a cable between them; skip where that is not permitted.

    Args:
        folder: for a file of their names.
    """
    hosts = folder / "hosts"
    tag = f"{os.getpid() % 10**6}{time.monotonic_ns() % 1000}"
    both = Machine(1, tag, hosts), Machine(2, tag, hosts)
    hosts.write_text("".join(f"{each.address} {each.name}\n" for each in both) + "127.0.0.1 localhost\n")
    try:
        try:
            refused = [_ip("netns", "add", each.name) for each in both]
        except FileNotFoundError:
            pytest.skip("there is no ip command to make two networks with")
        words = [each.stderr.strip() for each in refused if each.returncode]
        if words:
            pytest.skip(f"two networks cannot be made: {words[0]}")
        ends = [f"v{tag}{each.number}" for each in both]
        cable = ("link", "add", ends[0], "netns", both[0].name, "type", "veth")
        made = _ip(*cable, "peer", "name", ends[1], "netns", both[1].name)
        if made.returncode:
            pytest.skip(f"two networks cannot be joined: {made.stderr.strip()}")
        for each, end in zip(both, ends, strict=True):
            for setup in (
                ("addr", "add", f"{each.address}/24", "dev", end),
                ("link", "set", end, "up"),
                ("link", "set", "lo", "up"),
            ):
                subprocess.run(["ip", "-n", each.name, *setup], check=True, timeout=20)
        yield both
    finally:
        for each in both:
            _ip("netns", "del", each.name)
