"""Memory that is left: the machine's, that of control groups at every level, the process's own limits."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from dataflex_pipeline.host_memory import available_bytes, grow_segments, local_processes

GIB = 1 << 30


def machine(root: Path, groups: str, *, free_kib: int = 16 << 20) -> tuple[Path, Path]:
    """Write a made-up /proc; return it and the place for its control groups."""
    (root / "proc" / "self").mkdir(parents=True)
    (root / "proc" / "meminfo").write_text(f"MemTotal: 99999999 kB\nMemAvailable: {free_kib} kB\n")
    (root / "proc" / "self" / "cgroup").write_text(groups)
    (root / "proc" / "self" / "status").write_text("Name: x\nVmSize: 2097152 kB\nVmData: 1048576 kB\n")
    return root / "proc", root / "cgroup"


def group(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n")


def test_the_machine_s_own_memory_is_shared_among_processes(tmp_path):
    places = machine(tmp_path, "0::/\n")
    assert available_bytes(1, *places) == 16 * GIB
    assert available_bytes(4, *places) == 4 * GIB


def test_a_group_of_version_2_and_one_above_it(tmp_path):
    proc, groups = machine(tmp_path, "0::/user/job\n")
    group(groups, cgroup__controllers="memory")
    group(groups / "user", memory__max=8 * GIB, memory__current=7 * GIB, memory__stat="inactive_file 0")
    stat = f"anon 1\ninactive_file {GIB}"
    group(groups / "user/job", memory__max=6 * GIB, memory__current=2 * GIB, memory__stat=stat)
    assert available_bytes(1, proc, groups) == 1 * GIB  # the one above leaves less
    group(groups / "user", memory__max="max")
    assert available_bytes(1, proc, groups) == 5 * GIB  # caches that can be dropped are free


def test_a_group_of_version_1(tmp_path):
    proc, groups = machine(tmp_path, "9:name=systemd:/\n4:memory:/a\n0::/\n")
    usage = {"memory__usage_in_bytes": GIB, "memory__stat": "total_inactive_file 0"}
    group(groups / "memory", memory__limit_in_bytes=9223372036854771712, **usage)
    assert available_bytes(1, proc, groups) == 16 * GIB
    group(groups / "memory" / "a", memory__limit_in_bytes=3 * GIB, **usage)
    assert available_bytes(1, proc, groups) == 2 * GIB


@pytest.mark.parametrize(("name", "used"), [("RLIMIT_AS", 2), ("RLIMIT_DATA", 1)])
def test_the_process_s_own_limits_are_not_shared(tmp_path, monkeypatch, name, used):
    places = machine(tmp_path, "0::/\n")

    def limits(kind):
        return (4 * GIB, 4 * GIB) if kind == getattr(resource, name) else (resource.RLIM_INFINITY,) * 2

    monkeypatch.setattr(resource, "getrlimit", limits)
    assert available_bytes(2, *places) == (4 - used) * GIB


def test_a_system_that_does_not_tell(tmp_path):
    assert available_bytes(1, tmp_path / "none", tmp_path / "none") is None


def test_processes_of_a_launch(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert local_processes() == 1
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert local_processes() == 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert local_processes() == 2


def test_segments_grow_unless_something_is_said_about_them():
    fresh = {}
    grow_segments(fresh)
    assert set(fresh.values()) == {"expandable_segments:True"}
    said = {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:128"}
    grow_segments(said)
    assert said == {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:128"}
