"""Embeddings against plain transformers, each other, and a run that is killed."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dataflex_pipeline.api import FeatureInput, Need, Selection, Silent
from dataflex_pipeline.config.fields import Config
from dataflex_pipeline.data.texts import row_text
from dataflex_pipeline.data.vectors import VectorFile, unit_vectors
from dataflex_pipeline.embed import embedders
from dataflex_pipeline.embed.settings import EmbedderSettings, EmbedModel
from dataflex_pipeline.errors import ConfigError, DataError, DataflexError, UserError
from dataflex_pipeline.features import embeddings as embeddings_module
from dataflex_pipeline.features.build import build_feature
from dataflex_pipeline.features.embedding_params import EmbeddingParams
from dataflex_pipeline.features.plan import make_feature, plan_feature
from dataflex_pipeline.methods.near import Near
from dataflex_pipeline.schemas import GROUP, PREPARED
from dataflex_pipeline.store.parts import PartedTable, PartsWriter

HERE = Path(__file__).resolve().parent
WORDS = ["river", "matrix", "猫", "invoice", "quick", "sonnet", "seven", "cloud", "prove", "Brot"]


class Heard(Silent):
    """A progress that keeps the lines."""

    def __init__(self):
        self.lines = []

    def say(self, line):
        self.lines.append(line)


def made_texts(count=24, seed=0):
    """Return texts of 1 to 60 words."""
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(1, 60))) for _ in range(count)]


def conversation(text, answer="So it is."):
    return [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": text},
        {"role": "assistant", "content": answer},
    ]


def write_rows(folder, texts, valid=None, split="pool", part_rows=16):
    """Write a prepared table of one conversation per text."""
    valid = valid or [True] * len(texts)
    n = len(texts)
    table = pa.table(
        {
            "row": list(range(n)),
            "row_id": [f"{number:032x}" for number in range(n)],
            "source": ["made"] * n,
            "messages": [conversation(text) if ok else [] for text, ok in zip(texts, valid, strict=True)],
            "input_ids": [[3, 4, 5]] * n,
            "labels": [[-100, 4, 5]] * n,
            "n_tokens": [3] * n,
            "n_response_tokens": [2] * n,
            "valid": valid,
            "reason": [None if ok else "made invalid" for ok in valid],
            "note": [None] * n,
        },
        schema=PREPARED,
    )
    schema = PREPARED
    if split == "target":
        table, schema = table.append_column(GROUP, pa.array(["all"] * n)), pa.schema([*PREPARED, GROUP])
    writer = PartsWriter(folder, schema, {"rows": n, "split": split})
    parts = range(0, n, part_rows)
    for number, start in enumerate(parts):
        writer.write(number, table.slice(start, part_rows))
    return writer.finish(len(parts), {})


def plan(rows, rows_per_part=8, split="pool", config=None, **params):
    config = config or Config(device="cpu")
    need = Need("embeddings", split, None, params)
    return plan_feature(
        need, config, lambda _: FeatureInput(rows, rows.fingerprint, None, None), rows_per_part
    )


def build(folder, rows, heard=None, **settings):
    return build_feature(folder / "features", plan(rows, **settings), heard or Silent())


def table_of(built):
    return pa.Table.from_batches(list(built.table.blocks()))


def matrix(built):
    column = table_of(built).column("embedding").combine_chunks()
    return np.array(column.to_pylist(), dtype=object), column.type.list_size


def vectors_of(built):
    return np.stack([np.asarray(v, dtype=np.float64) for v in matrix(built)[0]])


def plain_embeddings(folder, texts, max_length):
    """Return MiniLM's mean-pooled unit vectors by transformers alone, one text at a time. [texts, 384]"""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    found = []
    for text in texts:
        inputs = tokenizer(text, truncation=True, max_length=max_length, return_tensors="pt")
        with torch.no_grad():
            mean = model(**inputs).last_hidden_state[0].double().mean(dim=0)
        found.append((mean / mean.norm()).numpy())
    return np.stack(found)


def spoken(texts):
    """Return the text that the conversations of `write_rows` are embedded by."""
    return [f"{text}\nSo it is." for text in texts]


# ---------------------------------------------------------------- the two embedders


