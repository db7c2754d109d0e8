"""Counted storages against hand-computed ones, and the size of batches that follows from them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dataflex_pipeline.models import memory
from dataflex_pipeline.models.batches import Sequences, padded
from dataflex_pipeline.models.memory import BatchMemory, measure_batches, peak_of, quantised
from dataflex_pipeline.models.room import Room
from dataflex_pipeline.store.agreed import BATCH_TOKENS, agreed

MIB = 1 << 20
SIDE = 512
"""A matrix of SIDE x SIDE numbers in float32 is one MiB."""


def matrix() -> torch.Tensor:
    return torch.ones(SIDE, SIDE)


def test_the_peak_is_that_of_the_storages_alive_together():
    there = matrix()

    def work():
        product = there @ there  # 1
        raised = product + 1  # 2
        del product  # 1
        return raised.relu().sum()  # 2, and a number

    assert peak_of(work, "cpu") == 2 * MIB + 4


def test_views_and_changes_in_place_take_nothing():
    there = matrix()
    assert peak_of(lambda: there.t().add_(1)[:3].mul_(2), "cpu") == 0


def test_what_a_backward_pass_needs_is_kept_until_then():
    """A chain of n exponentials keeps each of its outputs; without gradients, two at a time are alive."""
    weight = matrix().requires_grad_()

    def chain():
        x = weight * 0
        for _ in range(4):
            x = x.exp()
        return x.sum()

    with torch.no_grad():
        assert peak_of(chain, "cpu") == pytest.approx(2 * MIB, abs=64)
    # 4 outputs are kept; on the way back each is dropped as the gradient on its other side is made
    assert peak_of(lambda: chain().backward(), "cpu") == pytest.approx(5 * MIB, abs=64)


def made_up(fixed: int, per_token: int, per_row: int):
    """Return work whose memory is known: numbers beside those of rows and of padded tokens."""

    def run(sequences, rows):
        ids = padded(sequences, rows)[0]
        beside = [torch.ones(fixed), torch.ones(len(ids) * per_row), torch.ones(ids.size * per_token)]
        assert all(each.numel() for each in beside)

    return run


def test_what_batches_take_is_found_whatever_it_is_made_of():
    found = measure_batches(made_up(5000, 100, 700), np.arange(1, 65), "cpu")
    assert (found.fixed, found.per_token, found.per_row) == (4 * 5000, 4 * 100, 4 * 700)
    assert found.longest == 4 * (5000 + 700 + 64 * 100)
    assert found.of_batch(8, 32) == 4 * (5000 + 8 * (700 + 32 * 100))
    tokens = found.tokens_in(4 * (5000 + 8 * (700 + 32 * 100)), 32)
    assert tokens == 8 * 32


@pytest.mark.parametrize(
    ("tokens", "wanted"), [(0, 1), (1, 1), (5, 4), (7, 6), (11, 8), (12, 12), (3000, 2048)]
)
def test_sizes_are_rounded_down(tokens, wanted):
    assert quantised(tokens) == wanted


def rows_of(*lengths: int) -> Sequences:
    ids = np.arange(1, sum(lengths) + 1)
    return Sequences(ids, ids, np.concatenate([[0], np.cumsum(lengths)]))


@pytest.fixture
def free(monkeypatch):
    """Say how many bytes are free."""

    def limit(count):
        monkeypatch.setattr(memory, "free_bytes", lambda device: count)

    return limit


def settled(sequences, run, **more) -> tuple[Room, list[str]]:
    said: list[str] = []
    room = Room("auto", said.append, **more)
    room.settle(sequences, run, torch.device("cpu"))
    return room, said


def test_auto_takes_a_share_of_what_is_free(free):
    free(MIB)
    room, said = settled(rows_of(64, 32), made_up(5000, 100, 700))
    per_token = 4 * (100 + 700 / 48)
    assert room.tokens == quantised(int((0.6 * MIB - 20_000) / per_token)) == 1024
    assert len(said) == 1
    assert said[0].startswith("score_batch_tokens: auto is 1,024 (")
    assert "1 of 1 MiB free may be taken" in said[0]


def test_auto_is_never_more_than_the_number_that_was_the_default(free):
    free(None)
    assert settled(rows_of(8), made_up(1, 1, 1))[0].tokens == 16384
    free(1 << 50)
    assert settled(rows_of(8), made_up(1, 1, 1))[0].tokens == 16384


def test_the_first_size_is_kept_for_all_processes_and_after_a_kill(free, tmp_path):
    free(MIB)
    first, _ = settled(rows_of(64, 32), made_up(5000, 100, 700), folder=tmp_path)
    free(64 * MIB)
    second, said = settled(rows_of(64, 32), made_up(5000, 100, 700), folder=tmp_path)
    assert second.tokens == first.tokens == agreed(tmp_path, BATCH_TOKENS)
    assert not said
    assert [path.name for path in tmp_path.iterdir()] == ["_batch_tokens"]


def test_a_row_that_does_not_fit_is_relieved_once_and_then_refused(free):
    free(100_000)
    heavy = {"now": 1000}

    def run(sequences, rows):
        return made_up(1, heavy["now"], 1)(sequences, rows)

    def relieve():
        relieved, heavy["now"] = heavy["now"] > 100, 100
        return relieved

    assert settled(rows_of(64), run, relieve=relieve)[0].tokens == 128
    heavy["now"] = 1000
    with pytest.raises(torch.OutOfMemoryError, match=r"a row of 64 tokens takes .* MiB"):
        settled(rows_of(64), run)


def test_a_size_that_was_never_found_is_a_mistake():
    with pytest.raises(RuntimeError, match="settled"):
        Room("auto").each_batch(np.array([3]), np.array([1]), 10, lambda rows: None)


def test_memory_of_a_batch_has_its_parts():
    assert BatchMemory(10.0, 2.0, 4.0, 0.0).of_tokens(4) == 3
