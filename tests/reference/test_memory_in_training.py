"""A memory that turns out to be too small in the middle of a training: the same numbers, or words."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_training
import torch

from dataflex_pipeline.errors import UserError
from dataflex_pipeline.training import conductor, too_small, trainer
from dataflex_pipeline.training.marker import read_marker

STEPS = 4
TOLD = "was too small for"


class Killed(Exception):
    """What ends a training in these tests."""


class Memory:
    """A device of so many padded tokens: more of them at a time are out of memory, forward or backward.

    Attributes:
        tokens: that fit. way: which one fails. seen: rows and padded tokens of training's forward passes.
        after: passes that have room for everything, first.
    """

    def __init__(self, monkeypatch, way="forward", after=0):
        self.tokens, self.way, self.after = 1 << 30, way, after
        self.seen: list[tuple[int, int]] = []
        real = trainer.SFTTrainer.compute_loss

        def compute_loss(owner, model, inputs, *args, **kwargs):
            rows, length = inputs["input_ids"].shape
            self.seen.append((rows, length))
            over = rows * length > self.tokens and len(self.seen) > self.after
            if over and self.way == "forward":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            loss = real(owner, model, inputs, *args, **kwargs)
            if over:
                # The backward pass comes here last: by then, gradients of all later layers are added up.
                layer = next(m for name, m in model.named_modules() if name.endswith("q_proj"))
                weight = layer.lora_A["default"].weight
                handle = weight.register_hook(lambda grad: self._fail(handle))
            return loss

        monkeypatch.setattr(trainer.SFTTrainer, "compute_loss", compute_loss)

    @staticmethod
    def _fail(handle):
        handle.remove()
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Train a round of the tiny model, 8 rows a step with weights, 4 at a time."""
    monkeypatch.setattr(tiny_training, "GLOBAL_BATCH", 8)
    model, pool, target = tiny_training.make_world(tmp_path / "world")
    weights = np.random.default_rng(3).uniform(0, 2, STEPS * 8)
    index = tiny_training.make_index(0, STEPS, pool.n_rows, weights)

    def run(name, **settings):
        given = {"per_device_train_batch_size": 4, "lora_dropout": 0.0, "adam_epsilon": 1e-3} | settings
        config = tiny_training.make_config(model, **given, warmup_step=STEPS, gradient_checkpointing=False)
        listener = tiny_training.Listener()
        plan = tiny_training.make_plan(tmp_path / name, 0, config, pool, index, STEPS)
        tiny_training.train_round(config, plan, pool, target, listener)
        return tiny_training.states(plan.checkpoint), listener.lines, plan

    return run


def farthest(one, other):
    return max(float((one["weights"][n] - other["weights"][n]).abs().max()) for n in one["weights"])


def losses(plan):
    return [entry["loss"] for entry in tiny_training.log_of(plan.run_folder, 0)]


@pytest.mark.parametrize("way", ["forward", "backward"])
def test_a_later_step_that_does_not_fit_is_taken_in_pieces_with_the_same_numbers(train, monkeypatch, way):
    """The first micro-batch of step 2 fits, the second does not; AdamW's weights are those of whole steps."""
    whole, _, plain = train("whole")
    with monkeypatch.context() as patch:
        memory = Memory(patch, way, after=3)
        memory.tokens = 33
        pieces, said, plan = train("pieces")
    assert [rows for rows, _ in memory.seen[:4]] == [4, 4, 4, 4]
    assert any(rows < 4 for rows, _ in memory.seen[4:])
    told = [line for line in said if TOLD in line]
    assert 1 <= len(told) <= 2
    assert "in step 2: from there on at most" in told[0]
    assert "dropout" not in told[0]
    assert set(told) <= set(read_marker(plan.checkpoint).result["notices"])
    assert farthest(whole, pieces) < 1e-6
    assert losses(plan) == pytest.approx(losses(plain), abs=1e-6)
    assert farthest(whole, train("other", seed=1)[0]) > 1e-3
    assert not plan.work.exists()


