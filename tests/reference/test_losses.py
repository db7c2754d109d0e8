"""The losses feature against a plain loop over single rows, whatever the batches, padding and order."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dataflex_pipeline.api import FeatureInput, Need, Silent
from dataflex_pipeline.config.fields import Config
from dataflex_pipeline.errors import ConfigError, DataError, UserError
from dataflex_pipeline.features.build import build_feature
from dataflex_pipeline.features.losses import loss_table, mean_losses
from dataflex_pipeline.features.plan import make_feature, plan_feature
from dataflex_pipeline.models.batches import Sequences, length_batches, padded
from dataflex_pipeline.models.token_losses import token_losses
from dataflex_pipeline.schemas import PREPARED
from dataflex_pipeline.store.parts import PartedTable, PartsWriter

VOCABULARY = 97


def sequences(count=40, seed=0):
    """Return random (input_ids, labels) rows of different lengths, with labels on a random half."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        ids = rng.integers(0, VOCABULARY, rng.integers(2, 30)).tolist()
        labels = [token if rng.random() < 0.5 else -100 for token in ids]
        labels[-1] = ids[-1]
        rows.append((ids, labels))
    return rows


def prepared(rows, valid=None):
    """Return a prepared table of (input_ids, labels) rows."""
    valid = valid or [True] * len(rows)
    return pa.table(
        {
            "row": list(range(len(rows))),
            "row_id": [f"{number:032x}" for number in range(len(rows))],
            "source": ["made"] * len(rows),
            "messages": [[]] * len(rows),
            "input_ids": [ids for ids, _ in rows],
            "labels": [labels for _, labels in rows],
            "n_tokens": [len(ids) for ids, _ in rows],
            "n_response_tokens": [sum(label != -100 for label in labels[1:]) for _, labels in rows],
            "valid": valid,
            "reason": [None if ok else "made invalid" for ok in valid],
            "note": [None] * len(rows),
        },
        schema=PREPARED,
    )


def families():
    """Return one tiny configuration per way that models treat their logits and positions."""
    from transformers import CohereConfig, Gemma2Config, GPT2Config, LlamaConfig

    common = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    return {
        "llama": LlamaConfig(**common),
        "gemma2 (soft-capped logits)": Gemma2Config(**common, head_dim=16, final_logit_softcapping=3.0),
        "cohere (scaled logits)": CohereConfig(**common, logit_scale=0.3),
        "gpt2 (absolute positions)": GPT2Config(
            vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=64
        ),
    }


def made(config):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def plain_losses(model, rows):
    """Return what transformers itself says about each row alone. [rows]"""
    with torch.no_grad():
        return [
            model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss.item()
            for ids, labels in rows
        ]


@pytest.mark.parametrize("family", list(families()))
@pytest.mark.parametrize("max_tokens", [1, 64, 100_000])
def test_equal_to_transformers_row_by_row(family, max_tokens):
    model = made(families()[family])
    rows = sequences()
    with torch.no_grad(), token_losses(model) as losses:
        found = mean_losses(losses, Sequences.of(prepared(rows)), max_tokens)
    assert np.allclose(found, plain_losses(model, rows), rtol=0, atol=1e-5)


def test_order_and_company_of_rows_do_not_matter():
    model = made(families()["llama"])
    rows = sequences()
    shuffled = np.random.default_rng(1).permutation(len(rows))
    with torch.no_grad(), token_losses(model) as losses:
        straight = mean_losses(losses, Sequences.of(prepared(rows)), 300)
        mixed = mean_losses(losses, Sequences.of(prepared([rows[i] for i in shuffled])), 300)
    assert np.allclose(mixed, straight[shuffled], rtol=0, atol=1e-5)


def test_first_token_is_never_predicted_and_rows_without_labels_have_no_loss():
    model = made(families()["llama"])
    rows = [([5, 6, 7], [5, -100, -100]), ([5, 6, 7], [5, 6, -100]), ([], [])]
    given_rows = Sequences.of(prepared(rows))
    assert given_rows.n_labels().tolist() == [0, 1, 0]
    with torch.no_grad(), token_losses(model) as losses:
        found = mean_losses(losses, given_rows, 100)
    with torch.no_grad():
        log_probability = torch.log_softmax(model(input_ids=torch.tensor([[5]])).logits[0, -1], -1)[6]
    assert math.isnan(found[0])
    assert found[1] == pytest.approx(-log_probability.item(), abs=1e-5)
    assert math.isnan(found[2])


def test_hook_is_gone_afterwards():
    model = made(families()["llama"])
    with token_losses(model):
        pass
    assert model(input_ids=torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, VOCABULARY)


@given(
    st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), min_size=1, max_size=40),
    st.integers(1, 200),
    st.integers(1, 100),
)
def test_batches_hold_every_row_once_and_keep_the_budgets(shapes, max_tokens, max_labels):
    lengths = np.array([length for length, _ in shapes])
    n_labels = np.array([min(length, labels) for length, labels in shapes])
    batches = length_batches(lengths, n_labels, max_tokens, max_labels)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(shapes)))
    for batch in batches:
        alone = len(batch) == 1
        assert alone or lengths[batch].max() * len(batch) <= max_tokens
        assert alone or n_labels[batch].sum() <= max_labels