def test_vectors_are_those_of_plain_transformers(tmp_path, minilm, one_thread):
    texts = made_texts()
    rows = write_rows(tmp_path / "pool", texts)
    built = build(tmp_path, rows, model=str(minilm), method="sentence-transformers")
    expected = plain_embeddings(minilm, spoken(texts), 256)
    found = vectors_of(built)
    assert found.shape == (24, 384)
    assert np.abs(found - expected).max() < 1e-5
    assert np.abs(np.linalg.norm(found, axis=1) - 1).max() < 1e-6
    table = table_of(built)
    assert table.column("valid").to_pylist() == [True] * 24
    assert table.column("n_tokens").to_pylist() == EmbedModel(str(minilm)).token_counts(spoken(texts), False)


@pytest.mark.slow
def test_batch_size_moves_nothing_but_last_digits_and_is_no_part_of_the_fingerprint(
    tmp_path, minilm, one_thread
):
    rows = write_rows(tmp_path / "pool", made_texts())
    alone = build(tmp_path / "a", rows, model=str(minilm), method="sentence-transformers", batch_size=1)
    wide = build(tmp_path / "b", rows, model=str(minilm), method="sentence-transformers", batch_size=64)
    assert alone.table.fingerprint == wide.table.fingerprint
    assert np.abs(vectors_of(alone) - vectors_of(wide)).max() < 1e-5


