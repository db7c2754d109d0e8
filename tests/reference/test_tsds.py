"""tsds: the transport against a heap walk, shares of near-duplicates, the columns, the parameters."""

import heapq

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from neighbour_tables import score_whole, selection, tsds_tables, unit

from dataflex_pipeline.errors import ConfigError
from dataflex_pipeline.methods import build_method
from dataflex_pipeline.methods.tsds import Tsds
from dataflex_pipeline.neighbours.spread import Near, keep_nearest, spread_target
from dataflex_pipeline.neighbours.transport import Ranked, find_stop, masses


def heap_walk(distances, inverse, counts, alpha, C):
    """The published walk, one (target, rank) at a time; returns s and every target's masses.

    Visited targets get what the published code gives them; one that was never visited gives 1/M to its first.
    """
    M = len(distances)
    levels = np.cumsum(inverse, axis=1)
    heap = [(levels[j][0], 0, j) for j in range(M) if counts[j] > 1]
    heapq.heapify(heap)
    weighted = [distances[j][0] * inverse[j][0] for j in range(M)]
    cost, last, s, stopped = [0.0] * M, [-1] * M, 1.0, False
    while heap:
        s, k, j = heapq.heappop(heap)
        cost[j] = distances[j][k + 1] * s - weighted[j]
        if alpha / C * sum(cost) >= (1 - alpha) * M:
            stopped = True
            break
        last[j] = k
        if k + 1 <= counts[j] - 2:
            weighted[j] += distances[j][k + 1] * inverse[j][k + 1]
            heapq.heappush(heap, (levels[j][k + 1], k + 1, j))
    found = np.zeros_like(distances)
    for j in range(M):
        given = 0.0
        for k in range(last[j] + 1):
            found[j, k] = inverse[j][k] / (M * s)
            given += found[j, k]
        found[j, last[j] + 1] += max(1 / M - given, 0)
    return s, found, stopped


def worlds(draw_counts=True):
    """Random neighbours: ties, duplicates, crowded and lonely rows, targets with fewer neighbours."""

    @st.composite
    def world(draw):
        rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
        M, L, N = draw(st.integers(1, 12)), draw(st.integers(1, 30)), draw(st.integers(30, 60))
        grid = draw(st.sampled_from([None, 4, 20]))  # few different distances: ties
        distances = np.sort(rng.random((M, L)) * 2, axis=1)
        if grid:
            distances = np.floor(distances * grid) / grid
        rho = 1 + rng.random(N) * draw(st.sampled_from([0.0, 1.0, 100.0]))
        if grid == 4:
            rho = np.round(rho)
        rows = np.stack([rng.permutation(N)[:L] for _ in range(M)])
        counts = rng.integers(1, L + 1, M) if draw(st.booleans()) else np.full(M, L)
        beyond = np.arange(L) >= counts[:, None]
        distances[beyond] = np.inf
        inverse = np.where(beyond, 0.0, 1 / rho[rows])
        alpha = draw(st.sampled_from([0.0, 0.05, 0.3, 0.6, 0.9, 1.0]))
        C = draw(st.sampled_from([0.01, 0.3, 1.0, 5.0, 100.0]))
        return distances, inverse, counts, alpha, C

    return world()


def closed_form(distances, inverse, counts, alpha, C, block=5):
    blocks = [
        Ranked(distances[i : i + block], inverse[i : i + block], counts[i : i + block])
        for i in range(0, len(distances), block)
    ]
    stop = find_stop(lambda: iter(blocks), alpha, C)
    return stop, np.concatenate([masses(each, stop.level, len(distances)) for each in blocks])


def near_a_tie(distances, inverse, counts, alpha, C):
    """Whether some visit meets the rule within rounding: there the two ways may part."""
    levels = np.cumsum(inverse, axis=1)
    visited = np.arange(1, distances.shape[1]) < counts[:, None]
    c = levels[:, :-1][visited]
    gains = c * (distances[:, 1:][visited] - distances[:, :-1][visited])
    order = np.argsort(c, kind="stable")
    left, right = alpha / C * np.cumsum(gains[order]), (1 - alpha) * len(distances)
    return bool((np.abs(left - right) <= 1e-9 * max(1.0, right)).any()) and alpha < 1


