"""The short form of the kill test over ranks: every stage of a run dies once, on any number of processes."""

from __future__ import annotations

import random

import pytest

from crash.launches import run
from crash.rank_kills import SAME_FOR_ALL, Siege, with_batch
from crash.small_run import NAME, Recipe

WORK = 2.0
"""Seconds that a stage is expected to work at least; the moments of the kills lie below 1.2 times that."""


@pytest.mark.slow
def test_stages_whose_ranks_die_give_the_same_run(one_thread, tiny_demo, tmp_path):
    commands = Recipe.of(tiny_demo, "less", *SAME_FOR_ALL).stages(rounds=1)
    run(tmp_path / "calm", 1, *(with_batch(command, 1) for command in commands))
    reference = tmp_path / "calm" / "runs" / NAME
    siege = Siege(commands, reference, [WORK] * len(commands), 4, (1, 2, 4), random.Random(3), most=1)
    siege.one_run(tmp_path / "killed")
    assert siege.done >= 2, "selecting may be done before its kill"
    assert (siege.lost, siege.wrong) == (0, 0)
