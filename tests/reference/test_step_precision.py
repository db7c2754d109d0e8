"""Scoring in the precision of the training step: what is kept, what comes out, and what the check allows."""

from __future__ import annotations

import pytest
import torch
from gradient_models import Collect, llama, lora, pad, random_rows, reference
from tiny_training import make_config, make_model

from dataflex_pipeline.api import Need
from dataflex_pipeline.features.plan import make_feature
from dataflex_pipeline.gradients import capture as capture_module
from dataflex_pipeline.gradients.capture import GradientCapture
from dataflex_pipeline.models import adapters, base
from dataflex_pipeline.models.adapters import load_for_gradients, load_for_training, wrap_for_training
from dataflex_pipeline.models.base import Precision, in_step_precision, load_base, load_for_scoring
from dataflex_pipeline.models.rounding import AT_MOST, EXACT, coarse_rounding, rounding

HIDDEN, MLP = 64, 160


def model_of(precision, layers=2):
    """Return a model whose base is in a precision, with an adapter in float32 as peft makes it."""
    model = lora(llama(hidden_size=HIDDEN, intermediate_size=MLP, num_hidden_layers=layers))
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(getattr(torch, precision))
    return model


def scored(precision, layers=2):
    return in_step_precision(model_of(precision, layers), Precision(precision))


def kept_in_float32(model):
    """Return how many tensors of each width a capture keeps for its backward pass in float32."""
    widths = []

    def note(tensor):
        if tensor.dtype == torch.float32 and tensor.dim() == 3:
            widths.append(tensor.shape[-1])
        return tensor

    with (
        GradientCapture(model, Collect(), pytest.fail, verify=False) as capture,
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
    ):
        capture.run(*pad(random_rows()))
    return {width: widths.count(width) for width in (HIDDEN, MLP)}


def test_no_input_of_an_adapted_layer_is_kept_in_float32_under_bf16():
    """The norms of Llama make float32 copies of their own: two each at most."""
    norms, layers = 2 * 2 + 1, 2
    found, as_peft_makes_it = kept_in_float32(scored("bfloat16")), kept_in_float32(model_of("bfloat16"))
    assert found[MLP] == 0
    assert found[HIDDEN] <= 2 * norms
    assert as_peft_makes_it[MLP] == layers  # the input of down_proj
    assert as_peft_makes_it[HIDDEN] >= found[HIDDEN] + 6 * layers  # of q, k, v, o, gate, up: a copy each


def test_gradients_point_where_those_in_float32_do():
    rows = random_rows(6)
    given = {}
    for precision in ("float32", "bfloat16"):
        given[precision] = Collect()
        with GradientCapture(scored(precision), given[precision], pytest.fail) as capture:
            capture.run(*pad(rows))
    exact, found = (given[precision].rows for precision in ("float32", "bfloat16"))
    for row in range(len(rows)):
        names = [name for number, name in exact if number == row]
        one, other = (torch.cat([source[row, name].flatten() for name in names]) for source in (exact, found))
        assert other.dtype == torch.float32
        assert float(torch.cosine_similarity(one, other, dim=0)) >= 0.9998


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


def dtypes(model):
    """Return the number formats of the base and of the adapter."""
    return tuple(
        {p.dtype for n, p in model.named_parameters() if ("lora_" in n) == adapter}
        for adapter in (False, True)
    )


def test_adapters_are_loaded_as_a_step_multiplies_them_and_trained_in_float32(folder, monkeypatch):
    config = make_config(make_model(folder / "model"))
    wrap_for_training(config, load_base(config, "cpu"), 5).save_pretrained(folder / "adapter")
    for module in (base, adapters):
        monkeypatch.setattr(module, "precision", lambda config, device: Precision("bfloat16"))
    narrow = ({torch.bfloat16}, {torch.bfloat16})
    assert dtypes(load_for_scoring(config, folder / "adapter", "cpu")) == narrow
    assert dtypes(load_for_gradients(config, folder / "adapter", "cpu")) == narrow
    assert dtypes(load_for_gradients(config, None, "cpu")) == narrow
    assert dtypes(load_for_training(config, folder / "adapter", "cpu", 0)) == (
        {torch.bfloat16},
        {torch.float32},
    )