@settings(max_examples=600)
@given(worlds())
def test_the_closed_form_is_the_heap_walk(world):
    if near_a_tie(*world):
        return
    s, walked, stopped = heap_walk(*world)
    stop, found = closed_form(*world)
    assert found.min() >= 0
    assert abs(found.sum() - 1) < 1e-12
    assert np.abs(found.sum(1) - 1 / len(found)).max() < 1e-12
    if world[3] == 1.0 and stop.level != s:  # distances that tie: the walk's first cost may round to below 0
        assert s > stop.level
        return
    assert stop.level == s
    assert stop.reached == stopped
    assert np.abs(found - walked).max() < 1e-12


@settings(max_examples=100)
@given(worlds())
def test_the_blocks_do_not_matter(world):
    stop, found = closed_form(*world, block=1)
    again, whole = closed_form(*world, block=100)
    if not near_a_tie(*world):
        assert stop == again
        assert np.array_equal(found, whole)


def test_by_hand():
    # two targets, rho 1: levels 1, 2, 3; increments (d1-d0)*1, (d2-d1)*2
    distances = np.array([[0.1, 0.2, 0.6], [0.0, 0.5, 0.5]])
    inverse, counts = np.ones((2, 3)), np.array([3, 3])
    # alpha 0.5, C 1: stop where G >= M = 2: G(1) = 0.6, G(2) = 0.6 + 0.8 = 1.4: never
    stop, found = closed_form(distances, inverse, counts, 0.5, 1.0)
    assert (stop.level, stop.reached) == (2.0, False)
    assert found.tolist() == [[0.25, 0.25, 0.0], [0.25, 0.25, 0.0]]
    # C 0.3: G >= 0.6 at the first level
    stop, found = closed_form(distances, inverse, counts, 0.5, 0.2999)
    assert (stop.level, stop.reached) == (1.0, True)
    assert found.tolist() == [[0.5, 0, 0], [0.5, 0, 0]]


@pytest.mark.parametrize("C", [5e-324, 1e-300, 1.0, 1e308])
def test_alpha_at_its_ends_and_extreme_scales(C):
    """1 stops at the first visit, near the target; 0 at the last, spread out; a small C helps alpha."""
    distances = np.array([[0.1, 0.2, 0.6], [0.0, 0.5, 0.5]])
    inverse, counts = np.ones((2, 3)), np.array([3, 3])
    with np.errstate(divide="raise", invalid="raise", over="raise"):
        near, nearest = closed_form(distances, inverse, counts, 1.0, C)
        spread, everywhere = closed_form(distances, inverse, counts, 0.0, C)
        between, _ = closed_form(distances, inverse, counts, 0.5, C)
    assert (near.level, near.reached) == (1.0, True)
    assert nearest.tolist() == [[0.5, 0, 0], [0.5, 0, 0]]
    assert (spread.level, spread.reached) == (2.0, False)
    assert everywhere.tolist() == [[0.25, 0.25, 0.0], [0.25, 0.25, 0.0]]
    assert (between.level, between.reached) == ((1.0, True) if C < 0.1 else (2.0, False))
    # a target whose neighbours are all alike adds 0, and 0 x infinity is no number
    alike = closed_form(np.zeros((1, 3)), np.ones((1, 3)), np.array([3]), 0.5, C)
    assert (alike[0].level, alike[0].reached) == (2.0, False)


def test_one_neighbour_gets_all():
    stop, found = closed_form(np.array([[0.3], [0.4]]), np.ones((2, 1)) / 5, np.array([1, 1]), 0.6, 5.0)
    assert found.tolist() == [[0.5], [0.5]]
    assert not stop.reached


