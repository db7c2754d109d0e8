"""Training without an attention mask, where the model is causal.

Micro-batches are padded on the right, and a causal model's own tokens see nothing of that (right_padding.py
says what a mask costs). The mask stays where the model needs it, and where a load-balancing loss is added,
which is taken over the tokens that the mask leaves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dataflex_pipeline.models.right_padding import needs_mask
from dataflex_pipeline.training.arguments import balances_experts

if TYPE_CHECKING:
    from dataflex_pipeline.config.fields import Config
    from dataflex_pipeline.training.trainer import WeightedTrainer


def leave_out_masks(trainer: WeightedTrainer, config: Config) -> None:
    """Let the model be called without a mask in all that the trainer does, where that changes nothing.

    DeepSpeed's trainings keep it: their weights may be sharded, so that nothing can be tried on them here.

    Args:
        trainer: before it trains; every batch of it is padded on the right. config: of the run.
    """
    model = trainer.model
    if trainer.is_deepspeed_enabled or balances_experts(config, model) or _needs_mask(model):
        return
    model.register_forward_pre_hook(_without_mask, with_kwargs=True)


def _needs_mask(model: Any) -> bool:
    was_training = model.training
    model.eval()
    try:
        return needs_mask(model, with_gradients=True)
    finally:
        model.zero_grad(set_to_none=True)
        model.train(was_training)


def _without_mask(
    _model: Any, given: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return given, {name: value for name, value in named.items() if name != "attention_mask"}
