"""What the processes of a launch say to each other, without starting any."""

from __future__ import annotations

import threading
import time
from typing import ClassVar

import pytest
import torch.distributed as dist

from dataflex_pipeline import launch
from dataflex_pipeline.errors import ConfigError, DataError
from dataflex_pipeline.launch.team import CHUNK, Job, Team, TeamError


class Listed(Job):
    """Takes tickets, and keeps what it was told."""

    order: tuple[int, ...] = ()
    text: str = ""
    seen: ClassVar[list[Listed]] = []
    got: ClassVar[list[int]] = []

    def do(self, team):
        self.seen.append(self)
        self.got.extend(team.tickets(self.order))
        team.add(len(self.got))


@pytest.fixture
def pair():
    """Rank 0 and rank 1 over one store; they stop watching at the end."""
    Listed.seen.clear()
    Listed.got.clear()
    store = dist.HashStore()
    made = [Team(store, rank, 2, print) for rank in range(2)]
    yield made
    for team in made[::-1]:
        team.end(0)


def soon(happened, seconds=5.0):
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def following(team):
    """Start a thread that follows rank 0 to the end."""
    thread = threading.Thread(target=lambda: (team.follow(), team.end(0)))
    thread.start()
    return thread


def test_every_ticket_goes_to_one_process(pair):
    first, other = pair
    order = list(range(500, 0, -1))
    thread = following(other)
    with first.give(Listed(order=order), 60):
        soon(lambda: Listed.seen)
        own = list(first.tickets(order))
    assert first.add(len(own)) == 500
    assert first.add(0) == 0
    assert sorted(own + Listed.got, reverse=True) == order
    assert all(part == sorted(part, reverse=True) for part in (own, Listed.got))
    first.end(0)
    thread.join()


def test_a_job_longer_than_a_value_of_the_store_arrives_whole(pair):
    first, other = pair
    job = Listed(text="0123456789" * (CHUNK // 4))
    thread = following(other)
    with first.give(job, 60):
        pass
    assert Listed.seen == [job]
    assert other.patience == 60
    first.end(0)
    thread.join()


def test_a_job_of_another_version_is_refused_by_name(pair, monkeypatch):
    first, other = pair
    monkeypatch.setattr(Listed, "model_dump", lambda *_, **__: {"order": [1], "newer": True})
    refused = pytest.raises(TeamError, match="Listed, which cannot be read here")
    with refused as found, first.give(Listed(), 60):
        other.follow()
    assert found.value.why == "The processes run different versions of this program."
    assert found.value.exit_code == 2


def test_the_failure_of_one_is_raised_on_the_first_and_ends_the_one(pair):
    first, other = pair
    heard = []
    thread = threading.Thread(target=lambda: heard.append(other.fail(DataError("what", "why", "fix"))))
    thread.start()
    with pytest.raises(TeamError) as found, first.give(Listed(), 60):
        pass
    assert (found.value.what, found.value.why, found.value.fix) == ("rank 1: what", "why", "fix")
    assert found.value.exit_code == 2
    threading.Thread(target=other.end, args=(2,)).start()
    first.end(found.value.exit_code)
    thread.join()
    assert heard == [True]
    with pytest.raises(SystemExit) as ended:
        other.check()
    assert ended.value.code == 2


def test_the_end_of_the_command_is_no_job(pair):
    first, other = pair
    thread = following(other)
    first.end(0)
    thread.join(5.0)
    assert not thread.is_alive()
    assert not Listed.seen


def test_a_silent_process_is_told_by_its_rank():
    store = dist.HashStore()
    team = Team(store, 0, 3, print)
    team.patience = 1
    with pytest.raises(TeamError, match=r"Rank [12] has given no sign of life for 1 s"):
        soon(lambda: team.check(), 10.0)
    store.add("left", 2)
    team.end(0)


def test_a_file_that_never_becomes_visible(tmp_path):
    (tmp_path / "there").touch()
    launch.await_file(tmp_path / "there", 0.0)
    with pytest.raises(TeamError, match="not_there does not exist") as found:
        launch.await_file(tmp_path / "folder" / "not_there", 0.1)
    assert "file system that all machines mount" in found.value.fix


@pytest.mark.parametrize(
    ("world", "here", "command"),
    [
        (None, None, "dataflex"),
        ("8", "8", "torchrun --standalone --nproc_per_node 8 -m -- dataflex_pipeline"),
        (
            "32",
            "8",
            "torchrun --nnodes 4 --nproc_per_node 8 --rdzv-backend c10d --rdzv-endpoint FIRST_MACHINE:29500 "
            "-m -- dataflex_pipeline",
        ),
    ],
)
def test_how_it_is_started_again(monkeypatch, world, here, command):
    for name, value in (("WORLD_SIZE", world), ("LOCAL_WORLD_SIZE", here)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert launch.command() == command


def test_a_launcher_that_does_not_say_where_the_others_are(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(ConfigError, match="MASTER_ADDR is not set"):
        launch.join(print)
    assert launch.current() is None