def test_the_nearest_target_ties_by_row():
    rows = np.array([[3, 1, -1], [1, 3, 2]])
    distances = np.array([[0.5, 0.5, np.inf], [0.5, 0.6, 0.7]])
    nearest, distance = np.full(5, -1), np.full(5, np.inf)
    keep_nearest(nearest, distance, Near(np.array([4, 7]), rows, distances, np.array([2, 3])))
    assert nearest.tolist() == [-1, 4, 7, 4, -1]
    keep_nearest(
        nearest, distance, Near(np.array([9]), np.array([[2, 1]]), np.array([[0.1, 0.5]]), np.array([2]))
    )
    assert nearest.tolist() == [-1, 4, 9, 4, -1]
    assert distance.tolist() == [np.inf, 0.5, 0.1, 0.5, np.inf]


@pytest.fixture
def rng():
    return np.random.default_rng(5)


def whole_run(folder, pool, target, params=None, said=None, **tables):
    """Score a pool with tsds from vectors on; returns columns and tables."""
    method = Tsds(Tsds.Params(**(params or {})))
    needs = method.needs(selection())
    near = dict(needs["neighbours"].params)
    crowd = dict(needs["density"].params)
    made = tsds_tables(folder, pool, target, near=near, crowd=crowd, **tables)
    state = method.begin(made, selection(said))
    return score_whole(method, made, made["pool"], state), made


def reference(pool, target, max_K, kde_K, sigma, alpha, C):
    """Probabilities by brute force and the heap walk, in float64."""
    x, y = pool.astype(np.float64), target.astype(np.float64)
    distances = np.sqrt(np.maximum(0, ((y[:, None] - x[None]) ** 2).sum(-1)))
    order = np.argsort(distances, axis=1, kind="stable")[:, :max_K]
    distances = np.take_along_axis(distances, order, 1)
    near = np.unique(order)
    squares = np.sort(((x[near][:, None] - x[near][None]) ** 2).sum(-1), axis=1)[:, :kde_K]
    rho = np.ones(len(pool))
    if sigma > 0:
        rho[near] = np.maximum(0, 1 - squares / sigma**2).sum(1)
    _, walked, _ = heap_walk(distances, 1 / rho[order], np.full(len(y), order.shape[1]), alpha, C)
    return np.bincount(order.ravel(), walked.ravel(), len(pool)), rho, near


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"sigma": 0.0, "max_K": 30},
        {"sigma": 1.2, "max_K": 25, "kde_K": 10, "alpha": 0.3, "C": 1.0},
        {"alpha": 0.0, "max_K": 20},
        {"alpha": 1.0, "max_K": 20},
        {"max_K": 1},
    ],
)
def test_from_vectors_to_probabilities(tmp_path, rng, params):
    pool, target = unit(rng.standard_normal((150, 6))), unit(rng.standard_normal((9, 6)))
    full = {"max_K": 5000, "kde_K": 1000, "sigma": 0.75, "alpha": 0.6, "C": 5.0} | params
    found, _ = whole_run(tmp_path, pool, target, params)
    probability, rho, near = reference(pool, target, **full)
    assert np.abs(np.array(found["score"]) - probability).max() < 1e-6
    assert abs(sum(found["score"]) - 1) < 1e-12
    assert found["transport"] == found["score"]
    assert [row for row, value in enumerate(found["rho"]) if value is not None] == near.tolist()
    assert np.allclose([found["rho"][row] for row in near], rho[near], rtol=1e-5)
    gaps = np.sqrt(((pool[:, None].astype(float) - target[None].astype(float)) ** 2).sum(-1))
    near_target = [found["nearest_target"][row] for row in near]
    if full["max_K"] >= 150:
        assert near_target == gaps.argmin(1).tolist()
    assert np.allclose([found["nearest_distance"][row] for row in near], gaps[near, near_target], atol=1e-6)
    assert all(count > 0 for count, p in zip(found["targets"], found["score"], strict=True) if p > 0)


def test_one_target_row(tmp_path, rng):
    pool, target = unit(rng.standard_normal((80, 6))), unit(rng.standard_normal((1, 6)))
    found, _ = whole_run(tmp_path, pool, target, {"max_K": 40, "C": 1.0})
    assert (
        np.abs(np.array(found["score"]) - reference(pool, target, 40, 1000, 0.75, 0.6, 1.0)[0]).max() < 1e-6
    )


