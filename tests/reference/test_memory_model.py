"""What a batch of gradients takes at 7B: counted on tensors without numbers, in memory and in operations."""

from __future__ import annotations

import pytest
import torch
from memory_model import ROWS, TOKENS, capture_figures

MIB = 2**20


@pytest.mark.parametrize("rank", [16, 128])
@pytest.mark.parametrize(("checkpointing", "limit"), [(False, 5.6), (True, 0.7)])
def test_bytes_per_token_in_bf16(rank, checkpointing, limit, record_property):
    found = capture_figures(rank, checkpointing)
    record_property("MiB per token", round(found.per_token / MIB, 2))
    record_property("largest tensor, MiB", round(found.largest / MIB))
    record_property("operations per batch", round(found.launches))
    print(
        f"r={rank}, checkpointing={checkpointing}: {found.per_token / MIB:.2f} MiB per token, largest tensor "
        f"{found.largest / MIB:.0f} MiB, {found.launches:,.0f} operations per batch"
    )
    assert found.per_token <= limit * MIB
    # the MLP's activations in float32, of all tokens
    assert found.largest <= ROWS * TOKENS * 11_008 * 4


def test_adapters_in_float32_would_take_more():
    assert capture_figures(16, adapter=torch.float32).per_token > 7.5 * MIB