def test_invalid_and_infinite_rows_are_named():
    model = made(families()["llama"])
    rows = sequences(6)
    rows[2] = ([1, 2, 3], [-100, 2, 3])
    with torch.no_grad():
        model.get_input_embeddings().weight[90] = float("nan")
    rows = [([i % 90 for i in ids], [i % 90 if i >= 0 else i for i in labels]) for ids, labels in rows]
    rows[4] = ([1, 90, 3], [-100, -100, 3])
    valid = [True, False, True, True, True, True]
    with torch.no_grad(), token_losses(model) as losses:
        table = loss_table(losses, prepared(rows, valid), 10_000)
    assert table.column("valid").to_pylist() == [True, False, True, True, False, True]
    assert table.column("reason").to_pylist() == [
        None,
        "made invalid",
        None,
        None,
        "the loss is not finite",
        None,
    ]
    assert [loss is None for loss in table.column("loss").to_pylist()] == [
        False,
        True,
        False,
        False,
        True,
        False,
    ]


def write_pool(folder, rows, part_rows=16):
    writer = PartsWriter(folder, PREPARED, {"pool": len(rows)})
    table = prepared(rows)
    parts = range(0, len(rows), part_rows)
    for number, start in enumerate(parts):
        writer.write(number, table.slice(start, part_rows))
    return writer.finish(len(parts), {})


def build(tmp_path, model_folder, pool, rows_per_part=8, **settings):
    config = Config(model_name_or_path=str(model_folder), device="cpu", **settings)
    need = Need("losses")
    plan = plan_feature(
        need, config, lambda need: FeatureInput(pool, pool.fingerprint, None, None), rows_per_part
    )
    return build_feature(tmp_path / "features", plan, Silent())


class TestBuild:
    @pytest.fixture
    def model_folder(self, tmp_path):
        made(families()["llama"]).save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    def test_parts_resume_and_end_up_identical(self, tmp_path, model_folder):
        pool = write_pool(tmp_path / "pool", sequences(37))
        first = build(tmp_path / "a", model_folder, pool)
        assert (first.computed, first.n_parts) == (5, 5)
        assert build(tmp_path / "a", model_folder, pool).computed == 0

        cut = build(tmp_path / "b", model_folder, pool).table
        (cut.folder / "_manifest.json").unlink()
        cut.files[1].unlink()
        cut.files[4].unlink()
        again = build(tmp_path / "b", model_folder, pool)
        assert again.computed == 2
        for one, other in zip(first.table.files, again.table.files, strict=True):
            assert one.read_bytes() == other.read_bytes()

    def test_a_memory_that_is_too_small_is_told(self, tmp_path, model_folder, monkeypatch):
        def full(*given):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore lines.")

        pool = write_pool(tmp_path / "pool", sequences(9))
        monkeypatch.setattr("dataflex_pipeline.features.losses.mean_losses", full)
        with pytest.raises(UserError, match="too small for losses of the pool: CUDA out of memory") as told:
            build(tmp_path / "a", model_folder, pool)
        assert "Lower cutoff_len" in str(told.value)
        assert "More lines" not in str(told.value)

    def test_batch_size_moves_nothing_but_last_digits_and_is_no_part_of_the_fingerprint(
        self, tmp_path, model_folder
    ):
        pool = write_pool(tmp_path / "pool", sequences(37))
        wide = build(tmp_path / "a", model_folder, pool, score_batch_tokens=10_000).table
        narrow = build(tmp_path / "b", model_folder, pool, score_batch_tokens=1).table
        assert wide.fingerprint == narrow.fingerprint
        losses = [
            pa.Table.from_batches(list(table.blocks(["loss"]))).column("loss").to_numpy()
            for table in (wide, narrow)
        ]
        assert np.allclose(*losses, rtol=0, atol=1e-5)

    def test_other_rows_are_another_table_and_other_parts_the_same(self, tmp_path, model_folder):
        small = write_pool(tmp_path / "small", sequences(10))
        large = write_pool(tmp_path / "large", sequences(20))
        first = build(tmp_path, model_folder, small)
        assert build(tmp_path, model_folder, large).table.folder != first.table.folder
        again = build(tmp_path, model_folder, small, rows_per_part=4)
        assert (again.table.folder, again.computed, again.n_parts) == (first.table.folder, 0, first.n_parts)

    def test_every_loss_nan_is_an_error_and_no_table(self, tmp_path):
        model = made(families()["llama"])
        with torch.no_grad():
            model.get_output_embeddings().weight.fill_(float("nan"))
        model.save_pretrained(tmp_path / "model")
        pool = write_pool(tmp_path / "pool", sequences(10))
        with pytest.raises(DataError, match="10 rows: the loss is not finite"):
            build(tmp_path, tmp_path / "model", pool)
        assert not any(PartedTable.is_complete(folder) for folder in (tmp_path / "features").iterdir())

    def test_unknown_feature_is_named(self):
        with pytest.raises(ConfigError, match="asks for the feature 'lossess'"):
            make_feature(Need("lossess"), Config())


def test_rows_are_filled_up_with_their_own_last_token():
    """A padding token may be embedded as zeros, of which some norms have no gradient."""
    rows = pa.table({"input_ids": [[5, 6, 7], [8], [3, 4]], "labels": [[-100, 6, 7], [8], [-100, 4]]})
    ids, labels, attention = padded(Sequences.of(rows), np.array([2, 0, 1]))
    assert ids.tolist() == [[3, 4, 4], [5, 6, 7], [8, 8, 8]]
    assert labels.tolist() == [[-100, 4, -100], [-100, 6, 7], [8, -100, -100]]
    assert attention.tolist() == [[1, 1, 0], [1, 1, 1], [1, 0, 0]]