def test_near_duplicates_share(tmp_path, rng):
    """A lonely row planted 100 times gets together what it gets alone."""
    target = unit(rng.standard_normal((20, 32)))
    pool = unit(rng.standard_normal((1000, 32)))
    pool[0] = unit(target[:1] + 0.4 * unit(rng.standard_normal((1, 32))))[0]
    copies = unit(pool[:1] + 0.002 * rng.standard_normal((100, 32)) / np.sqrt(32))
    params = {"max_K": 400, "kde_K": 300, "alpha": 0.6, "C": 1.0}
    alone, _ = whole_run(tmp_path / "alone", pool, target, params)
    planted, _ = whole_run(tmp_path / "planted", np.concatenate([pool[1:], copies]), target, params)
    assert alone["score"][0] > 0
    together = sum(planted["score"][999:])
    assert together == pytest.approx(alone["score"][0], rel=0.1)
    without, _ = whole_run(
        tmp_path / "without", np.concatenate([pool[1:], copies]), target, params | {"sigma": 0.0}
    )
    assert sum(without["score"][999:]) > 2 * alone["score"][0], "without the density they would pile up"


def test_rows_that_are_not_valid_get_nothing(tmp_path, rng):
    pool, target = unit(rng.standard_normal((120, 6))), unit(rng.standard_normal((10, 6)))
    target[4] = pool[7]
    pool_valid, target_valid = np.arange(120) % 7 > 0, np.arange(10) != 4
    said = []
    found, _ = whole_run(
        tmp_path, pool, target, {"max_K": 200}, said, pool_valid=pool_valid, target_valid=target_valid
    )
    score = np.array(found["score"])
    assert (score[~pool_valid] == 0).all()
    assert abs(score.sum() - 1) < 1e-12
    assert all(value is None for value, ok in zip(found["rho"], pool_valid, strict=True) if not ok)
    kept = np.flatnonzero(pool_valid)
    expected = reference(pool[kept], target[target_valid], 200, 1000, 0.75, 0.6, 5.0)[0]
    assert np.abs(score[kept] - expected).max() < 1e-6
    assert 4 not in found["nearest_target"]
    assert any("1 target rows have no neighbours" in line for line in said)
    assert any("max_K 200: the pool has 102 usable rows" in line for line in said)
    assert any("kde_K 1000: 102 rows are near the target" in line for line in said)


def test_what_it_says_through_cells(tmp_path, rng):
    said = []
    params = {"search": "ivf", "nlist": 12, "nprobe": 4, "max_K": 30, "C": 100.0}
    whole_run(tmp_path, unit(rng.standard_normal((300, 6))), unit(rng.standard_normal((40, 6))), params, said)
    assert any(line.startswith("neighbours (ivf, 4 of 12 cells): recall 0.") for line in said)
    assert any(line.startswith("density (ivf, 4 of 12 cells): 0.") for line in said)
    assert any(line.startswith("the transport ends at its last neighbours") for line in said)
    assert "of 300 rows are near the target" in said[-1]


def test_the_guide_columns_and_the_score_assignment(tmp_path, rng):
    pool, target = unit(rng.standard_normal((200, 6))), unit(rng.standard_normal((5, 6)))
    params = {"max_K": 30, "kde_K": 20, "sigma": 0.9, "alpha": 0.4, "sample_size": 12}
    plain, _ = whole_run(tmp_path / "plain", pool, target, params)
    assert "mix" not in plain
    filled, _ = whole_run(tmp_path / "filled", pool, target, params | {"guide_columns": True})
    assert filled["score"] == pytest.approx(plain["score"], abs=1e-9)
    drawn, _ = whole_run(tmp_path / "drawn", pool, target, params | {"assignment": "score"})
    near = np.array([row for row, value in enumerate(plain["rho"]) if value is not None])
    assert all(
        filled[name][row] is None
        for name in ("density", "diversity", "mix")
        for row in set(range(200)) - set(near)
    )
    x = pool[near].astype(np.float64)
    squares = ((x[:, None] - x[None]) ** 2).sum(-1)
    density = np.exp(-np.sort(squares, axis=1)[:, :20] / (2 * 0.9**2)).sum(1) / 20
    assert np.allclose([filled["density"][row] for row in near], density, rtol=1e-5)
    diversity, taken, worth = np.full(len(near), 2.0), [], []
    for _ in range(12):
        mix = 0.4 * density + 0.6 * diversity
        mix[taken] = -1
        taken.append(int(mix.argmax()))
        worth.append(mix.max())
        diversity = np.minimum(diversity, np.sqrt(squares[taken[-1]]))
    score = np.array(drawn["score"])
    assert sorted(np.flatnonzero(score).tolist()) == sorted(near[taken].tolist())
    assert np.allclose(score[near[taken]], np.array(worth) / sum(worth), atol=1e-5)
    assert np.allclose([drawn["mix"][row] for row in near[taken]], worth, atol=1e-5)
    assert drawn["transport"] == pytest.approx(plain["score"], abs=1e-9)


