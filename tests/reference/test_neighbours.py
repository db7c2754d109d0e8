"""Nearest neighbours and densities against brute force; cells against exact; kills; bad tables."""

import numpy as np
import pytest
from neighbour_tables import ON_CPU, clustered, computed, embeddings, tsds_tables, unit

from dataflex_pipeline import api
from dataflex_pipeline.errors import DataError
from dataflex_pipeline.features.density import Density, support
from dataflex_pipeline.features.embedding_params import NeighbourParams, VectorParams
from dataflex_pipeline.features.neighbours import Neighbours
from dataflex_pipeline.neighbours import vectors as vector_module
from dataflex_pipeline.neighbours.cells import (
    AFFORDABLE,
    Cells,
    Layout,
    affordable_on,
    choose_layout,
    sample_places,
    train_cells,
)
from dataflex_pipeline.neighbours.density import Grouped, kernel_sums
from dataflex_pipeline.neighbours.greedy import choose
from dataflex_pipeline.neighbours.search import nearest, recall, table_cells


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def brute_force(targets, pool, k, valid=None):
    """Rows by (distance, row) and distances, in float64."""
    gaps = targets[:, None, :].astype(np.float64) - pool[None].astype(np.float64)
    distances = np.sqrt((gaps**2).sum(-1))
    if valid is not None:
        distances[:, ~valid] = np.inf
    order = np.lexsort((np.broadcast_to(np.arange(len(pool)), distances.shape), distances), axis=1)[:, :k]
    return order, np.take_along_axis(distances, order, 1)


def small_blocks(monkeypatch, rows=100):
    """Make every pass over a table take many blocks."""
    whole = vector_module.vector_blocks
    for module in ("search", "vectors"):
        monkeypatch.setattr(
            f"dataflex_pipeline.neighbours.{module}.vector_blocks",
            lambda table, n=None: whole(table, n or rows),
        )


@pytest.mark.parametrize("k", [1, 7, 150])
def test_exact_search_is_brute_force_whatever_the_blocks(tmp_path, rng, monkeypatch, k):
    pool, targets = unit(rng.standard_normal((500, 24))), unit(rng.standard_normal((11, 24)))
    valid = rng.random(500) > 0.1
    table = embeddings(tmp_path / "pool", pool, valid)
    whole = nearest(targets, table, k, None)
    small_blocks(monkeypatch)
    found = nearest(targets, table, k, None)
    rows, distances = brute_force(targets, pool, k, valid)
    for answer in (whole, found):
        assert np.array_equal(answer.rows, rows)
        assert np.abs(answer.distances - distances).max() < 1e-6


def test_duplicates_are_at_distance_zero_and_in_row_order(tmp_path, rng):
    pool = unit(rng.standard_normal((200, 24)))
    copies = [3, 50, 120, 199]
    pool[copies] = pool[3]
    found = nearest(pool[[3]], embeddings(tmp_path / "pool", pool), 6, None)
    assert found.rows[0, :4].tolist() == copies
    assert found.distances[0, :4].tolist() == [0, 0, 0, 0]
    assert found.distances[0, 4] > 0.1


def test_more_neighbours_than_rows_are_marked_missing(tmp_path, rng):
    pool = unit(rng.standard_normal((5, 8)))
    found = nearest(pool[:2], embeddings(tmp_path / "pool", pool), 9, None)
    assert (found.rows[:, 5:] == -1).all()
    assert np.isinf(found.distances[:, 5:]).all()
    assert found.counts.tolist() == [5, 5]


def test_search_through_cells_is_one_inverted_file_whatever_the_blocks(tmp_path, rng, monkeypatch):
    import faiss

    pool = clustered(rng, 2000, unit(rng.standard_normal((20, 16))))
    targets = clustered(rng, 30, unit(rng.standard_normal((20, 16))))
    table = embeddings(tmp_path / "pool", pool)
    cells = table_cells(table, 2000, Layout(40, 6))
    index = faiss.IndexIVFFlat(cells.quantizer(), 16, 40)
    index.train(cells.centroids)
    index.add(pool)
    index.nprobe = 6
    squares, rows = index.search(targets, 50)
    small_blocks(monkeypatch)
    found = nearest(targets, table, 50, cells)
    for mine, theirs in zip(found.rows, rows, strict=True):
        assert set(mine.tolist()) == set(theirs.tolist())
    there = rows >= 0
    assert np.allclose(np.sort(found.distances[there] ** 2), np.sort(squares[there]), atol=1e-5)
    truth = nearest(targets, table, 50, None)
    shares = [len(set(a) & set(b) - {-1}) / 50 for a, b in zip(found.rows, truth.rows, strict=True)]
    assert np.allclose(recall(found, truth), shares)
    assert np.allclose(recall(truth, truth), 1)


