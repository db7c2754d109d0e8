"""Kill -9 at every durable write and at random times; the same command again gives the undisturbed run."""

from __future__ import annotations

import random
import shutil
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from crash.kill_points import Kill
from crash.same_run import differences, done_twice
from crash.small_run import Bench, Recipe

pytestmark = pytest.mark.slow

EVERY = 4
"""Fresh runs are killed at every fourth write; the chains are killed at every one."""
RANDOM_KILLS = 8
ATTEMPTS = 4
SEED = 20

KEEP_BEST = "load_best_model_at_end=true"
ALL_CHECKPOINTS = ("less.checkpoints=all", "keep_checkpoints=true")
NICE = (
    "nice.generator=transformers",
    "nice.mc_samples=2",
    "nice.max_new_tokens=4",
    "nice.reward_model_backend=metric",
    "nice.reward_backend_params.metric.name=chrf",
    "nice.save_interval=8",
    "max_samples=24",
)
"""Answers, rewards and directions of the target in two parts each, the pool's influence in three."""


def in_parallel(work, items):
    """Run over the items in two threads, one per lane; the first failure is raised."""
    with ThreadPoolExecutor(2) as threads:
        return list(threads.map(work, items))


@pytest.fixture(scope="module")
def recipes(tiny_demo):
    return {
        "loss": Recipe.of(tiny_demo),
        "delta_loss": Recipe.of(tiny_demo, "delta_loss", KEEP_BEST, "delta_loss.schedule=centered"),
        "less": Recipe.of(tiny_demo, "less", *ALL_CHECKPOINTS),
        "picked": Recipe.of(tiny_demo),
    }


