"""The trainer's log-probabilities from the model's own logits, for models that TRL's fused head gets wrong.

TRL multiplies the last hidden states with the head's weight, in chunks, and applies the scaling and
soft-capping that it knows of. Where a model does something else between its last hidden state and its logits
(a prediction head, a soft cap under another name), that is another model's loss, without a word. `OwnLogits`
gives the same outputs from the logits that the model itself makes, at the labelled positions only; likewise
for a mixture of experts whose load-balancing loss TRL does not find.
"""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch  # noqa: TID253 (this module is only imported to train)
from torch.nn import functional  # noqa: TID253
from trl.trainer.utils import FusedCausalLMOutput  # noqa: TID253

from dataflex_pipeline.models.batches import logits_only_at
from dataflex_pipeline.models.room import is_out_of_memory
from dataflex_pipeline.schemas import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LACKS = (AttributeError, TypeError, KeyError, IndexError, ValueError, RuntimeError)
"""What a call of a model raises that asks it for outputs which it does not have."""
LARGE = 64.0
"""Size of the largest logit in the comparison; soft caps in use bound logits to 30 or 50."""


class OwnLogits:
    """A switch on a model that TRL gave its fused head: whether calls of it are answered from its own logits.

    Args:
        model: the causal LM itself, without a PEFT wrapper; its ``forward`` is changed in place.

    Attributes:
        on: whether calls with ``fused_lm_head=True`` are answered from the model's own logits.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.on = False
        self._model = model
        fused = model.forward

        # The signature stays the model's: transformers looks at it.
        @functools.wraps(type(model).forward)
        def forward(
            model: PreTrainedModel, *args: Any, fused_lm_head: bool = False, labels: Any = None, **kwargs: Any
        ) -> Any:
            if not (fused_lm_head and self.on):
                return fused(*args, fused_lm_head=fused_lm_head, labels=labels, **kwargs)
            with logits_only_at(model) as choose:
                mask = torch.zeros_like(labels, dtype=torch.bool)
                mask[:, :-1] = labels[:, 1:] != IGNORED  # position t predicts token t + 1
                choose(mask)
                return _per_token(fused(*args, **kwargs), labels, mask)

        model.forward = types.MethodType(forward, model)

    def check(self, call: Any, row: Mapping[str, Any], with_aux: bool) -> Check:
        """Compare TRL's fused head with the model's own logits, both with the last hidden states enlarged.

        A soft cap that one of them leaves out changes small logits by little, and a model's logits grow while
        it is trained; enlarged by a power of two, nothing else is rounded otherwise.

        Args:
            call: the model as the trainer calls it, in eval mode. row: inputs of one row. [1, T] each
            with_aux: whether the load-balancing loss is wanted, too.
        """
        inputs = {**row, "use_cache": False, "fused_lm_head": True}
        routed = {**inputs, "output_router_logits": True}
        self.on = True
        try:
            with _largest_output(self._model.get_output_embeddings()) as largest:
                own = _try(call, routed)[0] if with_aux else None
                gives_aux = own is not None and own.aux_loss is not None
                if own is None:
                    call(**inputs)
            asked = routed if gives_aux else inputs
            with _enlarged(self._model.base_model, max(largest)):
                own = call(**asked)
                self.on = False
                fused, failure = _try(call, asked)
        finally:
            self.on = False
        return Check(math.inf if fused is None else _difference(own, fused, gives_aux), gives_aux, failure)


@dataclass(frozen=True)
class Check:
    """What the comparison of one row found.

    Attributes:
        difference: largest one of a token's log-probability, nats, or of the load-balancing loss; infinite
            where TRL's head fails.
        gives_aux_loss: whether the model gives a load-balancing loss. failure: of TRL's head, in words.
    """

    difference: float
    gives_aux_loss: bool
    failure: str


@contextmanager
def _largest_output(head: torch.nn.Module) -> Iterator[list[float]]:
    """Note the largest absolute output of each call of the head while the context lasts."""
    found: list[float] = [0.0]
    handle = head.register_forward_hook(
        lambda _head, _inputs, out: found.append(float(out.detach().abs().max()))
    )
    try:
        yield found
    finally:
        handle.remove()


@contextmanager
def _enlarged(body: torch.nn.Module, largest: float) -> Iterator[None]:
    """Multiply the last hidden states so that the largest logit before any soft cap becomes about LARGE."""
    factor = 2.0 ** round(math.log2(LARGE / largest)) if 0 < largest < math.inf else 1.0

    def enlarge(_body: Any, _inputs: Any, outputs: Any) -> Any:
        if getattr(outputs, "last_hidden_state", None) is not None:
            outputs["last_hidden_state"] = outputs["last_hidden_state"] * factor
        return outputs

    handle = body.register_forward_hook(enlarge)
    try:
        yield
    finally:
        handle.remove()


def _try(call: Any, inputs: Mapping[str, Any]) -> tuple[Any, str]:
    """Return a call's outputs, or None and the error of a model that has not what the call asks it for."""
    try:
        return call(**inputs), ""
    except LACKS as error:
        if is_out_of_memory(error):
            raise
        return None, f"it ends in {type(error).__name__}: {error}"


def _difference(own: Any, fused: Any, with_aux: bool) -> float:
    worst = float((own.log_probs - fused.log_probs).abs().max())
    if with_aux:
        worst = max(worst, float((own.aux_loss - fused.aux_loss).abs() / own.aux_loss.abs().clamp(min=1.0)))
    return worst if math.isfinite(worst) else math.inf


def _per_token(outputs: Any, labels: torch.Tensor, mask: torch.Tensor) -> FusedCausalLMOutput:
    """Return what TRL's fused head returns.

    Args:
        outputs: of the model, with logits [1, W, V] at the W positions of the mask.
        labels: token ids, -100 where there is no loss. [B, T]
        mask: positions whose next token is labelled. [B, T]
    """
    logits = outputs.logits[0].float()  # [W, V]
    targets = labels[:, 1:][mask[:, :-1]]  # [W]
    log_probs = -functional.cross_entropy(logits, targets, reduction="none")  # [W]
    with torch.no_grad():
        everything = logits.log_softmax(-1)
        entropy = -(everything.exp() * everything).sum(-1)  # [W]
        is_top1 = logits.argmax(-1) == targets  # [W]
    here = mask[:, :-1]
    placed = [each.new_zeros(here.shape).masked_scatter(here, each) for each in (log_probs, entropy, is_top1)]
    return FusedCausalLMOutput(
        log_probs=placed[0],
        entropy=placed[1],
        is_top1=placed[2],
        label_mask=here,
        aux_loss=getattr(outputs, "aux_loss", None),
    )