def test_all_cells_probed_is_exact(tmp_path, rng):
    pool, targets = unit(rng.standard_normal((600, 12))), unit(rng.standard_normal((9, 12)))
    table = embeddings(tmp_path / "pool", pool)
    found = nearest(targets, table, 40, table_cells(table, 600, Layout(10, 10)))
    exact = nearest(targets, table, 40, None)
    assert np.array_equal(found.rows, exact.rows)
    assert np.array_equal(found.distances, exact.distances)


def test_cells_are_the_same_for_the_same_table_and_sampled_evenly(tmp_path, rng, monkeypatch):
    pool = unit(rng.standard_normal((900, 8)))
    table = embeddings(tmp_path / "pool", pool, rng.random(900) > 0.2)
    n_valid = vector_module.count_valid(table)
    first = table_cells(table, n_valid, Layout(6, 2)).centroids
    places = sample_places(n_valid, Layout(6, 2))
    assert len(places) == 6 * 64
    small_blocks(monkeypatch)
    assert np.array_equal(first, table_cells(table, n_valid, Layout(6, 2)).centroids)
    kept = np.concatenate([block for _, block in vector_module.vector_blocks(table)])
    assert np.array_equal(first, train_cells(kept[places], Layout(6, 2)).centroids)


def test_the_choice_of_search_follows_its_cost():
    def chosen(search, queries, rows, **more):
        return choose_layout(search, queries, rows, 384, 1000, more.get("nlist"), more.get("nprobe"))

    assert chosen("auto", 100, 100_000) is None
    assert chosen("auto", 1000, 1_000_000) is None, "assigning rows to cells costs as much as comparing them"
    assert chosen("auto", 1_000_000, 1_000_000) == Layout(1000, 16)
    assert AFFORDABLE < 1_000_000**2 * 384
    assert chosen("exact", 1_000_000, 1_000_000) is None
    assert chosen("ivf", 10, 100) == Layout(10, 10)
    assert chosen("ivf", 10, 100, nlist=300, nprobe=7) == Layout(100, 7)
    assert str(Layout(100, 7)) == "ivf, 7 of 100 cells"


def brute_density(pool, sigma, K):
    """rho and the Gaussian density by sorting all distances, in float64."""
    x = pool.astype(np.float64)
    squares = np.sort(((x[:, None] - x[None]) ** 2).sum(-1), axis=1)[:, :K]
    rho = np.maximum(0, 1 - squares / sigma**2).sum(1)
    return rho, np.exp(-squares / (2 * sigma**2)).sum(1) / min(K, len(pool))


@pytest.mark.parametrize("sigma", [0.01, 0.2, 0.5, 0.75, 2.0])
@pytest.mark.parametrize("K", [1, 13, 400, 5000])
def test_density_is_brute_force(rng, sigma, K, monkeypatch):
    monkeypatch.setattr("dataflex_pipeline.neighbours.density.CHUNK", 1 << 14)
    pool = clustered(rng, 400, unit(rng.standard_normal((8, 20))))
    pool[50:70] = pool[50]
    rho, gaussian = brute_density(pool, sigma, K)
    grouped = Grouped.whole(pool)
    sums = kernel_sums(grouped, sigma, K, gaussian=True)
    assert np.abs(sums.rho / rho - 1).max() < 1e-5
    assert np.abs(sums.density / gaussian - 1).max() < 1e-5
    alone = kernel_sums(grouped, sigma, K)
    assert alone.density is None
    assert np.abs(alone.rho / rho - 1).max() < 1e-5
    some = np.array([0, 51, 399])
    assert np.allclose(kernel_sums(grouped, sigma, K, places=some).rho, rho[some], rtol=1e-5)


