"""Right-padded rows without an attention mask: the same numbers, and the kernels that need none."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gradient_models import VOCABULARY, Collect, llama, lora, pad, random_rows, trainable
from torch.nn import functional

from dataflex_pipeline.gradients.capture import GradientCapture
from dataflex_pipeline.models.batches import Sequences, batch_on, padded, round_length
from dataflex_pipeline.models.right_padding import needs_mask
from dataflex_pipeline.models.token_losses import predicting, token_losses

KINDS = ("LlamaConfig", "Qwen2Config", "Qwen3Config", "MistralConfig", "GemmaConfig", "Gemma3TextConfig")


def made(kind, **changes):
    """Return a tiny model of a family with grouped queries, which runs attention by sdpa."""
    import transformers

    torch.manual_seed(0)
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 64,
        "attn_implementation": "sdpa",
    }
    config = getattr(transformers, kind)(**settings | changes)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture
def masks(monkeypatch):
    """Note the mask of each call of scaled_dot_product_attention."""
    seen, plain = [], functional.scaled_dot_product_attention

    def noted(*args, attn_mask=None, **more):
        seen.append(attn_mask)
        return plain(*args, attn_mask=attn_mask, **more)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", noted)
    return seen


def losses_of(model, batch, said):
    """Return the losses of a batch's labelled tokens as the losses feature takes them. [W]"""
    with torch.inference_mode(), token_losses(model, said.append) as losses:
        return losses(*batch, predicting(batch[1], batch[2]))


def captured(model, batch, said):
    given = Collect()
    with GradientCapture(model, given, said.append, verify=False) as capture:
        capture.run(*batch)
    return given.rows


def with_masks(monkeypatch):
    monkeypatch.setattr("dataflex_pipeline.models.token_losses.needs_mask", lambda *_, **__: True)


@pytest.mark.parametrize("kind", KINDS)
def test_attention_gets_no_mask_and_the_numbers_stay(kind, masks, monkeypatch):
    model, batch, said = lora(made(kind)), pad(random_rows()), []
    with torch.inference_mode(), token_losses(model, said.append) as losses:
        masks.clear()
        found = losses(*batch, predicting(*batch[1:]))
        assert masks == [None, None]
    with GradientCapture(model, Collect(), said.append, verify=False) as capture:
        masks.clear()
        capture.run(*batch)
        assert masks == [None, None]
    gradients = captured(model, batch, said)
    assert said == []

    with_masks(monkeypatch)
    masks.clear()
    assert torch.allclose(found, losses_of(model, batch, said), rtol=0, atol=2e-6)
    assert any(mask is not None for mask in masks)
    for key, expected in captured(model, batch, said).items():
        assert float((gradients[key] - expected).norm()) <= 1e-5 * float(expected.norm()), key


def test_left_padded_rows_keep_their_mask(masks):
    model, rows = llama(), random_rows()
    with torch.inference_mode(), token_losses(model) as losses:
        masks.clear()
        left = losses(*pad(rows, "left"), predicting(*pad(rows, "left")[1:]))
        assert all(mask is not None for mask in masks)
        right = losses(*pad(rows), predicting(*pad(rows)[1:]))
    assert torch.allclose(left, right, rtol=0, atol=1e-5)


def looks_ahead():
    """A model whose positions see each other both ways."""
    return made("LlamaConfig", is_causal=False)


def leaks():
    """A model in which the last position, padding or not, is felt everywhere."""
    model = llama()
    model.get_input_embeddings().register_forward_hook(lambda _layer, _args, out: out + out[:, -1:])
    return model


@pytest.mark.parametrize("make", [looks_ahead, leaks])
def test_a_model_that_needs_the_mask_keeps_it_and_says_so(make, masks):
    model, batch, said = make(), pad(random_rows()), []
    assert needs_mask(model, with_gradients=False)
    losses_of(model, batch, said)
    assert len(said) == 1
    assert said[0].startswith("This model needs an attention mask")
    with torch.inference_mode(), token_losses(model) as losses:
        masks.clear()
        losses(*batch, predicting(*batch[1:]))
    assert all(mask is not None for mask in masks)


class Doubled(torch.autograd.Function):
    """Nothing forward; backward, padding gets what it should not."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dy):
        return dy + dy.mean(1, keepdim=True)


def test_gradients_decide_too_where_they_are_taken():
    model = llama()
    model.requires_grad_(False)
    assert not needs_mask(model, with_gradients=True)
    model.model.layers[1].mlp.register_forward_pre_hook(lambda _layer, args: (Doubled.apply(args[0]),))
    assert not needs_mask(model, with_gradients=False)
    assert needs_mask(model, with_gradients=True)


def test_padding_to_whole_tiles_is_for_accelerators_and_changes_nothing(monkeypatch):
    assert [round_length(n) for n in (1, 9, 15, 17, 100, 300, 512, 513, 2049)] == [
        *(1, 9, 15, 18, 104, 320, 512, 576, 2112)
    ]
    model = lora(llama())
    sequences = Sequences(np.arange(40), np.arange(40), np.array([0, 33, 40]))
    everyone = np.arange(2)
    assert batch_on(model, sequences, everyone)[0].shape == (2, 33)
    longer = tuple(torch.from_numpy(array) for array in padded(sequences, everyone, 36))
    assert longer[0].shape == (2, 36)
    plain, tiled = captured(model, batch_on(model, sequences, everyone), []), captured(model, longer, [])
    for name in trainable(model):
        for row in range(2):
            assert torch.allclose(plain[row, name], tiled[row, name], rtol=1e-4, atol=1e-6)
