"""The random projections: fixed numbers, unbiasedness, the law of their variance, independence of batches."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest
import torch

from dataflex_pipeline.errors import ConfigError
from dataflex_pipeline.gradients.philox import philox
from dataflex_pipeline.gradients.projection import Rademacher, make_projection
from dataflex_pipeline.gradients.sketches import CountShift, CountSketch, table_limit
from dataflex_pipeline.seeds import derive_seed

CPU = torch.device("cpu")
KINDS = ["countsketch", "countshift", "rademacher"]


def philox_by_python(counter, key):
    """Philox-4x32-10 in Python's own integers of any size."""
    key = [key & 0xFFFFFFFF, key >> 32]
    for _ in range(10):
        first, second = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [
            (second >> 32) ^ counter[1] ^ key[0],
            second & 0xFFFFFFFF,
            (first >> 32) ^ counter[3] ^ key[1],
            first & 0xFFFFFFFF,
        ]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return counter


# The published known answers of philox4x32-10.
KNOWN = [
    ([0] * 4, 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, 0xFFFFFFFFFFFFFFFF, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        0x299F31D0A4093822,
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_published_answers_of_the_generator(counter, key, words):
    found = philox(tuple(torch.tensor([word]) for word in counter), key)
    assert [int(word) for word in found] == words
    assert philox_by_python(counter, key) == words


def test_the_generator_equals_python_integers():
    counters = np.random.default_rng(0).integers(0, 1 << 32, (200, 4))
    key = 0xFEDCBA9876543210
    found = torch.stack(philox(tuple(torch.from_numpy(counters).unbind(1)), key), 1)
    assert found.tolist() == [philox_by_python([int(word) for word in row], key) for row in counters]


@pytest.mark.parametrize("dim", [1, 7, 4096])
def test_buckets_by_hand(dim):
    bucket, sign = CountSketch(dim, 5).buckets("layer.weight", 9, CPU)
    key = derive_seed(5, "countsketch", "layer.weight")
    for i in range(9):
        words = philox_by_python([i // 2, 0, 0, 0], key)[2 * (i % 2) :]
        assert int(bucket[i]) == words[0] * dim >> 32
        assert int(sign[i]) == (-1 if words[1] & 1 else 1)


@pytest.mark.parametrize("dim", [1, 7, 100, 4096])
def test_rotations_by_hand(dim):
    numel = 300
    projection = CountShift(dim, 5)
    signs, shifts = projection.signs("layer.weight", numel, CPU), projection.shifts("layer.weight", numel)
    key = derive_seed(5, "countshift", "layer.weight")
    assert len(shifts) == -(-numel // dim)
    for q in (0, len(shifts) - 1):
        assert shifts[q] == philox_by_python([q, 0, 1, 0], key)[0] * dim >> 32
    vector = torch.arange(1.0, numel + 1)
    expected = torch.zeros(dim)
    for i in range(numel):
        word = philox_by_python([i // 128, 0, 0, 0], key)[i % 128 // 32]
        assert int(signs[i]) == (-1 if word >> (i % 32) & 1 else 1)
        expected[(i % dim + shifts[i // dim]) % dim] += int(signs[i]) * vector[i]
    assert torch.allclose(project(projection, vector[None], **{"layer.weight": numel})[0], expected)


@pytest.mark.parametrize("dim", [1, 130, 512])
def test_dense_signs_by_hand(dim):
    signs = Rademacher(dim, 5).signs("layer.weight", 3, 2, CPU)
    key = derive_seed(5, "rademacher", "layer.weight")
    for row, i in enumerate((3, 4)):
        for k in range(dim):
            word = philox_by_python([i, 0, k // 128, 0], key)[k % 128 // 32]
            assert int(signs[row, k]) == (-1 if word >> (k % 32) & 1 else 1)


def project(projection, vectors, **cut):
    """Project [b, P] given as one parameter, or cut into several."""
    into = torch.zeros(len(vectors), projection.dim)
    begin = 0
    for name, width in (cut or {"w": vectors.shape[1]}).items():
        projection.add(name, vectors[:, begin : begin + width].contiguous(), into)
        begin += width
    return into


def law(kind, x, y, dim, widths):
    """The variance of <Sx, Sy>: pairs of coordinates that can meet, 1/K each."""
    terms = (x[:, None] * y[None, :]) ** 2 + (x * y)[:, None] * (x * y)[None, :]
    meet = ~torch.eye(len(x), dtype=torch.bool)
    if kind == "countshift":  # a chunk of K coordinates of one parameter is moved as a whole
        chunks, begin = [], 0
        for width in widths:
            chunks.append(begin + torch.arange(width) // dim)
            begin = int(chunks[-1][-1]) + 1
        chunk = torch.cat(chunks)
        meet = chunk[:, None] != chunk[None, :]
    return float(terms[meet].double().sum()) / dim


def estimates(kind, x, y, dim, seeds, **cut):
    """<Sx, Sy> under many seeds."""
    both = torch.stack([x, y])
    found = [project(make_projection(kind, dim, seed), both, **cut) for seed in range(seeds)]
    return np.array([float(px @ py) for px, py in found])


@pytest.mark.parametrize("kind", KINDS)
def test_unbiased_with_the_variance_of_the_law(kind):
    dim, seeds = 16, 3000
    x = torch.randn(48, generator=torch.Generator().manual_seed(3))
    y = 0.5 * x + torch.randn(48, generator=torch.Generator().manual_seed(4))
    x[0] = y[0] = 4.0  # a coordinate that stands out makes the last term of the law count
    found = estimates(kind, x, y, dim, seeds, a=40, b=8)
    inner = float(x @ y)
    variance = law(kind, x, y, dim, (40, 8))
    if kind != "countshift":
        closed = float(x @ x) * float(y @ y) + inner**2 - 2 * float((x**2 * y**2).sum())
        assert variance == pytest.approx(closed / dim, rel=1e-5)
    assert found.mean() == pytest.approx(inner, abs=4 * (variance / seeds) ** 0.5)
    assert found.var() == pytest.approx(variance, rel=0.1)


ROWS = 24


def low_rank(width, generator):
    """Two gradients of rank 2 of a weight [ROWS, width] whose inputs have two massive channels."""
    inputs, common = torch.randn(2, width, generator=generator), torch.randn(ROWS, 2, generator=generator)
    inputs[:, 1] *= 30
    inputs[:, width // 2] *= 15
    return tuple((common + torch.randn(ROWS, 2, generator=generator)) @ inputs for _ in range(2))


HARD = {
    "constant": lambda width, generator: 2 * (torch.ones(ROWS, width),),
    "low rank, massive channels": low_rank,
    "one row": lambda width, generator: 2 * (torch.eye(ROWS)[:, :1] * torch.arange(1.0, width + 1),),
    "one column": lambda width, generator: 2 * (torch.eye(width)[0].expand(ROWS, width),),
}


@pytest.mark.parametrize("width", [8, 16, 32])  # rows that are half a chunk, a chunk, two chunks
@pytest.mark.parametrize("form", list(HARD))
def test_rotated_chunks_keep_the_law_where_they_lie_on_a_weights_rows(form, width):
    dim, seeds = 16, 800
    x, y = (each.flatten() for each in HARD[form](width, torch.Generator().manual_seed(1)))
    found = estimates("countshift", x, y, dim, seeds, w=ROWS * width)
    inner, spread = float(x @ y), law("countshift", x, y, dim, [ROWS * width]) ** 0.5
    assert spread <= law("countsketch", x, y, dim, [ROWS * width]) ** 0.5 * (1 + 1e-6)
    if spread < 1e-3 * abs(inner):  # what lies in one chunk is kept as it is
        assert np.abs(found - inner).max() < 1e-4 * abs(inner)
        return
    errors = (found - inner) / spread
    assert abs(errors.mean()) < 4 / seeds**0.5
    # Countsketch's own largest error in these cases is 3.6 to 5.6 of its standard deviations.
    assert errors.std() == pytest.approx(1, rel=0.15)
    assert np.abs(errors).max() < 7


def test_vectors_no_longer_than_a_chunk_keep_their_products():
    vectors = torch.randn(3, 90)
    found = project(CountShift(96, 2), vectors)
    assert torch.allclose(found @ found.T, vectors @ vectors.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_whatever_the_batch_order_and_blocks(kind, monkeypatch):
    vectors = torch.randn(8, 1000, generator=torch.Generator().manual_seed(0))
    whole = project(make_projection(kind, 96, 1), vectors)
    singles = torch.cat([project(make_projection(kind, 96, 1), vectors[[row]]) for row in range(8)])
    assert torch.allclose(singles, whole, rtol=1e-5, atol=1e-5)
    if kind != "rademacher":
        assert torch.equal(singles, whole)
    monkeypatch.setattr("dataflex_pipeline.gradients.sketches.COORDINATES", 256)
    monkeypatch.setattr("dataflex_pipeline.gradients.sketches.CACHED_ELEMENTS", 64)
    monkeypatch.setattr("dataflex_pipeline.gradients.projection.CPU_SIGNS", 96 * 7)
    assert torch.allclose(project(make_projection(kind, 96, 1), vectors), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("width", [1, 95, 96, 97, 192, 1000])
def test_halves_add_up_to_the_same_and_do_not_see_other_rows(width):
    vectors = torch.randn(5, width)
    projection = CountShift(96, 1)

    def by_halves(rows):
        into = torch.zeros(len(rows), 96)
        projection.add_by_halves("w", rows, into)
        return into

    found = by_halves(vectors)
    assert torch.allclose(found, project(projection, vectors), rtol=1e-5, atol=1e-5)
    assert torch.equal(torch.cat([by_halves(vectors[[row]]) for row in range(5)]), found)


@pytest.mark.parametrize("kind", KINDS)
def test_linear_and_another_matrix_for_every_seed_and_name(kind):
    vectors = torch.randn(2, 50)
    projection = make_projection(kind, 32, 1)
    px, py = project(projection, vectors)
    both = project(projection, vectors.sum(0, keepdim=True))[0]
    assert torch.allclose(px + py, both, atol=1e-5)
    assert not torch.allclose(project(make_projection(kind, 32, 2), vectors)[0], px)
    assert not torch.allclose(project(projection, vectors, other=50)[0], px)


@pytest.mark.parametrize("cache_bytes", [0, 500, 1 << 20])
def test_buckets_kept_or_made_anew_and_both_orders_of_adding_agree(cache_bytes):
    vectors = torch.randn(3, 100)
    expected = project(CountSketch(16, 0), vectors, a=60, b=39)
    projection = CountSketch(16, 0, cache_bytes)
    for _ in range(2):
        into = torch.zeros(3, 16)
        projection.add_sorted("a", vectors[:, :60], into)
        projection.add_sorted("b", vectors[:, 60:99], into)
        assert torch.allclose(into, expected, atol=1e-5)
        assert torch.equal(project(projection, vectors, a=60, b=39), expected)


@pytest.mark.parametrize("kind", ["countsketch", "countshift"])
@pytest.mark.parametrize("limit", [0, 150, 1 << 20])
def test_a_table_is_made_once_however_many_blocks_of_rows_there_are(kind, limit, monkeypatch):
    made = []
    sketch = {"countsketch": CountSketch, "countshift": CountShift}[kind]
    maker = {"countsketch": "_code", "countshift": "signs"}[kind]
    make = getattr(sketch, maker)
    monkeypatch.setattr(sketch, maker, lambda self, name, *rest: made.append(name) or make(self, name, *rest))
    projection = make_projection(kind, 16, 0, cache_bytes=limit)
    batches, into = 2, torch.zeros(1, 16)
    for _ in range(batches):
        for name, width in {"a": 30, "b": 200, "c": 300}.items():
            for _ in range(3):
                projection.add(name, torch.ones(1, width), into)
    # 150 bytes are room for the signs or buckets of a alone: b and c are then made for every batch
    kept = {0: "", 150: "a", 1 << 20: "abc"}[limit]
    expected = {name: 1 if name in kept else batches for name in "abc"}
    assert {name: made.count(name) for name in expected} == expected


@pytest.mark.parametrize(
    ("free", "kept"), [(8 << 30, 2 << 30), (20 << 30, 4 << 30), (139 << 30, (139 << 30) // 10)]
)
def test_an_accelerator_keeps_tables_by_its_free_memory(free, kept, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda device: (free, 1 << 40), raising=False)
    assert table_limit("cuda") == kept
    assert table_limit("cpu") == table_limit("mps") == 1 << 30


def test_tables_of_a_7b_adapter_fit_an_accelerators_share():
    """r = 128 on all linear layers of a 7B: 320 million coordinates."""
    for projection, kind in ((CountSketch(96, 0), "_by_bucket"), (CountShift(96, 0), "_rotated")):
        table = getattr(projection, kind)("w", 96 * 100, CPU)
        per_coordinate = sum(part.numel() * part.element_size() for part in table) / 9600
        assert per_coordinate * 320e6 < 4 << 30
        assert per_coordinate < 5.1


@pytest.mark.parametrize("dim", [0, -4, 1 << 31])
def test_an_impossible_dimension_is_refused(dim):
    with pytest.raises(ConfigError, match=rf"proj_dim: {dim} was set[\s\S]*4096"):
        make_projection("countsketch", dim, 0)


def test_an_unknown_projection_is_refused_with_a_suggestion():
    with pytest.raises(ConfigError, match=r"Did you mean 'countsketch'\?"):
        make_projection("count_sketch", 8, 0)


@pytest.mark.parametrize(
    ("dim", "device", "words"),
    [(512, "cpu", "the device is cpu"), (500, "cuda", "multiples of 512"), (512, "cuda", "not there")],
)
def test_trak_without_what_it_needs_is_refused(dim, device, words):
    with pytest.raises(ConfigError, match=rf"projection: trak was set[\s\S]*{words}[\s\S]*rademacher"):
        make_projection("trak", dim, 0, device=device)


def test_trak_gets_a_projector_per_parameter_and_at_most_32_rows(monkeypatch):
    made, calls = [], []

    class Projector:
        def __init__(self, numel, dim, seed, kind, device, rows):
            made.append((numel, dim, seed, kind))
            self.matrix = torch.ones(numel, dim)

        def project(self, block, model_id):
            calls.append(len(block))
            return block @ self.matrix

    projectors = types.ModuleType("trak.projectors")
    projectors.CudaProjector = Projector
    projectors.ProjectionType = types.SimpleNamespace(rademacher="signs")
    monkeypatch.setitem(sys.modules, "fast_jl", types.ModuleType("fast_jl"))
    monkeypatch.setitem(sys.modules, "trak", types.ModuleType("trak"))
    monkeypatch.setitem(sys.modules, "trak.projectors", projectors)
    projection = make_projection("trak", 512, 0, device="cuda:0")
    vectors = torch.randn(40, 10)
    found = project(projection, vectors, a=4, b=6)
    assert torch.allclose(found, (vectors.sum(1, keepdim=True) / 512**0.5).expand(40, 512), atol=1e-5)
    assert calls == [32, 8, 32, 8]
    assert [(numel, kind) for numel, _, _, kind in made] == [(4, "signs"), (6, "signs")]
    assert made[0][2] != made[1][2]