def test_with_fewer_vectors_than_kde_k_the_density_is_the_mean_over_all_of_them(rng):
    pool = unit(rng.standard_normal((30, 6)))
    pool[10:] = pool[10]
    x = pool.astype(np.float64)
    kernel = np.exp(-((x[:, None] - x[None]) ** 2).sum(-1) / (2 * 0.75**2))
    for K in (30, 31, 1000):
        sums = kernel_sums(Grouped.whole(pool), 0.75, K, gaussian=True)
        assert np.abs(sums.density - kernel.mean(1)).max() < 1e-6
    alike = kernel_sums(Grouped.whole(pool[10:]), 0.75, 1000, gaussian=True)
    assert np.abs(alike.density - 1).max() < 1e-6


@pytest.mark.parametrize("sigma", [1e-5, 1e-4, 1e3, 1e99, 1e100, 1e200, 1.7e308])
def test_kernels_of_extreme_widths(rng, sigma):
    pool = unit(rng.standard_normal((40, 6)))
    pool[5:9] = pool[5]
    copies = np.ones(40) + 3.0 * np.isin(np.arange(40), range(5, 9))
    for K in (3, 40):
        sums = kernel_sums(Grouped.whole(pool), sigma, K, gaussian=True)
        near = np.minimum(copies, K) if sigma < 1 else np.full(40, K)
        assert np.abs(sums.rho - near).max() < 1e-4
        assert np.abs(sums.density - near / K).max() < 1e-4


@pytest.mark.parametrize("sigma", [0.3, 0.75])
def test_density_through_cells_counts_what_the_cells_hold(rng, sigma):
    pool = clustered(rng, 1500, unit(rng.standard_normal((12, 16))))
    cells = train_cells(pool[sample_places(1500, Layout(20, 4))], Layout(20, 4))
    owner = cells.quantizer().search(pool, 1)[1][:, 0]
    probes = cells.quantizer().search(pool, 4)[1]
    x = pool.astype(np.float64)
    squares = ((x[:, None] - x[None]) ** 2).sum(-1)
    squares[~(owner[None, :, None] == probes[:, None, :]).any(-1)] = np.inf  # not seen: far away
    squares.sort(axis=1)
    for K in (30, 1500):
        grouped = Grouped.by_cell(pool.copy(), cells)
        assert np.array_equal(grouped.vectors, pool[grouped.order])
        sums = kernel_sums(grouped, sigma, K, gaussian=True)
        rho, gaussian = np.empty(1500), np.empty(1500)
        rho[grouped.order], gaussian[grouped.order] = sums.rho, sums.density
        nearest = squares[:, :K]
        assert np.abs(rho / np.maximum(0, 1 - nearest / sigma**2).sum(1) - 1).max() < 2e-5
        assert np.abs(gaussian / (np.exp(-nearest / (2 * sigma**2)).sum(1) / K) - 1).max() < 2e-5


def test_empty_cells_do_no_harm(rng):
    pool = unit(rng.standard_normal((60, 8)))
    far = np.full((1, 8), 100, dtype=np.float32)
    cells = Cells(np.concatenate([pool[:3], far]), 4)
    found = np.empty(60)
    grouped = Grouped.by_cell(pool.copy(), cells)
    found[grouped.order] = kernel_sums(grouped, 0.9, 60).rho
    assert np.allclose(found, brute_density(pool, 0.9, 60)[0], rtol=1e-5)


def test_greedy_choice_is_the_plain_one(rng):
    vectors = clustered(rng, 300, unit(rng.standard_normal((5, 12))))
    vectors[100:110] = vectors[100]
    density = rng.random(300)
    density[200:205] = density[:200].max() / 2
    for alpha in (0.0, 0.6, 1.0):
        chosen = choose(vectors, density, alpha, 40)
        x = vectors.astype(np.float64)
        nearest_chosen, taken = np.full(300, 2.0), []
        for step in range(40):
            mix = alpha * density + (1 - alpha) * nearest_chosen
            mix[taken] = -np.inf
            best = int(np.argmax(mix))
            assert chosen.places[step] == best
            assert chosen.mix[step] == pytest.approx(mix[best], abs=1e-7)
            assert chosen.diversity[step] == pytest.approx(nearest_chosen[best], abs=1e-7)
            taken.append(best)
            nearest_chosen = np.minimum(nearest_chosen, np.sqrt(((x - x[best]) ** 2).sum(1)))
        assert np.allclose(chosen.distance, nearest_chosen, atol=1e-7)
    assert len(choose(vectors, density, 0.5, 999).places) == 300