def test_another_alpha_or_sigma_searches_nothing_anew():
    """What a parameter changes is in the parameters of the features that depend on it, and nowhere else."""

    def dump(need, **params):
        found = Tsds(Tsds.Params(**params)).needs(selection())[need]
        return found.params.model_dump(mode="json")

    for need in ("neighbours", "density"):
        assert dump(need) == dump(need, alpha=0.1, C=1.0, sample_size=3, batch_size=7)
    assert dump("neighbours") == dump("neighbours", sigma=0.2, kde_K=5)
    assert dump("density") != dump("density", sigma=0.2)
    assert dump("neighbours") != dump("neighbours", max_K=7)


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("sigma", -0.1, "greater than or equal to 0"),
        ("alpha", 1.5, "less than or equal to 1"),
        ("alpha", -0.5, "greater than or equal to 0"),
        ("C", 0.0, "greater than 0"),
        ("max_K", 0, "greater than or equal to 1"),
        ("kde_K", 0, "greater than or equal to 1"),
        ("nprobe", 0, "greater than or equal to 1"),
        ("search", "fast", "'auto', 'exact' or 'ivf'"),
        ("assignment", "mix", "'transport' or 'score'"),
        ("sigma", float("nan"), "finite"),
        ("sigma", 1e-6, "below what distances of embeddings in float32 can tell"),
        ("C", float("inf"), "finite"),
    ],
)
def test_parameters_that_cannot_work(key, value, why):
    with pytest.raises(ConfigError) as raised:
        build_method("tsds", Tsds, {key: value}, "a test")
    assert f"tsds.{key} is {value!r}" in raised.value.what
    assert why in raised.value.why


def test_a_mix_needs_a_width():
    with pytest.raises(ConfigError) as raised:
        build_method("tsds", Tsds, {"sigma": 0.0, "assignment": "score"}, "a test")
    assert "sigma above 0" in str(raised.value)


def test_the_spread_streams_its_blocks(tmp_path, rng, monkeypatch):
    pool, target = unit(rng.standard_normal((150, 6))), unit(rng.standard_normal((30, 6)))
    tables = tsds_tables(tmp_path, pool, target, near={"max_K": 20}, crowd={})
    rho = np.concatenate(
        [b.column("rho").to_numpy(zero_copy_only=False) for b in tables["density"].blocks(["rho"])]
    )
    whole = spread_target(tables["neighbours"], rho, 0.6, 1.0)
    monkeypatch.setattr("dataflex_pipeline.neighbours.spread.TARGETS_READ", 7)
    again = spread_target(tables["neighbours"], rho, 0.6, 1.0)
    assert whole.stop == again.stop
    assert np.abs(whole.mass - again.mass).max() < 1e-15
    assert np.array_equal(whole.nearest, again.nearest)
    assert np.array_equal(whole.targets, again.targets)


def test_leaks_are_named(tmp_path, rng):
    pool, said = unit(rng.standard_normal((20, 6))), []
    tables = tsds_tables(tmp_path, pool, pool[:2], first_id=0)
    Tsds(Tsds.Params()).begin(tables, selection(said))
    assert said[0].startswith("2 rows of the pool are in the target too: target row 0 = pool row 0")