@pytest.mark.parametrize("name", ["losses", "gradients", "policy_gradients"])
def test_the_form_of_the_adapter_is_recorded_under_bf16_and_changes_no_table_else(name):
    def ingredients(**settings):
        config = make_config("nowhere", attn_implementation="sdpa", **settings)
        return make_feature(Need(name), config).ingredients()

    assert ingredients(bf16=True)["adapter"] == "bfloat16"
    assert "adapter" not in ingredients(bf16=False)


def test_the_bound_follows_the_depth():
    assert rounding(scored("float32")) == EXACT
    assert rounding(scored("bfloat16")) == coarse_rounding(2) == pytest.approx(0.072, abs=1e-3)
    assert [round(coarse_rounding(layers), 2) for layers in (32, 80)] == [0.29, 0.46]
    assert coarse_rounding(1000) == AT_MOST


@pytest.mark.parametrize("layers", [2, 12])
def test_sound_captures_stay_well_within_the_bound(layers):
    model = scored("bfloat16", layers)
    with GradientCapture(model, Collect(), pytest.fail) as capture:
        capture.run(*pad(random_rows()))
    assert 0 < capture.largest_error < coarse_rounding(layers) / 2


def broken(change):
    """Return a tap's delivery that changes what a layer saw before it is used."""
    plain = GradientCapture._deliver

    def deliver(self, layer, x, dy):
        plain(self, layer, *change(x, dy))

    return deliver


BUGS = {
    "the next position's input": lambda x, dy: (x.roll(1, 1), dy),
    "another row's gradient": lambda x, dy: (x, dy.flip(0)),
    "padding of the shorter row counts": lambda x, dy: (x, _with_padding(dy)),
}


def _with_padding(dy):
    dy = dy.clone()
    dy[1:, -1] += dy[1:, 0]
    return dy


@pytest.mark.parametrize("bug", list(BUGS))
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_broken_hook_is_caught(precision, bug, monkeypatch):
    monkeypatch.setattr(capture_module.GradientCapture, "_deliver", broken(BUGS[bug]))
    said = []
    with GradientCapture(scored(precision), Collect(), said.append) as capture:
        capture.run(*pad(random_rows()))
    assert "does not explain" in said[0]
    assert len(capture.slow) > len(capture.parameters) / 2


def test_the_first_batch_with_padding_is_compared_too(monkeypatch):
    rows = random_rows(6)
    equal = [(ids[:4], labels[:4].where(torch.arange(4) < 3, ids[:4])) for ids, labels in rows]
    monkeypatch.setattr(
        capture_module.GradientCapture, "_deliver", broken(BUGS["padding of the shorter row counts"])
    )
    bug = capture_module.GradientCapture._deliver
    monkeypatch.undo()
    said = []
    with GradientCapture(scored("float32"), Collect(), said.append) as capture:
        capture.run(*pad(equal))
        assert capture.largest_error < EXACT
        monkeypatch.setattr(capture_module.GradientCapture, "_deliver", bug)
        capture._consumer = Collect()
        capture.run(*pad(rows))
    assert "does not explain" in said[0]


def test_the_compared_row_is_autograds():
    rows = random_rows(4)
    model, given = scored("float32"), Collect()
    with GradientCapture(model, given, pytest.fail) as capture:
        capture.run(*pad(rows))
    assert capture.largest_error < 1e-5
    _, expected = reference(model, rows)
    for (row, name), gradient in given.rows.items():
        assert torch.allclose(gradient, expected[row][name], rtol=1e-4, atol=1e-6)
