"""Batches that do not fit the memory: halved and done, with the numbers that smaller batches give."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from cli_runs import data, dataflex, done
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from dataflex_pipeline.models.batches import length_batches
from dataflex_pipeline.models.room import Room, is_out_of_memory

METHODS = {
    "loss": (),
    "less": ("less.gradient_type=sgd", "less.proj_dim=64", "less.dtype=float32"),
    "nice": (
        "nice.gradient_type=sgd",
        "nice.proj_dim=64",
        "nice.dtype=float32",
        "nice.generator=transformers",
        "nice.generation_batch_size=2",
        "nice.mc_samples=2",
        "nice.max_new_tokens=4",
        "nice.reward_model_backend=metric",
        "nice.reward_backend_params.metric.name=chrf",
    ),
}


@pytest.fixture
def memory_for(monkeypatch):
    """Let a model's forward pass fail as a GPU's does where a batch has more tokens than are said."""
    plain = LlamaForCausalLM.forward

    def limit(tokens, error=torch.OutOfMemoryError, text="CUDA out of memory. Tried to allocate 2.00 GiB"):
        def forward(self, input_ids=None, **more):
            if input_ids is not None and input_ids.numel() > tokens:
                raise error(text)
            return plain(self, input_ids=input_ids, **more)

        monkeypatch.setattr(LlamaForCausalLM, "forward", forward)

    return limit


def scored(method, demo, run, *more):
    text = done(
        "score", *data(demo), "warmup_step=0", "--run", run, "--method", method, *METHODS[method], *more
    )
    return pq.read_table(f"runs/{run}/round-01/scores/{method}.parquet"), text


@pytest.mark.parametrize("method", METHODS)
def test_the_table_is_that_of_smaller_batches(method, tiny_demo, memory_for, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    more = ("max_samples=60", "rows_per_part=16")
    small, _ = scored(method, tiny_demo, "small", *more, "score_batch_tokens=300")
    memory_for(600)
    found, text = scored(method, tiny_demo, "found", *more)
    assert "the memory was too small for a batch of" in text
    assert np.allclose(found["score"].to_numpy(), small["score"].to_numpy(), rtol=0, atol=1e-5)
    assert found["row_id"].equals(small["row_id"])


def test_a_size_that_was_too_large_is_said_once_and_remembered(tiny_demo, memory_for, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    memory_for(1000)
    _, text = scored("loss", tiny_demo, "found", "rows_per_part=64")
    said = [line for line in text.splitlines() if "the memory was too small" in line]
    assert 1 <= len(said) <= 5
    assert len(said) == len(set(said))


def test_a_row_that_does_not_fit_alone_has_its_activations_recomputed(tiny_demo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small, _ = scored("less", tiny_demo, "small", "max_samples=24", "score_batch_tokens=300")
    plain = LlamaForCausalLM.forward

    def forward(self, input_ids=None, **more):
        recomputes = "forward" in vars(self.model.layers[0])
        if input_ids.numel() > 100 and not recomputes and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return plain(self, input_ids=input_ids, **more)

    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    found, text = scored("less", tiny_demo, "found", "max_samples=24")
    assert "activations are recomputed from here on" in text
    assert np.allclose(found["score"].to_numpy(), small["score"].to_numpy(), rtol=0, atol=1e-5)


def test_a_row_that_does_not_fit_alone_is_refused_in_words(tiny_demo, memory_for, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ("score", *data(tiny_demo), "warmup_step=0", "--run", "r", "--method", "loss", "max_samples=60")
    done("round", 0, *command[1:4], "warmup_step=0", "--run", "r", "max_samples=60")
    memory_for(20)  # the check of the model takes sequences of 16
    text = refused_after_preparing(tmp_path, *command)
    assert "The memory is too small for losses of the pool" in text
    assert "cutoff_len" in text


def refused_after_preparing(folder, *arguments):
    ran = dataflex(*arguments)
    assert ran.code == 2, ran.out + ran.err
    assert "Traceback" not in ran.err
    assert not list(folder.rglob("scores/*.parquet"))
    return ran.err


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=40),
    tokens=st.integers(1, 400),
    limit=st.integers(40, 300),
)
def test_every_row_is_done_once_whatever_the_memory(lengths, tokens, limit):
    lengths = np.array(lengths)
    counted = Counter()

    def work(rows):
        if lengths[rows].max() * len(rows) > limit:
            raise torch.OutOfMemoryError("out of memory")
        counted.update(rows.tolist())

    room = Room(tokens)
    room.each_batch(lengths, np.ones_like(lengths), 10_000, work)
    assert counted == Counter(range(len(lengths)))
    assert room.tokens <= max(tokens, 1)


def test_after_halving_batches_are_those_of_the_smaller_size():
    lengths, fits, done_together = np.full(40, 10), 80, []

    def work(rows):
        if lengths[rows].sum() > fits:
            raise torch.OutOfMemoryError("out of memory")
        done_together.append(rows.tolist())

    Room(320).each_batch(lengths, np.ones_like(lengths), 10_000, work)
    smaller = length_batches(lengths, np.ones_like(lengths), fits, 10_000)
    assert done_together == [batch.tolist() for batch in smaller]


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried",
        "CUDA error: out of memory",
    ],
)
def test_other_words_for_the_same(text):
    assert is_out_of_memory(RuntimeError(text))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_other_errors_pass_through():
    def work(rows):
        raise RuntimeError("shapes")

    with pytest.raises(RuntimeError, match="shapes"):
        Room(10).each_batch(np.array([3, 3]), np.array([1, 1]), 10, work)