@pytest.mark.parametrize("short", [True, False])
def test_killed_after_it_and_continued_the_bits_are_the_same(train, monkeypatch, short):
    """With dropout; whether memory is short again or not."""
    settings = {"lora_dropout": 0.3, "save_steps": 1}
    with monkeypatch.context() as patch:
        Memory(patch, after=5).tokens = 33
        straight, said, _ = train("straight", **settings)
    assert "but for dropout" in next(line for line in said if TOLD in line)
    assert "in step 3" in next(line for line in said if TOLD in line)

    report = conductor.Conductor._report

    def stop(self, loss):
        report(self, loss)
        if self.step == 3:  # done, and not saved
            raise Killed

    with monkeypatch.context() as patch:
        Memory(patch, after=5).tokens = 33
        patch.setattr(conductor.Conductor, "_report", stop)
        with pytest.raises(Killed):
            train("killed", **settings)
    if short:
        Memory(monkeypatch).tokens = 33
    resumed, said, plan = train("killed", **settings)
    assert any("goes on from step 2" in line for line in said)
    noted = [line for line in said if "from step 3 on it takes at most" in line]
    assert noted
    assert set(noted) <= set(read_marker(plan.checkpoint).result["notices"])
    tiny_training.assert_same(straight, resumed)


def test_a_row_that_does_not_fit_ends_in_words_and_goes_on_from_the_last_checkpoint(train, monkeypatch):
    straight, _, _ = train("straight", save_steps=2)
    with monkeypatch.context() as patch:
        Memory(patch, after=5).tokens = 1
        with pytest.raises(UserError, match="too small for one row of") as told:
            train("refused", save_steps=2)
    text = str(told.value)
    assert "in step 3: CUDA out of memory. Tried to allocate 2.00 GiB." in text
    assert "A forward pass takes at most 4 rows of up to 32 tokens" in text
    assert "GiB are free beside the model" in text
    assert "Set gradient_checkpointing: true" in text
    assert "run the same command again: it goes on from the checkpoint of step 2" in text
    resumed, said, _ = train("refused", save_steps=2)
    assert any("goes on from step 2" in line for line in said)
    assert farthest(straight, resumed) < 1e-6


def test_where_it_may_not_be_divided_the_next_call_takes_fewer_rows(train, monkeypatch):
    """As one of several processes does: they call each other once per micro-batch."""
    straight, _, _ = train("straight", save_steps=2)
    with monkeypatch.context() as patch:
        memory = Memory(patch, after=5)
        memory.tokens = 16
        patch.setattr(too_small, "divides", lambda *given: False)
        with pytest.raises(UserError, match="is too small in step 3") as told:
            train("several", save_steps=2)
    assert "Run the same command again: it goes on from the checkpoint of step 2 with 2 of 4 rows" in str(
        told.value
    )
    resumed, said, _ = train("several", save_steps=2)
    assert any(
        "per_device_train_batch_size 4 -> 2, gradient_accumulation_steps 2 -> 4" in line for line in said
    )
    assert farthest(straight, resumed) < 1e-6


def test_an_evaluation_that_does_not_fit_is_taken_in_pieces(train, monkeypatch):
    settings = {"eval_strategy": "epoch", "per_device_eval_batch_size": 13}
    _, _, plain = train("plain", **settings)
    real, shapes = trainer.WeightedTrainer._piece_sums, []

    def limited(owner, inputs):
        shapes.append(tuple(inputs["input_ids"].shape))
        if inputs["input_ids"].numel() > limit:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
        return real(owner, inputs)

    monkeypatch.setattr(trainer.WeightedTrainer, "_piece_sums", limited)
    limit = 1
    with pytest.raises(UserError, match=r"too small for one row of .* tokens in an evaluation") as told:
        train("refused", **settings)
    assert "Set eval_strategy: no, or end what else uses the device" in str(told.value)
    limit = 60
    shapes.clear()
    _, said, plan = train("pieces", **settings)
    assert shapes[0][0] == 13
    assert shapes[-1][0] < 13
    assert any("too small for an evaluation of 13 rows" in line for line in said)
    whole, cut = (tiny_training.log_of(each.run_folder, 0)[-1] for each in (plain, plan))
    assert cut["eval_loss"] == pytest.approx(whole["eval_loss"], abs=1e-6)
    assert cut["eval_token_accuracy"] == whole["eval_token_accuracy"]