@pytest.fixture(scope="module")
def by_vllm(minilm, tmp_path_factory):
    """What the feature with vLLM makes of the test texts, by one vLLM engine that is ended here."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    rows = write_rows(
        tmp_path_factory.mktemp("vllm") / "pool", [*made_texts(), "not valid"], [True] * 24 + [False]
    )
    asked = {"model": str(minilm), "method": "vllm", "max_length": 32, "batch_size": 4}
    feature, heard = make_feature(Need("embeddings", params=asked), Config(device="cpu")), Heard()
    columns = list(feature.input_columns)
    with feature.open(FeatureInput(rows, rows.fingerprint, None, None), heard) as compute:
        return {
            "ingredients": feature.ingredients(),
            "lines": heard.lines,
            "together": compute(rows.rows(0, 25, columns)),
            "one by one": pa.concat_tables([compute(rows.rows(n, n + 1, columns)) for n in range(25)]),
        }


def test_both_embedders_agree(minilm, by_vllm, one_thread):
    from dataflex_pipeline.embed.sentence_transformers import SentenceTransformersEmbedder

    with SentenceTransformersEmbedder(EmbedderSettings(str(minilm), max_length=32)) as embedder:
        ours = unit_vectors(embedder.embed(spoken(made_texts())))[0]
        assert embedder.embed([]).shape == (0, 384)
    theirs = np.array(by_vllm["together"].column("embedding").to_pylist()[:24])
    assert (ours * theirs).sum(axis=1).min() > 1 - 1e-4
    assert np.abs(theirs - plain_embeddings(minilm, spoken(made_texts()), 32)).max() < 1e-4


def test_vllm_is_recorded(by_vllm):
    assert by_vllm["ingredients"]["params"]["method"] == "vllm"
    assert not any("auto" in line for line in by_vllm["lines"])


def test_auto_is_said_and_recorded(minilm, tmp_path):
    rows = write_rows(tmp_path / "pool", made_texts()[:2], [True] * 2)
    asked = {"model": str(minilm), "method": "auto", "max_length": 32}
    feature, heard = make_feature(Need("embeddings", params=asked), Config(device="cpu")), Heard()
    with feature.open(FeatureInput(rows, rows.fingerprint, None, None), heard) as compute:
        compute(rows.rows(0, 2, list(feature.input_columns)))
    assert feature.ingredients()["params"]["method"] == "sentence-transformers"
    assert any("embed_method: auto is sentence-transformers" in line for line in heard.lines)


def test_company_does_not_matter_to_vllm(by_vllm):
    together, alone = by_vllm["together"], by_vllm["one by one"]
    assert together.column("valid").to_pylist() == alone.column("valid").to_pylist() == [True] * 24 + [False]
    pairs = [np.array(t.column("embedding").to_pylist()[:24]) for t in (together, alone)]
    assert np.abs(pairs[0] - pairs[1]).max() < 1e-5


def test_an_embedder_is_used_inside_its_block_only(minilm):
    from dataflex_pipeline.embed.sentence_transformers import SentenceTransformersEmbedder

    with pytest.raises(RuntimeError, match="inside its with block"):
        SentenceTransformersEmbedder(EmbedderSettings(str(minilm))).embed(["a"])


# ---------------------------------------------------------------- texts, prompts, truncation


@pytest.mark.parametrize(
    ("kind", "text"),
    [("conversation", "Hi\nYes?\nAdd 1 2\n3"), ("prompt", "Hi\nYes?\nAdd 1 2"), ("response", "3")],
)
def test_the_text_of_a_row(kind, text):
    turns = [("system", "S"), ("user", "Hi"), ("assistant", "Yes?"), ("tool", "T"), ("user", "Add 1 2")]
    turns = [{"role": role, "content": content} for role, content in [*turns, ("assistant", "3")]]
    assert row_text(turns, kind) == text


@pytest.mark.slow
def test_what_is_embedded_follows_the_settings(tmp_path, minilm, one_thread):
    texts = made_texts(6)
    rows = write_rows(tmp_path / "pool", texts)
    asked = {"model": str(minilm), "method": "sentence-transformers"}
    expected = {
        "prompt": texts,
        "response": ["So it is."] * 6,
        "conversation": [f"query: {text}" for text in spoken(texts)],
    }
    folders = set()
    for kind, whole in expected.items():
        prefix = "query: " if kind == "conversation" else ""
        built = build(tmp_path, rows, text=kind, prompt=prefix, **asked)
        assert np.abs(vectors_of(built) - plain_embeddings(minilm, whole, 256)).max() < 1e-5
        folders.add(built.table.folder)
    assert len(folders) == 3


def test_the_chat_template_is_the_text_of_the_tokens(tmp_path, minilm, tiny_demo, one_thread):
    from transformers import AutoTokenizer

    config = Config(device="cpu", model_name_or_path=str(tiny_demo.model))
    rows = write_rows(tmp_path / "pool", made_texts(3))
    asked = {"model": str(minilm), "method": "sentence-transformers", "text": "chat_template"}
    built = build(tmp_path, rows, config=config, **asked)
    text = AutoTokenizer.from_pretrained(tiny_demo.model).decode([3, 4, 5])
    assert np.abs(vectors_of(built) - plain_embeddings(minilm, [text] * 3, 256)).max() < 1e-5


def test_long_texts_are_cut_and_counted(tmp_path, minilm, one_thread):
    texts = ["river " * 400, "cloud"]
    rows, heard = write_rows(tmp_path / "pool", texts), Heard()
    asked = {"model": str(minilm), "method": "sentence-transformers"}
    built = build(tmp_path, rows, heard, **asked)
    assert built.table.ingredients["params"]["max_length"] == 256  # what the model takes, below 2048
    assert "1 texts are longer than 256 tokens: embedded up to there" in heard.lines
    assert table_of(built).column("n_tokens").to_pylist() == [406, 7]
    short = build(tmp_path, rows, max_length=16, **asked)
    assert short.table.folder != built.table.folder
    assert np.abs(vectors_of(short) - plain_embeddings(minilm, spoken(texts), 16)).max() < 1e-5


def test_tokens_are_counted_while_the_model_runs(tmp_path, minilm, monkeypatch):
    """The embedder here waits until they are counted, which would never end one after the other."""
    counted, count = threading.Event(), EmbedModel.token_counts

    class Waiting:
        dimension = 384

        def embed(self, texts):
            assert counted.wait(60)
            return np.ones((len(texts), 384), np.float32)

    def counting(model, texts, trust_remote_code):
        found = count(model, texts, trust_remote_code)
        counted.set()
        return found

    monkeypatch.setattr(embeddings_module, "make_embedder", lambda *given: nullcontext(Waiting()))
    monkeypatch.setattr(EmbedModel, "token_counts", counting)
    texts = ["river " * 400, "cloud"]
    rows = write_rows(tmp_path / "pool", texts)
    built = build(tmp_path, rows, model=str(minilm), method="sentence-transformers")
    assert table_of(built).column("n_tokens").to_pylist() == [406, 7]


# ---------------------------------------------------------------- rows that have no vector


def test_invalid_rows_keep_their_reason_and_empty_texts_get_one(tmp_path, minilm, one_thread):
    texts = ["river", "", "cloud"]
    rows, heard = write_rows(tmp_path / "pool", texts, [True, True, False]), Heard()
    asked = {"model": str(minilm), "method": "sentence-transformers", "text": "prompt"}
    table = table_of(build(tmp_path, rows, heard, **asked))
    assert table.column("valid").to_pylist() == [True, False, False]
    assert table.column("reason").to_pylist() == [None, "there is no text to embed", "made invalid"]
    assert [v is None for v in table.column("embedding").to_pylist()] == [False, True, True]
    assert "1 rows have no embedding (row 1: there is no text to embed)" in heard.lines


def test_unit_vectors():
    big = np.float32(3e38)
    given = np.array([[3, 4], [0, 0], [np.nan, 1], [np.inf, 1], [big, big], [1e-30, 0]], dtype=np.float32)
    unit, lengths, reasons = unit_vectors(given)
    assert np.allclose(unit[[0, 4, 5]], [[0.6, 0.8], [0.5**0.5] * 2, [1, 0]], atol=1e-7)
    assert lengths[0] == 5
    assert reasons == [
        None,
        "the embedding is zero",
        "the embedding is not finite",
        "the embedding is not finite",
        None,
        None,
    ]
    assert not unit[1:4].any()


def test_every_row_without_a_vector_is_an_error_and_no_table(tmp_path):
    rows = write_rows(tmp_path / "pool", ["a", "b"])
    np.save(tmp_path / "v.npy", np.zeros((2, 3), np.float32))
    with pytest.raises(DataError, match="2 rows: the embedding is zero"):
        build(tmp_path, rows, vectors=str(tmp_path / "v.npy"))
    assert not any(PartedTable.is_complete(folder) for folder in (tmp_path / "features").iterdir())


# ---------------------------------------------------------------- vectors made elsewhere


def some_vectors(n, dimension=5, seed=0):
    return np.random.default_rng(seed).normal(size=(n, dimension)).astype(np.float32)


def as_parquet(path, vectors, kind="fixed", **columns):
    lists = {"fixed": pa.list_(pa.float32(), vectors.shape[1]), "list": pa.list_(pa.float64())}[kind]
    table = {"embedding": pa.array(vectors.tolist(), lists), **columns}
    pq.write_table(pa.table(table), path, row_group_size=7)


@pytest.mark.parametrize("form", ["npy", "float64", "fixed", "list", "with ids"])
def test_vectors_of_a_file(tmp_path, form):
    rows, vectors, heard = write_rows(tmp_path / "pool", made_texts(20)), some_vectors(20), Heard()
    path = tmp_path / ("v.npy" if form in ("npy", "float64") else "v.parquet")
    if path.suffix == ".npy":
        np.save(path, vectors.astype(np.float64 if form == "float64" else np.float32))
    else:
        ids = {"row_id": [f"{n:032x}" for n in range(20)]} if form == "with ids" else {}
        as_parquet(path, vectors, "list" if form == "list" else "fixed", **ids)
    built = build(tmp_path, rows, heard, vectors=str(path))
    expected = vectors / np.linalg.norm(vectors.astype(np.float64), axis=1)[:, None]
    assert np.abs(vectors_of(built) - expected).max() < 1e-6
    assert table_of(built).column("n_tokens").null_count == 20
    assert f"20 vectors of {path.name} were not of length 1: scaled to it" in heard.lines


@pytest.mark.parametrize("group_rows", [3, 100])
def test_rows_of_a_parquet_file_in_any_order(tmp_path, monkeypatch, group_rows):
    monkeypatch.setattr("dataflex_pipeline.data.vectors.READ_ROWS", 8)
    vectors, ids = some_vectors(50), pa.chunked_array([[str(n) for n in range(50)]])
    lists = pa.array(vectors.tolist(), pa.list_(pa.float32()))
    pq.write_table(pa.table({"v": lists, "row_id": ids}), tmp_path / "v.parquet", row_group_size=group_rows)
    file = VectorFile(tmp_path / "v.parquet")
    for start, stop in [(0, 5), (5, 20), (31, 32), (32, 50), (0, 50), (7, 9), (49, 50), (8, 16)]:
        assert np.array_equal(file.rows(start, ids.slice(start, stop - start)), vectors[start:stop])


def test_a_files_content_counts_not_its_place(tmp_path):
    rows = write_rows(tmp_path / "pool", made_texts(4))
    for name, seed in (("a.npy", 0), ("b.npy", 0), ("c.npy", 1)):
        np.save(tmp_path / name, some_vectors(4, seed=seed))
    a, b, c = (plan(rows, vectors=str(tmp_path / name)).ingredients for name in ("a.npy", "b.npy", "c.npy"))
    assert a == b != c


def test_rows_of_a_file_that_have_no_direction_are_named(tmp_path):
    rows, vectors, heard = (
        write_rows(tmp_path / "target", made_texts(4), split="target"),
        some_vectors(4),
        Heard(),
    )
    vectors[1, 2], vectors[3] = np.nan, 0
    np.save(tmp_path / "v.npy", vectors)
    table = table_of(build(tmp_path, rows, heard, split="target", vectors=str(tmp_path / "v.npy")))
    assert table.column("valid").to_pylist() == [True, False, True, False]
    assert table.column("reason").to_pylist() == [
        None,
        "the embedding is not finite",
        None,
        "the embedding is zero",
    ]
    assert any(
        "row 1: the embedding is not finite; row 3: the embedding is zero" in line for line in heard.lines
    )


def test_a_null_vector_of_a_parquet_file(tmp_path):
    rows = write_rows(tmp_path / "pool", made_texts(3))
    column = pa.array([[1.0, 0.0], None, [0.0, 2.0]], pa.list_(pa.float64()))
    pq.write_table(pa.table({"embedding": column}), tmp_path / "v.parquet")
    table = table_of(build(tmp_path, rows, vectors=str(tmp_path / "v.parquet")))
    assert table.column("embedding").to_pylist() == [[1, 0], None, [0, 1]]


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("none.npy", None, "There is no such file."),
        ("v.csv", "1,2", "It ends in '.csv'."),
        ("v.npy", "1,2", "It cannot be read: "),
        ("v.npy", np.zeros(4, np.float32), "It holds float32[4]."),
        ("v.npy", np.zeros((4, 2), np.int64), "It holds int64[4, 2]."),
        ("v.npy", np.array([{}] * 4, dtype=object), "It cannot be read: "),
        ("v.npy", np.zeros((3, 2), np.float32), "It has 3 vectors, for 4 rows."),
        ("v.parquet", "PAR1", "It cannot be read: "),
        ("v.parquet", {"a": [1.0] * 4}, "0 of its columns hold lists"),
        ("v.parquet", {"a": [[1.0]] * 4, "b": [[1.0]] * 4}, "2 of its columns hold lists"),
        ("v.parquet", {"a": [[1.0]] * 5}, "It has 5 vectors, for 4 rows."),
        ("v.parquet", {"a": [[1.0]] * 3 + [[1.0, 2.0]]}, "The vector of row 3 has 2 numbers"),
        ("v.parquet", {"a": [[1.0]] * 4, "row_id": list("abcd")}, "Its row_id in line 0 is a"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, name, content, why):
    rows, path = write_rows(tmp_path / "pool", made_texts(4)), tmp_path / name
    if isinstance(content, str):
        path.write_text(content)
    elif isinstance(content, dict):
        pq.write_table(pa.table(content), path)
    elif content is not None:
        np.save(path, content, allow_pickle=True)
    with pytest.raises(DataError) as caught:
        build(tmp_path, rows, vectors=str(path))
    assert str(path) in caught.value.what
    assert caught.value.why.startswith(why)
    assert caught.value.fix


def test_a_file_is_checked_before_a_run_begins(tmp_path):
    np.save(tmp_path / "v.npy", some_vectors(3))
    need = Need("embeddings", "pool", None, {"vectors": str(tmp_path / "v.npy")})
    feature = make_feature(need, Config())
    feature.check(need, 3)
    with pytest.raises(DataError, match="It has 3 vectors, for 4 rows"):
        feature.check(need, 4)
    assert VectorFile(tmp_path / "v.npy").dimension == 5


# ---------------------------------------------------------------- models and packages


def test_auto_takes_the_first_that_is_installed(monkeypatch):
    there = {"vllm", "sentence_transformers"}
    monkeypatch.setattr(embedders, "_installed", there.__contains__)
    monkeypatch.setattr(embedders, "is_gpu", lambda device: device == "cuda")
    assert embedders.resolve_embedder("auto", "cuda") == "vllm"
    assert embedders.resolve_embedder("auto", "cpu") == "sentence-transformers"
    there.remove("sentence_transformers")
    assert embedders.resolve_embedder("auto", "cpu") == "vllm"
    assert embedders.resolve_embedder("sentence-transformers", "cpu") == "sentence-transformers"
    there.clear()
    there.add("sentence_transformers")
    assert embedders.resolve_embedder("auto", "cuda") == "sentence-transformers"
    assert embedders.resolve_embedder("vllm", "cpu") == "vllm"  # a choice is kept, and fails when it is used
    there.clear()
    with pytest.raises(ConfigError, match="neither vllm nor sentence-transformers is installed"):
        embedders.resolve_embedder("auto", "cpu")


@pytest.mark.parametrize(("name", "extra"), [("sentence-transformers", "embed"), ("vllm", "vllm")])
def test_an_embedder_that_is_not_installed_names_the_extra(minilm, monkeypatch, name, extra):
    monkeypatch.setattr(embedders, "_installed", lambda package: False)
    need = Need("embeddings", params={"method": name, "model": str(minilm)})
    with pytest.raises(ConfigError) as caught:
        make_feature(need, Config()).check(need, 10)
    assert f"embed_method: {name} was set" in caught.value.what
    assert f"pip install 'dataflex-pipeline[{extra}]'" in caught.value.fix


def test_a_model_that_is_not_there(tmp_path):
    for name, why in (
        ("./nowhere", "not looked up"),
        (str(tmp_path), "not the folder of a transformers model"),
    ):
        with pytest.raises(UserError, match=why) as caught:
            EmbedModel(name)
        assert "embed_model" in caught.value.fix


def test_a_hub_model_out_of_reach(monkeypatch):
    monkeypatch.setattr("dataflex_pipeline.embed.settings.hub_reachable", lambda: False)
    need = Need("embeddings", params={"method": "sentence-transformers", "model": "nobody/no-such-model"})
    with pytest.raises(UserError, match="nobody/no-such-model") as caught:
        make_feature(need, Config()).ingredients()
    assert "embed_model" in caught.value.fix


def test_pickled_weights_are_not_read(tmp_path, minilm):
    folder = tmp_path / "model"
    shutil.copytree(minilm, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(UserError, match="only as pickle"):
        EmbedModel(str(folder))


def test_what_tells_a_model_apart_is_its_content(tmp_path, minilm):
    folder = tmp_path / "elsewhere"
    shutil.copytree(minilm, folder)
    assert EmbedModel(str(folder)).identity == EmbedModel(str(minilm)).identity
    settings = json.loads((folder / "1_Pooling" / "config.json").read_text())
    (folder / "1_Pooling" / "config.json").write_text(
        json.dumps(settings | {"pooling_mode_max_tokens": True})
    )
    assert EmbedModel(str(folder)).identity != EmbedModel(str(minilm)).identity
    assert EmbedModel(str(folder)).dimension == 768  # two pooled vectors end to end


def test_the_dimension_is_that_of_the_last_projection(tmp_path, minilm):
    folder = tmp_path / "model"
    shutil.copytree(minilm, folder)
    modules = json.loads((folder / "modules.json").read_text())
    dense = {"idx": 3, "name": "3", "path": "3_Dense", "type": "sentence_transformers.models.Dense"}
    (folder / "modules.json").write_text(json.dumps([*modules, dense]))
    (folder / "3_Dense").mkdir()
    (folder / "3_Dense" / "config.json").write_text(json.dumps({"in_features": 384, "out_features": 17}))
    assert EmbedModel(str(folder)).dimension == 17
    (folder / "modules.json").unlink()
    assert EmbedModel(str(folder)).dimension == 384  # hidden states


def test_a_model_of_another_dimension_than_its_files_say(tmp_path, minilm, one_thread):
    folder = tmp_path / "model"
    shutil.copytree(minilm, folder)
    settings = json.loads((folder / "1_Pooling" / "config.json").read_text())
    (folder / "1_Pooling" / "config.json").write_text(
        json.dumps(settings | {"word_embedding_dimension": 100})
    )
    rows = write_rows(tmp_path / "pool", ["a"])
    feature = make_feature(
        Need("embeddings", params={"model": str(folder), "method": "sentence-transformers"}), Config()
    )
    assert feature.dimension == 100
    with (
        pytest.raises(DataflexError, match="gives vectors of length 384") as caught,
        feature.open(FeatureInput(rows, rows.fingerprint, None, None), Silent()),
    ):
        pass
    assert "embeddings: path.npy" in caught.value.fix


def test_numbers_that_decide_nothing_are_not_in_the_fingerprint(tmp_path, minilm):
    rows, asked = (
        write_rows(tmp_path / "pool", ["a"]),
        {"model": str(minilm), "method": "sentence-transformers"},
    )
    base = plan(rows, **asked).ingredients
    assert plan(rows, batch_size=7, **asked).ingredients == base
    assert plan(rows, max_length=10_000, **asked).ingredients == base  # the model takes 256
    for changed in ({"prompt": "x"}, {"text": "prompt"}, {"max_length": 9}, {"dtype": "bfloat16"}):
        assert plan(rows, **asked, **changed).ingredients != base


# ---------------------------------------------------------------- parameters of methods


def test_parameters_reach_pool_and_target():
    params = EmbeddingParams(
        model_name="some/model",
        embed_method="sentence-transformer",
        query_prompt="q: ",
        query_text="prompt",
        embeddings="a.npy",
    )
    needs = Near(Near.Params(**params.plain())).needs(Selection(1, 2, 0, print))
    pool, target = needs["pool"].params, needs["target"].params
    assert (needs["pool"].split, needs["target"].split) == ("pool", "target")
    assert pool.model == target.model == "some/model"
    assert pool.method == "sentence-transformers"
    assert (pool.text, pool.prompt, pool.vectors) == ("conversation", "", "a.npy")
    assert (target.text, target.prompt, target.vectors) == ("prompt", "q: ", None)
    assert EmbeddingParams().target_vectors().text == "conversation"


def test_two_models_are_a_mistake_and_one_name_twice_is_not():
    assert EmbeddingParams(model_name="a/b", embed_model="a/b").embed_model == "a/b"
    with pytest.raises(ValueError, match="one setting; give one"):
        EmbeddingParams(model_name="a/b", embed_model="a/c")


def test_a_dump_holds_what_decides_and_no_places(tmp_path):
    here = EmbeddingParams(embed_model=str(tmp_path), batch_size=3, embeddings="x.npy", query_path="y")
    dumped = here.model_dump(mode="json")
    assert dumped["embed_model"] == tmp_path.name
    assert not {"batch_size", "embeddings", "query_path", "model_name", "embed_method"} & set(dumped)


# ---------------------------------------------------------------- killed


CHILD = """
    import sys
    from pathlib import Path
    import torch
    torch.set_num_threads(1)
    sys.path[:0] = sys.argv[4:]
    from test_embeddings import build_small_parts

    build_small_parts(*map(Path, sys.argv[1:4]))