def test_the_tables(tmp_path, rng):
    pool, target = unit(rng.standard_normal((330, 16))), unit(rng.standard_normal((70, 16)))
    pool_valid, target_valid = rng.random(330) > 0.1, np.arange(70) % 9 > 0
    tables = tsds_tables(
        tmp_path,
        pool,
        target,
        pool_valid=pool_valid,
        target_valid=target_valid,
        near={"max_K": 12},
        crowd={"kde_K": 20, "sigma": 1.0, "gaussian": True},
    )
    near = tables["neighbours"].rows(0, 70, tables["neighbours"].schema.names).to_pylist()
    rows, distances = brute_force(target, pool, 12, pool_valid)
    for place, line in enumerate(near):
        assert line["valid"] == target_valid[place]
        if line["valid"]:
            assert line["neighbours"] == rows[place].tolist()
            assert np.allclose(line["distances"], distances[place], atol=1e-6)
            assert (line["search"], line["recall"], line["reason"]) == ("exact", None, None)
        else:
            assert line["neighbours"] is None
            assert line["reason"] == "there is no text to embed"
    near_rows = np.unique(rows[target_valid])
    assert np.array_equal(support(tables["neighbours"], 330), near_rows)
    crowd = tables["density"].rows(0, 330, tables["density"].schema.names).to_pylist()
    rho, gaussian = brute_density(pool[near_rows], 1.0, 20)
    assert [line["row"] for line in crowd if line["rho"] is not None] == near_rows.tolist()
    assert np.allclose([crowd[row]["rho"] for row in near_rows], rho, rtol=1e-5)
    assert np.allclose([crowd[row]["density"] for row in near_rows], gaussian, rtol=1e-5)
    assert [line["valid"] for line in crowd] == pool_valid.tolist()


def test_every_column_says_what_it_is():
    for feature in (Neighbours, Density):
        assert all(field.metadata[b"description"] for field in feature.schema)


def test_through_cells_the_tables_say_what_was_missed(tmp_path, rng):
    centres = unit(rng.standard_normal((15, 16)))
    pool, target = clustered(rng, 1200, centres), clustered(rng, 100, centres)
    cells = {"search": "ivf", "nlist": 25, "nprobe": 5}
    tables = tsds_tables(
        tmp_path, pool, target, near=cells | {"max_K": 60}, crowd=cells | {"kde_K": 100, "sigma": 0.75}
    )
    near = tables["neighbours"].rows(0, 100, ["recall", "search", "neighbours"]).to_pylist()
    assert {line["search"] for line in near} == {"ivf, 5 of 25 cells"}
    measured = [place for place, line in enumerate(near) if line["recall"] is not None]
    assert len(measured) == 64, "32 of each of two parts"
    rows, _ = brute_force(target, pool, 60)
    for place in measured:
        hits = len(set(near[place]["neighbours"]) & set(rows[place].tolist()))
        assert near[place]["recall"] == pytest.approx(hits / 60)
    crowd = tables["density"].rows(0, 1200, ["rho", "exact_rho"]).to_pylist()
    both = [(line["rho"], line["exact_rho"]) for line in crowd if line["exact_rho"] is not None]
    assert len(both) == 64
    found, exact = np.array(both).T
    assert (found <= exact * (1 + 1e-6)).all()
    assert found.sum() / exact.sum() > 0.9
    near_rows = support(tables["neighbours"], 1200)
    rho, _ = brute_density(pool[near_rows], 0.75, 100)
    by_row = dict(zip(near_rows.tolist(), rho, strict=True))
    assert np.allclose(
        exact, [by_row[r] for r, line in enumerate(crowd) if line["exact_rho"] is not None], rtol=1e-5
    )


def test_a_target_row_that_finds_nothing_is_invalid(tmp_path, rng, monkeypatch):
    pool = unit(rng.standard_normal((40, 8)))
    tables = {
        "pool": embeddings(tmp_path / "pool", pool),
        "target": embeddings(tmp_path / "target", pool[:4]),
    }
    found = nearest(pool[:4], tables["pool"], 5, None)
    found.rows[2], found.distances[2] = -1, np.inf
    monkeypatch.setattr("dataflex_pipeline.features.neighbours.nearest", lambda *_: found)
    feature = Neighbours(Neighbours.Params(max_K=5), ON_CPU)
    table = computed(tmp_path / "near", feature, tables["target"], tables)
    lines = table.part(0).to_pylist()
    assert [line["valid"] for line in lines] == [True, True, False, True]
    assert lines[2]["reason"] == "no pool row in the cells looked into (exact)"
    assert lines[2]["neighbours"] is None
    assert lines[3]["neighbours"] == found.rows[3].tolist()


