"""Losses of labelled tokens: no logits elsewhere, never many at a time, no mask where none is needed.

A model's hidden states are made for all tokens, its logits only where there is a label. Where nothing from
the head on is trained, they are made for some positions at a time: each share's logits turn into losses and
into the gradients of its hidden states at once and are dropped, so that the memory of a batch does not grow
with the vocabulary, and nothing is computed twice. The model's own code makes them, run again behind hidden
states that are already there, so whatever it does to its logits (scaling, soft caps) happens.

Where something from the head on is trained (all weights, tied embeddings), or a model's logits cannot be
reached that way, the logits of all labelled positions are made in one call, and batches have fewer labels.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch  # noqa: TID253  (imported lazily with the whole layer)
from torch import Tensor, nn  # noqa: TID253

from dataflex_pipeline.models.batches import label_budget, logits_only_at
from dataflex_pipeline.models.right_padding import is_right_padded, needs_mask, random_batch, vocabulary
from dataflex_pipeline.models.room import is_out_of_memory
from dataflex_pipeline.models.rounding import rounding
from dataflex_pipeline.models.source import quiet
from dataflex_pipeline.models.wide_products import WideLinear, multiplies_wide
from dataflex_pipeline.schemas import IGNORED

SHARE_ELEMENTS = 1 << 26
"""Logits made at a time (256 MiB in float32), where they are made in shares."""
LACKS = (AttributeError, TypeError, KeyError, IndexError, ValueError, RuntimeError)
"""What a model raises that has no last hidden states, or makes its logits from something else."""


def predicting(labels: Tensor, attention: Tensor) -> Tensor:
    """Return which positions t predict a labelled token t + 1; padding in front predicts nothing. [B, T]"""
    mask = torch.zeros_like(labels, dtype=torch.bool)
    mask[:, :-1] = (labels[:, 1:] != IGNORED) & attention[:, :-1].bool()
    return mask


@contextmanager
def token_losses(
    model: Any, say: Callable[[str], None] = quiet, trained: Collection[nn.Parameter] | None = None
) -> Iterator[TokenLosses]:
    """Open a model for the losses of labelled tokens, and try once what it needs for them.

    Args:
        model: a causal LM in eval mode (transformers, with or without a PEFT adapter).
        say: prints one line: that rows keep their mask.
        trained: parameters whose gradients will be taken; None: no gradient will.
    """
    trained, with_gradients = list(trained or ()), trained is not None
    masked = needs_mask(model, with_gradients)
    if masked:
        say("This model needs an attention mask for padded rows, which is slower than without one.")
    shares = _Shares.of(model, trained)
    if shares is not None:
        with shares:
            yield TokenLosses(model, masked, trained, shares)
    else:
        with logits_only_at(model) as choose:
            yield TokenLosses(model, masked, trained, None, choose)


def _cooled(logits: Tensor, temperature: float) -> Tensor:
    return logits if temperature == 1 else logits / temperature


def _nothing(predicts: Tensor) -> None:
    """Take a choice of positions where the model makes no logits by itself."""


def _embeds_positions(model: Any, trained: Collection[nn.Parameter]) -> bool:
    """Return whether one of the trained parameters is an embedding of something else than tokens."""
    own = {id(parameter) for parameter in trained} - {
        id(parameter) for parameter in model.get_input_embeddings().parameters()
    }
    layers = (module for module in model.modules() if isinstance(module, nn.Embedding))
    return any(id(parameter) in own for layer in layers for parameter in layer.parameters())


class TokenLosses:
    """The losses of the labelled tokens of a batch, while the context of `token_losses` lasts.

    Attributes:
        model: as it was given. max_labels: predicted tokens that a batch may have.
        masked: whether right-padded rows keep their attention mask.
    """

    def __init__(
        self,
        model: Any,
        masked: bool,
        trained: Collection[nn.Parameter],
        shares: _Shares | None,
        choose: Callable[[Tensor], None] = _nothing,
    ) -> None:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._positions = "position_ids" in inspect.signature(base.forward).parameters
        self.model, self._shares, self._choose = model, shares, choose
        self.masked, self._by_rows = masked, _embeds_positions(model, trained)
        self.max_labels = label_budget(model) if shares is None else sys.maxsize

    @property
    def in_shares(self) -> bool:
        """Whether logits are made for some positions at a time."""
        return self._shares is not None

    def __call__(
        self, ids: Tensor, labels: Tensor, attention: Tensor, predicts: Tensor, temperature: float = 1.0
    ) -> Tensor:
        """Return the negative log-likelihoods of the labelled tokens, row by row. [W] float32, nats

        Args:
            ids, labels, attention: of a batch padded on either side. [B, T] each
            predicts: which positions predict a labelled token, W of them (`predicting`). [B, T]
            temperature: what the logits are divided by.
        """
        inputs = self._inputs(ids, attention)
        targets = labels[:, 1:][predicts[:, :-1]]  # [W]
        if self._shares is not None:
            states = self._shares.states(inputs)[predicts]  # [W, H]
            return self._shares.losses(states, targets, temperature)
        self._choose(predicts)
        logits = self.model(**inputs).logits[0].float()  # [W, V]
        return nn.functional.cross_entropy(_cooled(logits, temperature), targets, reduction="none")

    def _inputs(self, ids: Tensor, attention: Tensor) -> dict[str, Any]:
        inputs: dict[str, Any] = {"input_ids": ids, "use_cache": False}
        right = is_right_padded(attention)
        if self.masked or not right:
            inputs["attention_mask"] = attention
        if self._positions and not right:  # positions count from a row's first token
            inputs["position_ids"] = (attention.cumsum(1) - 1).clamp(min=0)
        elif self._positions and self._by_rows:  # left to itself, a model embeds them once for all rows
            inputs["position_ids"] = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
        return inputs


class _SharedHead(torch.autograd.Function):
    """Losses from hidden states, share by share; what flows back to a share is made with its losses.

    A token's loss depends on its own hidden states alone, so the gradient of each loss by them is all that
    the way back needs, whatever the losses are multiplied by later.
    """

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, targets: Tensor, logits_of: Callable[[Tensor], Tensor], step: int
    ) -> Tensor:
        """Return -log p of the targets [W] float32. states: [W, H]. step: positions of a share"""
        losses = torch.empty(len(states), dtype=torch.float32, device=states.device)
        wanted = ctx.needs_input_grad[0]
        gradients = torch.empty_like(states) if wanted else None
        for first in range(0, len(states), step):
            span = slice(first, first + step)
            with torch.set_grad_enabled(wanted):
                share = states[span].detach().requires_grad_(wanted)
                found = nn.functional.cross_entropy(logits_of(share), targets[span], reduction="none")
                if gradients is not None:
                    (gradients[span],) = torch.autograd.grad(found.sum(), share)
            losses[span] = found.detach()
        if gradients is not None:
            ctx.save_for_backward(gradients)
        return losses

    @staticmethod
    def backward(ctx: Any, *given: Any) -> tuple[Tensor, None, None, None]:
        """Return the gradient of the hidden states. given: of the losses. [W]"""
        (gradients,) = ctx.saved_tensors
        return (given[0][:, None] * gradients).to(gradients.dtype), None, None, None


class _Shares:
    """The way from last hidden states to losses through a model's own code, without the layers below.

    While the context lasts, the model's body (all of it below the head) can be told what to return.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._body = getattr(self._base, "base_model", self._base)
        self._step = max(1, SHARE_ELEMENTS // vocabulary(model))
        self._outputs: Any = None
        self._replaying = False

    @classmethod
    def of(cls, model: Any, trained: Collection[nn.Parameter]) -> _Shares | None:
        """Return the way for a model; None where it is trained beyond its body, or its logits differ."""
        found = cls(model)
        if found._body is found._base or found._is_trained(trained):
            return None
        with found:
            return found if found._reaches_the_logits() else None

    def _is_trained(self, trained: Collection[nn.Parameter]) -> bool:
        inner = {id(parameter) for parameter in self._body.parameters()}
        head = {id(parameter) for parameter in self._base.get_output_embeddings().parameters()}
        return any(id(parameter) in head or id(parameter) not in inner for parameter in trained)

    def _reaches_the_logits(self) -> bool:
        tokens, _ = random_batch(self._model)
        inputs = {"input_ids": tokens[:1], "use_cache": False}
        try:
            with torch.no_grad():
                found = self._logits(self.states(inputs)[0])
                self._replaying = True  # also keeps the head from being passed over
                self._outputs = None
                expected = self._model(**inputs).logits[0].float()
        except LACKS as error:
            if is_out_of_memory(error):
                raise
            return False
        finally:
            self._replaying = False
        return float((found - expected).norm()) <= rounding(self._model) * float(expected.norm())

    def __enter__(self) -> _Shares:
        head = self._base.get_output_embeddings()
        with ExitStack() as stack:
            stack.enter_context(_other_forward(self._body, self._replayed))
            if type(head).forward is nn.Linear.forward and head.bias is None:
                stack.enter_context(_other_forward(head, self._wide))
            stack.callback(head.register_forward_pre_hook(self._pass_over).remove)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._outputs = None
        self._stack.close()

    def _replayed(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def replayed(*args: Any, **kwargs: Any) -> Any:
            if self._outputs is None:
                self._outputs = forward(*args, **kwargs)
            return self._outputs

        return replayed

    def _wide(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Return a head's forward that makes float32 logits of 16-bit hidden states where that is possible.

        Rounded to bfloat16, a logit of 20 is off by up to 0.06, and so is the loss.
        """
        weight = self._base.get_output_embeddings().weight

        def wide(states: Tensor) -> Any:
            if self._replaying and multiplies_wide(states, weight):
                return WideLinear.apply(states, weight)  # type: ignore[no-untyped-call]
            return forward(states)

        return wide

    def _pass_over(self, head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        return None if self._replaying else (args[0][:, :0], *args[1:])

    def states(self, inputs: dict[str, Any]) -> Tensor:
        """Return the last hidden states of a call of the model. [B, T, H]"""
        self._outputs = None
        self._model(**inputs)
        states: Tensor = self._outputs.last_hidden_state
        return states

    def losses(self, states: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
        """Return -log p of the targets. [W] float32. states: [W, H]"""

        def logits_of(share: Tensor) -> Tensor:
            return _cooled(self._logits(share), temperature)

        try:
            losses: Tensor = _SharedHead.apply(states, targets, logits_of, self._step)  # type: ignore[no-untyped-call]
        finally:
            self._outputs = None
        return losses

    def _logits(self, states: Tensor) -> Tensor:
        """Return the logits that belong to hidden states [w, H]. [w, V] float32"""
        self._outputs["last_hidden_state"] = states[None]
        tokens = torch.zeros(1, len(states), dtype=torch.long, device=states.device)
        self._replaying = True
        try:
            logits: Tensor = self._base(input_ids=tokens, use_cache=False).logits[0]
        finally:
            self._replaying = False
        return logits.float()


@contextmanager
def _other_forward(
    module: nn.Module, make: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """Give a module another forward, made from its own, while the context lasts."""
    own = vars(module).get("forward")
    module.forward = functools.wraps(module.forward)(make(module.forward))
    try:
        yield
    finally:
        del module.forward  # the class's own is there again
        if own is not None:
            module.forward = own
