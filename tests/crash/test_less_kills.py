"""Kill -9 in the middle of the gradients: the same command again gives the identical tables."""

from __future__ import annotations

import random
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow.parquet as pq
import pytest

from crash.same_run import differences, done_twice
from crash.small_run import Bench, Recipe

pytestmark = pytest.mark.slow

KILLS = 6
SEED = 3
WAYS = {
    "exact": ("less.save_interval=8",),  # the target's directions in two parts
    "projected": ("less.proj_dim=256", "less.dtype=float32", "less.save_interval=16"),
}


@pytest.fixture(scope="module", params=WAYS.values(), ids=list(WAYS))
def recipe(tiny_demo, request):
    return Recipe.of(tiny_demo, "less", *request.param, "score_batch_tokens=512")


@pytest.fixture(scope="module")
def warm(lanes, recipe, tmp_path_factory):
    """A run whose warm-up is done."""
    return Bench(lanes, tmp_path_factory.mktemp("warm") / "bench").finish(recipe.stages()[0])


def copied(warm, folder):
    shutil.copytree(warm.folder, folder, copy_function=shutil.copy2)
    return Bench(warm.lanes, folder)


def test_killed_while_gradients_are_made(warm, recipe, tmp_path):
    score = recipe.stages()[1]
    whole = copied(warm, tmp_path / "whole")
    full = whole.call(score)
    assert full.code == 0, full.output
    draw = random.Random(SEED)

    def killed(number):
        bench = copied(warm, tmp_path / str(number))
        kills = 0
        for _ in range(3):  # each time from where the one before left off
            kills += bench.call(score, after=draw.uniform(0.1, 0.6) * full.cpu).killed
        bench.finish(score)
        return kills, differences(whole.run, bench.run) + done_twice(bench.book())

    with ThreadPoolExecutor(2) as threads:
        ends = list(threads.map(killed, range(KILLS)))
    assert [found for _, found in ends] == [[]] * KILLS
    assert sum(kills for kills, _ in ends) >= KILLS


def test_killed_and_continued_with_another_batch_size_is_within_rounding(warm, recipe, tmp_path):
    score = recipe.stages()[1]
    whole = copied(warm, tmp_path / "whole")
    full = whole.call(score)
    bench = copied(warm, tmp_path / "other")
    assert bench.call(score, after=0.5 * full.cpu).killed
    bench.finish((*score, "score_batch_tokens=1"))
    one, other = (
        pq.read_table(b.run / "round-01" / "scores" / "less.parquet")["score"].to_numpy()
        for b in (whole, bench)
    )
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * np.abs(one).max())