@pytest.fixture(scope="module")
def undisturbed(lanes, recipes, tmp_path_factory):
    """The finished runs that nothing disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")

    def finish(name):
        recipe = recipes[name]
        return Bench(lanes, folder / name).finish(*(recipe.pick() if name == "picked" else recipe.round()))

    return dict(zip(recipes, in_parallel(finish, recipes), strict=True))


class TestTheComparison:
    def test_an_undisturbed_run_is_repeated_exactly(self, undisturbed, lanes, recipes, tmp_path):
        again = Bench(lanes, tmp_path / "again").finish(*recipes["loss"].round())
        assert differences(undisturbed["loss"].run, again.run) == []
        n_writes = len(again.writes())
        again.finish(*recipes["loss"].round())
        assert [name for name in again.writes()[n_writes:] if not name.endswith("sources.json")] == []

    def test_it_sees_a_changed_weight_a_changed_row_and_a_left_over_file(self, undisturbed, tmp_path):
        copy = tmp_path / "copy"
        shutil.copytree(undisturbed["loss"].run, copy)
        weights = copy / "round-02" / "checkpoint" / "adapter_model.safetensors"
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
        scores = copy / "round-01" / "scores" / "loss.parquet"
        table = pq.read_table(scores)
        column = table.schema.get_field_index("score")
        changed = pa.array([0.0, *table.column("score").to_pylist()[1:]])
        pq.write_table(table.set_column(column, table.schema.field("score"), changed), scores)
        (copy / "pool" / "part-00009.parquet.partial").touch()
        assert differences(undisturbed["loss"].run, copy) == [
            "pool/part-00009.parquet.partial: left over",
            "round-01/scores/loss.parquet: other rows",
            "round-02/checkpoint/adapter_model.safetensors: other bytes",
        ]

    def test_it_sees_work_done_twice(self):
        book = [
            ("table", "pool/part-00000.parquet"),
            ("table", "pool/part-00000.parquet"),
            ("visible", "pool/part-00000.parquet"),
            ("step", "round-00/training/checkpoint-1"),
            ("step", "round-00/training/checkpoint-1"),
            ("visible", "round-00/training/checkpoint-1/COMPLETE.json"),
            ("step", "round-00/training/checkpoint-2"),
        ]
        assert done_twice(book) == []
        assert done_twice([*book, book[0], book[3]]) == [
            "pool/part-00000.parquet was made again",
            "the step of round-00/training/checkpoint-1 was trained again",
        ]


@pytest.mark.timeout(1800)  # some 200 children; ten minutes where the processors are shared
def test_killed_at_every_durable_write_on_the_way(undisturbed, lanes, recipes, tmp_path):
    """Four runs that only ever get one durable write further before the next kill."""
    chains = {
        "before": ("loss", recipes["loss"].round(), "before"),
        "after": ("less", recipes["less"].round(), "after"),
        "stages": ("delta_loss", recipes["delta_loss"].stages(), "after"),
        "picked": ("picked", recipes["picked"].pick(), "after"),
    }

    def chain(name):
        method, commands, when = chains[name]
        bench = Bench(lanes, tmp_path / name)
        return bench, undisturbed[method], bench.chain(commands, when)

    with ThreadPoolExecutor(len(chains)) as threads:
        ends = list(threads.map(chain, chains))
    for bench, reference, kills in ends:
        assert kills >= len(set(reference.writes()))
        assert set(bench.writes()) == set(reference.writes())
        assert differences(reference.run, bench.run) == []
        assert done_twice(bench.book()) == []
    print(f"\n{sum(kills for _, _, kills in ends)} kill points in chains: {[kills for _, _, kills in ends]}")


def test_a_fresh_run_killed_once_then_run_again(undisturbed, lanes, recipes, tmp_path):
    """Each run dies once, alternately just before and just after a write, and goes on undisturbed."""
    reference = undisturbed["loss"]
    writes = range(1, len(reference.writes()) + 1, EVERY)
    points = [Kill(("before", "after")[number % 2], write) for number, write in enumerate(writes)]

    def once(point):
        bench = Bench(lanes, tmp_path / f"{point.when}-{point.write}")
        assert bench.call(recipes["loss"].round()[0], kill=point).killed
        bench.finish(*recipes["loss"].round())
        return differences(reference.run, bench.run) + done_twice(bench.book())

    ends = zip(points, in_parallel(once, points), strict=True)
    assert {point: found for point, found in ends if found} == {}
    print(f"\n{len(points)} kill points in fresh runs")


def killed_inside(attempt, share, length):
    """Kill a command after a share of its processor time; one that was quicker than expected is done anew.

    Args:
        attempt: runs it from its beginning to a kill after so many seconds; returns its bench and its end.
        share: of the time. length: the seconds that it is expected to take.
    """
    for _ in range(ATTEMPTS):
        bench, end = attempt(share * length)
        if end.killed:
            return bench
        length = end.cpu
    raise AssertionError(f"it ended {ATTEMPTS} times before {share:.0%} of the time that it took before")


def test_killed_at_random_times(undisturbed, lanes, recipes, tmp_path):
    """Moments between the durable writes too: half-written tables, checkpoints and logs."""
    draw = random.Random(SEED)
    reference = undisturbed["delta_loss"]
    commands = recipes["delta_loss"].round()
    full = Bench(lanes, tmp_path / "full").call(commands[0]).cpu
    shares = [draw.uniform(0.02, 0.98) for _ in range(RANDOM_KILLS)]

    def attempt(after):
        bench = Bench(lanes, tmp_path / f"{after:.6f}")
        return bench, bench.call(commands[0], after=after)

    def once(share):
        bench = killed_inside(attempt, share, full)
        bench.finish(*commands)
        return differences(reference.run, bench.run) + done_twice(bench.book())

    assert in_parallel(once, shares) == [[]] * RANDOM_KILLS


def test_killed_while_answering_rewarding_and_capturing(lanes, tiny_demo, tmp_path):
    """The scoring of nice: killed before every durable write on the way, and at random times."""
    warmup, score, *_ = Recipe.of(tiny_demo, "nice", *NICE).stages()
    warm = Bench(lanes, tmp_path / "warm").finish(warmup)

    def scored(name, **kill):
        bench = Bench(lanes, tmp_path / name)
        shutil.copytree(warm.folder, bench.folder)
        return bench, bench.call(score, **kill)

    reference, end = scored("reference")
    assert end.code == 0, end.output
    draw = random.Random(SEED)
    shares = [draw.uniform(0.05, 0.98) for _ in range(RANDOM_KILLS)]

    def chained():
        bench = Bench(lanes, tmp_path / "chain")
        shutil.copytree(warm.folder, bench.folder)
        kills = bench.chain([score], "before")
        assert kills >= len(set(reference.writes()) - set(warm.writes()))
        return bench

    def attempt(after):
        return scored(f"random-{after:.6f}", after=after)

    def once(share):
        bench = chained() if share is None else killed_inside(attempt, share, end.cpu)
        bench.finish(score)
        return differences(reference.run, bench.run) + done_twice(bench.book())

    assert in_parallel(once, [None, *shares]) == [[]] * (1 + RANDOM_KILLS)