def test_vectors_of_different_length_are_refused(tmp_path, rng):
    tables = {
        "pool": embeddings(tmp_path / "pool", unit(rng.standard_normal((9, 8)))),
        "target": embeddings(tmp_path / "target", unit(rng.standard_normal((9, 6)))),
    }
    feature = Neighbours(Neighbours.Params(), ON_CPU)
    with pytest.raises(DataError) as raised:
        computed(tmp_path / "near", feature, tables["target"], tables)
    assert "8 dimensions, the target's 6" in raised.value.what
    assert "query_embeddings" in raised.value.fix


@pytest.mark.parametrize("search", ["ivf", "exact"])
def test_parts_made_anew_are_the_same(tmp_path, rng, search):
    """A part is a function of the tables alone, whichever parts are there already."""
    centres = unit(rng.standard_normal((10, 16)))
    pool, target = clustered(rng, 700, centres), clustered(rng, 90, centres)
    cells = {"search": search, "nlist": 16, "nprobe": 3}
    whole = tsds_tables(tmp_path, pool, target, near=cells | {"max_K": 40}, crowd=cells, part=20)
    for name, feature, over in (
        ("neighbours", Neighbours(Neighbours.Params(max_K=40, **cells), ON_CPU), "target"),
        ("density", Density(Density.Params(**cells), ON_CPU), "pool"),
    ):
        before = [whole[name].part(number) for number in range(whole[name].n_parts)]
        for number in (0, 2, 3, whole[name].n_parts - 1):
            whole[name].files[number].unlink()
        again = computed(tmp_path / name, feature, whole[over], whole, 20)
        assert all(again.part(number).equals(part) for number, part in enumerate(before))


def test_needs_pass_the_embedding_settings_on():
    pool, target = VectorParams(model="a"), VectorParams(model="b")
    near = NeighbourParams(max_K=5, pool=pool, target=target)
    density = Density(Density.Params(neighbours=near), ON_CPU)
    needs = density.needs(api.Need("density"))
    assert needs["pool"] == api.Need("embeddings", "pool", None, pool)
    assert needs["neighbours"] == api.Need("neighbours", "target", None, near)
    inner = Neighbours(near, ON_CPU).needs(needs["neighbours"])
    assert inner["target"] == api.Need("embeddings", "target", None, target)
    assert inner["pool"] == needs["pool"]
    assert set(density.params.model_dump()) == {"sigma", "kde_K", "gaussian", "search", "nlist", "nprobe"}


@pytest.mark.parametrize("k", [1, 7, 150, 499])
def test_the_search_of_an_accelerator_is_brute_force_whatever_the_blocks(tmp_path, rng, monkeypatch, k):
    monkeypatch.setattr("dataflex_pipeline.neighbours.accelerated.ELEMENTS", 1 << 11)
    pool, targets = unit(rng.standard_normal((500, 24))), unit(rng.standard_normal((11, 24)))
    valid = rng.random(500) > 0.1
    table = embeddings(tmp_path / "pool", pool, valid)
    exact = nearest(targets, table, k, None)
    small_blocks(monkeypatch)
    found = nearest(targets, table, k, None, "cpu:0")  # torch's own way, on torch's CPU
    assert np.array_equal(found.rows, exact.rows)
    assert np.array_equal(found.distances, exact.distances)


@pytest.mark.parametrize("k", [1, 3, 40, 200])
def test_ties_that_cross_the_end_go_to_the_first_rows(tmp_path, rng, monkeypatch, k):
    """Copies of a vector, more of them than are kept beyond k, in several blocks."""
    pool = unit(rng.standard_normal((420, 16)))
    copies = np.sort(rng.permutation(420)[:300])
    pool[copies] = pool[copies[0]]
    targets = unit(np.concatenate([pool[copies[:1]], rng.standard_normal((5, 16))]))
    small_blocks(monkeypatch)
    found = nearest(targets, embeddings(tmp_path / "pool", pool), k, None, "cpu:0")
    rows, distances = brute_force(targets, pool, k)
    assert np.array_equal(found.rows[0], copies[:k])
    assert np.array_equal(found.rows, rows)
    assert np.abs(found.distances - distances).max() < 1e-6