"""


def build_small_parts(folder, pool, model):
    rows = PartedTable.open(pool)
    return build(folder, rows, model=str(model), method="sentence-transformers", rows_per_part=2)


@pytest.mark.slow
def test_killed_while_embedding_ends_up_identical(tmp_path, minilm, one_thread):
    write_rows(tmp_path / "pool", made_texts(80))
    straight = build_small_parts(tmp_path / "a", tmp_path / "pool", minilm).table
    arguments = [
        sys.executable,
        "-c",
        textwrap.dedent(CHILD),
        tmp_path / "b",
        tmp_path / "pool",
        minilm,
        HERE,
        HERE.parent / "support",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    cut = subprocess.Popen([str(a) for a in arguments], env=environment)
    deadline = time.monotonic() + 400
    while len(list((tmp_path / "b").rglob("part-*.parquet"))) < 3:
        assert cut.poll() is None, "the child ended by itself"
        assert time.monotonic() < deadline, "no part after 400 s"
        time.sleep(0.002)
    cut.send_signal(signal.SIGKILL)
    cut.wait()
    there = len(list((tmp_path / "b").rglob("part-*.parquet")))
    assert 3 <= there < 40
    again = build_small_parts(tmp_path / "b", tmp_path / "pool", minilm)
    assert again.computed == 40 - there
    for one, other in zip(straight.files, again.table.files, strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_the_vllm_embedder_has_a_memory_share_of_its_own_and_fills_its_batches_itself(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr("dataflex_pipeline.embed.vllm.VllmEngine", lambda *given, **more: made.append(given))
    params = EmbeddingParams(embed_gpu_memory_utilization=0.4, batch_size=3).pool_vectors()
    feature = make_feature(Need("embeddings", "pool", None, params), Config(device="cpu"))
    monkeypatch.setattr(type(feature), "max_length", 32)
    from dataflex_pipeline.embed.vllm import VllmEmbedder

    VllmEmbedder(feature._settings(None), print)
    ((_, _, options),) = made
    assert options["gpu_memory_utilization"] == 0.4
    assert "max_num_seqs" not in options
    assert "embed_gpu_memory_utilization" not in params.model_dump()  # it changes no vector
