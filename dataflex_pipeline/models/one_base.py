"""One base model for the features of a command: loaded once, and given out as often as it is asked for.

What is given out is a copy of the modules around the same weights. Whatever is done to it (an adapter put on,
hooks, another forward, checkpointing, eval mode) is done to the copy and goes with it, so that each feature
finds the model as it was loaded; only flags of the weights themselves are put back. An adapter that writes
into the base's own weights, such as biases, ends it.

The base is let go before any other model is loaded, and by whatever needs the memory for itself.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Say = Callable[[str], None]
Load = Callable[[Say], "PreTrainedModel"]

_KEPT: list[_Base] = []
"""The base of the command that is running; empty outside of `one_base`."""


@contextmanager
def one_base() -> Iterator[None]:
    """Keep a base model between the features that are computed in this context; one inside another is it."""
    if _KEPT:
        yield
        return
    _KEPT.append(_Base())
    try:
        yield
    finally:
        let_go()
        _KEPT.clear()


def base_of(key: object, load: Load, say: Say) -> PreTrainedModel:
    """Return a base model: a freshly loaded one, or a copy around the weights of the one that is kept.

    Args:
        key: all that decides what is loaded, and where to.
        load: loads it; is given what to say it to.
        say: told what loading had to say, each time.
    """
    return _KEPT[0].get(key, load, say) if _KEPT else load(say)


def let_go() -> None:
    """Free the memory of the base that is kept, if one is; copies in use keep the weights alive."""
    for base in _KEPT:
        base.let_go()


def let_go_if_trained() -> None:
    """Let the base go where the adapter just put on a copy writes numbers of its own into the weights."""
    for base in _KEPT:
        base.let_go_if_trained()


class _Base:
    """The base model that is kept; None at first."""

    def __init__(self) -> None:
        self._key: object = None
        self._model: PreTrainedModel | None = None
        self._said: list[str] = []
        self._flags: list[bool] = []

    def get(self, key: object, load: Load, say: Say) -> PreTrainedModel:
        from dataflex_pipeline.models.base import free_memory

        if self._model is None or self._key != key:
            self.let_go()
        free_memory()  # what the feature before has dropped: its adapter, its moments
        if self._model is None:
            self._said = []
            model = load(self._said.append)
            if getattr(model, "is_loaded_in_8bit", False):  # its layers take the scales off the weights
                return self._told(model, say)
            self._key, self._model = key, model
            self._flags = [parameter.requires_grad for parameter in model.parameters()]
        for parameter, flag in zip(self._model.parameters(), self._flags, strict=True):
            parameter.requires_grad_(flag)
            parameter.grad = None
        return self._told(_around_the_weights(self._model), say)

    def _told(self, model: PreTrainedModel, say: Say) -> PreTrainedModel:
        for line in self._said:
            say(line)
        return model

    def let_go_if_trained(self) -> None:
        if self._model is not None and any(each.requires_grad for each in self._model.parameters()):
            self.let_go()

    def let_go(self) -> None:
        from dataflex_pipeline.models.base import free_memory

        if self._model is not None:
            self._key = self._model = None
            free_memory()


def _around_the_weights(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of a model's modules, buffers and settings around the very parameters that it has."""
    shared: list[Any] = list(model.parameters())
    states = (getattr(each, "quant_state", None) for each in chain(shared, model.modules()))
    shared += [state for state in states if state is not None]  # the scales of 4-bit weights
    return copy.deepcopy(model, {id(each): each for each in shared})
