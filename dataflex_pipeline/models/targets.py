"""The layers that a LoRA adapter goes on.

`lora_target: all` means every linear layer but the output head, as far as an adapter on it is seen:

- A linear layer is a module that maps [..., in] to [..., out]: torch's Linear, transformers' Conv1D, and
  subclasses that keep to that (a router that returns several tensors does not).
- Some models read the weight of a layer past the layer (Mamba hands ``dt_proj.weight`` to a product, and
  ``out_proj.weight`` to a fused kernel). An adapter there would be ignored, here or on another machine, and
  never be trained, so the layer is left out. Which layers these are is read in the source of the module that
  owns them, and so follows the installed transformers.
- Experts that transformers keep as one tensor for all experts, and the routers in front of them, are no
  linear layers. They are not adapted: peft can do it (``target_parameters``), but without dropout, and
  per-sample gradients of them are made row by row.

What is left out, and why, is one line in the output.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dataflex_pipeline.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

ALL = "all"
OWN = "which are no linear layers but tensors of the model's own"
PAST = "whose weights the model reads past the layer, where an adapter is not seen"
_HARMLESS = frozenset({"dtype", "device", "data", "shape", "size", "ndim", "dim", "numel", "requires_grad"})
"""What may be asked of a weight without computing with it."""


@dataclass(frozen=True)
class Targets:
    """Where an adapter goes.

    Attributes:
        names: for peft, sorted: last parts of names where these match nothing else, else full names.
        layers: the full names of the layers that they stand for.
        left_out: reason -> what ``all`` does not adapt, without the layers' numbers.
    """

    names: tuple[str, ...]
    layers: frozenset[str]
    left_out: tuple[tuple[str, tuple[str, ...]], ...] = ()

    @property
    def notice(self) -> str | None:
        """What is adapted and what is not, in one line; None where nothing is left out but the head."""
        if not self.left_out:
            return None
        kinds = ", ".join(sorted({_place(name).rpartition(".")[2] for name in self.layers}))
        rest = "; nor on ".join(f"{', '.join(names)}, {reason}" for reason, names in self.left_out)
        return f"LoRA goes on {len(self.layers)} linear layers ({kinds}); it does not go on {rest}."


def linear_modules(model: PreTrainedModel) -> dict[str, bool]:
    """Return the full name of every linear layer, and whether it is the output head."""
    head = model.get_output_embeddings()
    return {name: module is head for name, module in model.named_modules() if is_linear(module)}


def find_targets(setting: str, model: PreTrainedModel) -> Targets:
    """Return the layers that ``lora_target`` means.

    Args:
        setting: ``all``, or comma-separated names; a name stands for the linear layers whose full name ends
            with it.
        model: the base model.

    Raises:
        ConfigError: a name matches no linear layer, or matches the output head, or a layer on which an
            adapter would not be seen; or there is no layer at all.
    """
    linear = linear_modules(model)
    past = read_past(model)
    names = [name.strip() for name in setting.split(",") if name.strip()]
    body = {name for name, is_head in linear.items() if not is_head} - past
    if not body:
        raise ConfigError(
            f"The model ({type(model).__name__}) has no linear layer that an adapter could go on.",
            f"A LoRA adapter goes on linear layers; left out are {', '.join(sorted(past)[:3]) or 'none'}.",
            "Set finetuning_type: full, or take another model.",
        )
    if names == [ALL] or not names:
        return Targets(
            _names(model, body, {_short(name) for name in body}), frozenset(body), _left_out(model, body)
        )
    for name in names:
        _check_name(name, linear, past, body)
    layers = {full for full in body if any(_matches(full, name) for name in names)}
    return Targets(_names(model, layers, set(names)), frozenset(layers))


def _check_name(name: str, linear: dict[str, bool], past: set[str], body: set[str]) -> None:
    matched = [full for full in linear if _matches(full, name)]
    if not matched:
        known = sorted({_short(full) for full in body})
        raise ConfigError(
            f"lora_target names '{name}', and the model has no linear layer of that name."
            f"{did_you_mean(name, known)}",
            f"Its linear layers are called {', '.join(known)}.",
            "Set lora_target: all, or comma-separated names of those.",
        )
    if any(linear[full] for full in matched):
        raise head_error(f"lora_target names '{name}', the model's output head.")
    unseen = sorted(past.intersection(matched))
    if unseen:
        raise ConfigError(
            f"lora_target names '{name}', and that is {unseen[0]} among others.",
            "The model reads that layer's weight past the layer, so an adapter there would be ignored and "
            "never trained.",
            "Take it out; lora_target: all means every linear layer that an adapter can go on.",
        )


def head_error(what: str) -> ConfigError:
    """Return the error that refuses an adapter on the output head."""
    return ConfigError(
        what,
        "The training loss multiplies the hidden states by the head's own weight, so an adapter there "
        "would be ignored and never trained.",
        "Take it out; lora_target: all means every linear layer but the head.",
    )


def is_linear(module: nn.Module) -> bool:
    """Return whether a module is a linear layer: torch's, transformers' Conv1D, or one that works alike."""
    import torch
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, Conv1D):
        return True
    if not isinstance(module, torch.nn.Linear):
        return False
    # A quantized layer's weight is packed: it maps like a linear layer, and no shapes would tell.
    quantized = type(module).__module__.startswith("bitsandbytes.")
    return quantized or type(module).forward is torch.nn.Linear.forward or _maps_like_one(module)


def _maps_like_one(module: Any) -> bool:
    """Return whether a Linear with a forward of its own maps [..., in] to [..., out], by shapes alone."""
    import torch

    sizes = {"weight": (module.out_features, module.in_features), "bias": (module.out_features,)}
    own = {
        name: torch.empty(sizes[name], device="meta")
        for name, _ in module.named_parameters()
        if name in sizes
    }
    x = torch.empty(1, 2, module.in_features, device="meta")
    with torch.no_grad():
        try:
            found = torch.func.functional_call(module, own, (x,))
        except (
            RuntimeError,
            TypeError,
            ValueError,
            IndexError,
        ):  # such as one that wants its input in groups
            return False
    return isinstance(found, torch.Tensor) and tuple(found.shape) == (1, 2, module.out_features)


def read_past(model: PreTrainedModel) -> set[str]:
    """Return the full names of the linear layers whose weight is read by the module around them."""
    modules = dict(model.named_modules())
    owners = {name: type(modules[name.rpartition(".")[0]]) for name in linear_modules(model)}
    weights = {kind: _weights_read(kind) for kind in set(owners.values())}
    return {name for name, kind in owners.items() if _short(name) in weights[kind]}


def _weights_read(kind: type) -> frozenset[str]:
    """Return the names x for which a class of modules computes with ``self.x.weight`` outside of set-up."""
    try:
        source = textwrap.dedent(inspect.getsource(kind))
    except (OSError, TypeError):  # a class that was never in a file: there is nothing to read
        return frozenset()
    found: set[str] = set()
    for function in ast.walk(ast.parse(source)):
        if isinstance(function, ast.FunctionDef) and "init" not in function.name:
            found |= _reads(function)
    return frozenset(found)


def _reads(function: ast.FunctionDef) -> set[str]:
    reads: set[str] = set()
    harmless: set[int] = set()
    for node in ast.walk(function):
        # A part of a weight, its type or its size: models ask for these without passing the layer by.
        if isinstance(node, ast.Subscript) or (isinstance(node, ast.Attribute) and node.attr in _HARMLESS):
            harmless.add(id(node.value))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance":
            harmless.update(id(argument) for argument in node.args)
    for node in ast.walk(function):
        if isinstance(node, ast.Attribute) and node.attr == "weight" and id(node) not in harmless:
            owner = node.value
            if (
                isinstance(owner, ast.Attribute)
                and isinstance(owner.value, ast.Name)
                and owner.value.id == "self"
            ):
                reads.add(owner.attr)
    return reads


def _short(name: str) -> str:
    return name.rpartition(".")[2]


def _matches(full: str, name: str) -> bool:
    return full == name or full.endswith(f".{name}")


def matching(model: PreTrainedModel, names: Iterable[str]) -> set[str]:
    """Return the full names of all modules that peft would take a list of names for."""
    known = set(names)
    ends = tuple(f".{name}" for name in known)
    return {full for full, _ in model.named_modules() if full in known or full.endswith(ends)}


def _names(model: PreTrainedModel, layers: set[str], wanted: set[str]) -> tuple[str, ...]:
    return tuple(sorted(wanted if matching(model, wanted) == layers else layers))


def _left_out(model: PreTrainedModel, layers: set[str]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Return what has weights of two dimensions or more and gets no adapter, by reason."""
    import torch

    head = model.get_output_embeddings()
    found: dict[str, set[str]] = {OWN: set(), PAST: set()}
    for name, module in model.named_modules():
        if name in layers or module is head or isinstance(module, torch.nn.Embedding):
            continue
        for own, parameter in module.named_parameters(recurse=False):
            if parameter.dim() > 1 and not own.endswith("bias"):
                shown = _place(name) if own == "weight" else f"{_place(name)}.{own}"
                found[PAST if is_linear(module) else OWN].add(shown)
    return tuple((reason, tuple(sorted(names))) for reason, names in found.items() if names)


def _place(name: str) -> str:
    """Return where a module is in its block: mlp.experts for model.layers.0.mlp.experts."""
    parts = re.sub(r"(\.\d+)+$", "", name).split(".")  # a list of layers numbers its members at the end
    numbers = [i for i, part in enumerate(parts[:-1]) if part.isdigit()]
    return ".".join(part for part in parts[numbers[-1] + 1 if numbers else -2 :] if not part.isdigit())