@pytest.mark.parametrize("sigma", [0.01, 0.2, 0.75, 2.0, 1e200])
@pytest.mark.parametrize("K", [1, 13, 400, 5000])
def test_the_sums_of_an_accelerator_are_those_of_the_cpu(rng, sigma, K, monkeypatch):
    from dataflex_pipeline.neighbours.accelerated import DeviceKernel

    monkeypatch.setattr("dataflex_pipeline.neighbours.accelerated.ELEMENTS", 1 << 12)
    pool = clustered(rng, 400, unit(rng.standard_normal((8, 20))))
    pool[50:70] = pool[50]
    some = np.array([0, 51, 52, 399])
    expected = kernel_sums(Grouped.whole(pool), sigma, K, gaussian=True, places=some)
    found = DeviceKernel(pool, sigma, K, True, "cpu").sums(some)
    assert np.abs(found.rho / expected.rho - 1).max() < 1e-5
    assert np.abs(found.density / expected.density - 1).max() < 1e-5
    alone = DeviceKernel(pool, sigma, K, False, "cpu").sums(np.arange(400))
    assert alone.density is None
    assert np.abs(alone.rho[some] / expected.rho - 1).max() < 1e-5


def test_features_search_and_sum_where_the_device_is_and_say_so(tmp_path, rng, monkeypatch):
    pool, target = clustered(rng, 300, unit(rng.standard_normal((4, 12)))), unit(rng.standard_normal((9, 12)))
    usual = tsds_tables(
        tmp_path / "cpu", pool, target, near={"max_K": 40}, crowd={"kde_K": 20, "gaussian": True}
    )
    for module in ("neighbours", "density"):  # as if torch's CPU were an accelerator
        monkeypatch.setattr(f"dataflex_pipeline.features.{module}.search_device", lambda setting: "cpu:0")
    monkeypatch.setattr("dataflex_pipeline.neighbours.search._block_hits", pytest.fail)
    monkeypatch.setattr("dataflex_pipeline.features.density.kernel_sums", pytest.fail)
    said = []
    monkeypatch.setattr(api.Silent, "say", lambda self, line: said.append(line))
    there = tsds_tables(
        tmp_path / "there", pool, target, near={"max_K": 40}, crowd={"kde_K": 20, "gaussian": True}
    )
    for name in ("neighbours", "distances"):
        assert there["neighbours"].part(0).column(name) == usual["neighbours"].part(0).column(name)
    for name in ("rho", "density"):
        values = [
            np.array(tables["density"].part(0).column(name).to_pylist(), float) for tables in (there, usual)
        ]
        assert np.allclose(*values, rtol=1e-5, equal_nan=True)
    assert any("(exact on cpu:0)" in line for line in said if "neighbours" in line)
    assert any("(exact on cpu:0)" in line for line in said if "density" in line)


def test_what_an_accelerator_searches_exactly_counts_as_a_setting_there_alone(monkeypatch):
    assert Neighbours(Neighbours.Params(), ON_CPU).ingredients() == {}
    monkeypatch.setattr("dataflex_pipeline.features.neighbours.search_device", lambda setting: "cuda")
    assert Neighbours(Neighbours.Params(), ON_CPU).ingredients() == {"exact_up_to": 4e15}
    assert Neighbours(Neighbours.Params(search="exact"), ON_CPU).ingredients() == {}
    million = (1_000_000, 1_000_000, 1024, 1000, None, None)
    assert choose_layout("auto", *million) is not None
    assert choose_layout("auto", *million, affordable=affordable_on("cuda")) is None


def test_threads_change_no_number(rng, monkeypatch):
    import faiss

    pool = clustered(rng, 3000, unit(rng.standard_normal((8, 20))))
    monkeypatch.setattr("dataflex_pipeline.neighbours.density.CHUNK", 1 << 17)
    found = {}
    for count in (1, 3):
        monkeypatch.setattr(faiss, "omp_get_max_threads", lambda count=count: count)
        found[count] = kernel_sums(Grouped.whole(pool), 0.75, 100, gaussian=True)
    assert np.array_equal(found[1].rho, found[3].rho)
    assert np.array_equal(found[1].density, found[3].density)
