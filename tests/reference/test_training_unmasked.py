"""Training without an attention mask: the weights are those of a training with one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from families.models import ALL, make_family
from tiny_training import make_config, make_index, make_pool, states, train

from dataflex_pipeline.training import unmasked

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """Train a family on weighted rows of different lengths; return its weights and whether it saw masks."""
    pool = make_pool(tmp_path / "pool")
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def run(name, title, **settings):
        (family,) = [family for family in ALL if family.title == title]
        masks = []

        def watched(*given, **named):
            if given[0].requires_grad:
                masks.append(named.get("attn_mask") is not None)
            return sdpa(*given, **named)

        weights = np.random.default_rng(3).uniform(0, 2, 12)
        config = make_config(
            make_family(family, tmp_path / "models"),
            **{"adam_epsilon": 1e-3, "eval_strategy": "no"} | settings,
        )
        with monkeypatch.context() as patch:
            patch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
            train(tmp_path / name, [0], config, pool, index=make_index(0, 3, pool.n_rows, weights))
        return states(tmp_path / name / "round-00" / "checkpoint")["weights"], masks[8:]

    return run


def farthest(one, other):
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_same_weights_as_with_a_mask(trained, monkeypatch, kind):
    found, masks = trained("without", "Llama", finetuning_type=kind)
    assert masks
    assert not any(masks)
    monkeypatch.setattr(unmasked, "needs_mask", lambda *given, **named: True)
    expected, masks = trained("with", "Llama", finetuning_type=kind)
    assert any(masks)
    assert farthest(found, expected) < 1e-6


def test_a_load_balancing_loss_keeps_the_mask(trained):
    _, masks = trained("balanced", "Mixtral", finetuning_type="full")
    assert any(masks)
    _, masks = trained("free", "Mixtral", finetuning_type="full", router_aux_loss_coef=0)
    assert masks
    assert not any(masks)
