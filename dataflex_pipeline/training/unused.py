"""Trained parameters that take no part in some step, which DDP has to look for: it costs a walk per step."""

from __future__ import annotations

from typing import Any

from dataflex_pipeline import launch


def all_take_part(model: Any) -> bool:
    """Return whether every layer with an adapter is called for any row, whatever its tokens are.

    A mixture of experts calls some of its experts, and a model may read the weight of a layer past the layer.

    Args:
        model: with LoRA; it is run on two tokens, without dropout.
    """
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer

    if hasattr(model.config.get_text_config(), "output_router_logits"):
        return False
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    called: set[int] = set()
    hooks = [layer.register_forward_pre_hook(lambda found, _: called.add(id(found))) for layer in layers]
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            model(input_ids=torch.tensor([[0, 1]], device=model.device), use_cache=False)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return bool(layers) and len(called) == len(layers)


def settle_unused(arguments: Any, model: Any, *, lora: bool) -> None:
    """Tell DDP not to look for unused parameters where there are none; other launches are left alone.

    Args:
        arguments: of the trainer; changed in place. model: to be trained. lora: whether by an adapter.
    """
    if lora and launch.world_size() > 1 and not arguments.deepspeed and all_take_part(model):
        arguments.ddp_find_unused_parameters = False
