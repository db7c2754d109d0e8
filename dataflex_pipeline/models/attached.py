"""A LoRA adapter on a base model: a fresh one, or that of a folder, checked tensor by tensor.

peft warns where it should stop: tensors that a file lacks stay at their random start, tensors that it has too
many are dropped, and both are one line among many. Here every tensor of the file has to find its place, every
adapted layer has to find its tensors, and what peft warns of besides is passed on.

peft takes some names for others: in models whose experts were single layers under transformers 4 (DeepSeek,
Qwen MoE and others), targets called ``gate_proj``, ``up_proj`` or ``down_proj`` mean the fused experts to it,
and the dense layers and shared experts of that name get nothing. Here names mean the layers of that name. So
that peft alone reads a saved adapter right as well, those layers are then written into adapter_config.json as
``target_parameters`` (the layer's weight), which to peft is the same adapter; only an adapter whose tensors
name layers that the model does not have (made with transformers 4) is left to peft's conversion.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dataflex_pipeline.errors import DataflexError, UserError
from dataflex_pipeline.models.adapter_values import SECONDS, endless_pattern, wrong_value
from dataflex_pipeline.models.base import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from dataflex_pipeline.models.source import explained
from dataflex_pipeline.models.targets import Targets, is_linear, matching

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

    Say = Callable[[str], None]

PREFIX = "base_model.model."
"""What peft writes before the name of a layer."""
SHOWN = 3
"""Tensors that an error names."""
ABOUT = frozenset(
    {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision"}
    | {"task_type", "megatron_core", "qalora_group_size", "runtime_config", "loftq_config"}
)
"""Keys of adapter_config.json that say nothing about what the adapter computes."""
KNOWN = frozenset(
    {
        "r",
        "lora_alpha",
        "lora_dropout",
        "rank_pattern",
        "alpha_pattern",
        "use_rslora",
        "use_dora",
    }
    | {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "target_parameters"}
    | {"fan_in_fan_out", "bias", "init_lora_weights"}
)
"""Keys that are scored and trained as peft means them; any other that is set is refused by name."""
MERGED_TOO = frozenset({"modules_to_save", "trainable_token_indices"})
"""Keys of whole weights that an adapter brings besides; merging puts them in place."""
CHANGES_THE_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")
"""Values of ``init_lora_weights`` with which peft rewrites the base model's own weights on loading."""


def put_on(model: PreTrainedModel, lora: LoraConfig, targets: Targets, say: Say) -> PeftModel:
    """Put a fresh adapter on exactly the target layers.

    Raises:
        UserError: peft refuses a layer, or would adapt other layers.
    """
    from peft import get_peft_model

    split = _split_names(model, targets)
    with explained(type(model).__name__, "LoRA adapter", "lora_target"), _said(say), _names_as_they_are():
        wrapped = get_peft_model(model, lora)
    found = adapted_layers(wrapped)
    if found != targets.layers:
        odd = sorted(found ^ targets.layers)
        raise UserError(
            f"LoRA was to go on {len(targets.layers)} layers and peft put it on {len(found)}: {odd[0]} is in "
            "one of the two only.",
            "Other layers would be trained than the settings say.",
            "Name the layers in lora_target, or use the versions of peft and transformers in run.yaml.",
        )
    config = wrapped.peft_config["default"]
    config.target_modules, config.target_parameters = split
    return wrapped


def adapted_layers(model: PeftModel) -> frozenset[str]:
    """Return the full names of the base model's modules that carry an adapter."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return frozenset(
        name for name, module in model.get_base_model().named_modules() if isinstance(module, BaseTunerLayer)
    )


def read_adapter(base: PreTrainedModel, folder: Path, say: Say, to_merge: bool = False) -> PeftModel:
    """Put the adapter of a folder on a freshly loaded base; its parameters require a gradient.

    Args:
        base: from `load_base`. folder: of a LoRA adapter. say: is told what peft warns of.
        to_merge: only to merge it, which follows more of peft (`MERGED_TOO`) than scoring and training do.

    Raises:
        UserError: it is no LoRA adapter, uses something of peft that is not scored and trained right here, or
            its tensors are not those of its configuration on this model.
    """
    from peft import LoraConfig, get_peft_model
    from safetensors import safe_open

    configuration = read_configuration(folder, to_merge)
    pattern = endless_pattern(configuration, [name for name, _ in base.named_modules()])
    if pattern is not None:
        raise _unusable(
            folder,
            f"the pattern of {pattern} takes more than {SECONDS} seconds to compare with the names of layers",
            "It would be compared each time that the adapter is loaded, and may never end.",
        )
    with _read_by_peft(folder), safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    as_named = all(_on_a_layer(base, name) for name in shapes)
    with _read_by_peft(folder), _said(say):
        config = LoraConfig.from_pretrained(str(folder))
        written = _lists(config)
        config.inference_mode = False
        config.base_model_name_or_path = base.__dict__.get("name_or_path") or None
        if as_named:
            _weights_as_layers(config, base)
        with _names_as_they_are() if as_named else nullcontext():
            model = get_peft_model(base, config)
        _check_tensors(model, folder, shapes, as_named)
        # Left to itself, peft puts the adapter on the first GPU there is, whatever the base is on.
        device = str(next(base.parameters()).device)
        loaded = model.load_adapter(str(folder), "default", is_trainable=True, torch_device=device)
    _check_names(folder, loaded.missing_keys, loaded.unexpected_keys)
    _check_finite(model, folder)
    config.target_modules, config.target_parameters = written if as_named else _lists(config)
    return model


def read_configuration(folder: Path, to_merge: bool = False) -> dict[str, Any]:
    """Return the configuration of a folder's adapter, which is one that is scored and trained right here.

    With ``to_merge`` it is one that is merged right.

    Raises:
        UserError: it is damaged, no LoRA adapter, or sets something that is not followed here.
    """
    path = folder / ADAPTER_CONFIG
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise _unusable(
            folder, f"its {ADAPTER_CONFIG} is no JSON ({error})", "It was cut off or edited."
        ) from error
    kind = found.get("peft_type") if isinstance(found, dict) else None
    if kind != "LORA":
        raise _unusable(
            folder,
            f"it is of the kind {kind}" if kind else f"its {ADAPTER_CONFIG} names no peft_type",
            "Only LoRA adapters are trained and scored here; another kind would need its own gradients.",
        )
    wrong = wrong_value(found)
    if wrong is not None:
        raise _unusable(folder, f"{wrong} in its {ADAPTER_CONFIG}", "It was cut off or edited.")
    known = ABOUT | KNOWN | (MERGED_TOO if to_merge else frozenset())
    if found.get("lora_alpha") == 0:
        raise _unusable(
            folder, "its lora_alpha is 0", "What it adds is multiplied by 0, and is never trained."
        )
    used = sorted(key for key, value in found.items() if key not in known and _is_set(key, value))
    start = found.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(CHANGES_THE_BASE):
        used.append(f"init_lora_weights: {start}")
    if used:
        raise _unusable(
            folder,
            f"its {ADAPTER_CONFIG} sets {', '.join(used)}",
            "That changes what the adapter computes, or the base model under it, in a way that scoring, "
            "training and export here do not follow.",
        )
    return dict(found)


@contextmanager
def _read_by_peft(folder: Path) -> Iterator[None]:
    """Turn what peft raises on the files of an adapter into one error that says what to do."""
    try:
        yield
    except DataflexError:
        raise
    except Exception as error:  # files may hold anything, and break a library in any way
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        found = lines[0].rstrip(".") if lines else type(error).__name__
        raise _unusable(
            folder, found, "Its files were cut off or edited, or are of another model."
        ) from error


def _is_set(key: str, value: Any) -> bool:
    from peft import LoraConfig

    return bool(value) and value != getattr(LoraConfig(), key, None)


def _unusable(folder: Path, what: str, why: str) -> UserError:
    return UserError(
        f"The adapter in {folder} cannot be used: {what}.",
        why,
        "Merge it into its base model and use the result as the model, or give a plain LoRA adapter.",
    )


def _check_tensors(
    model: PeftModel, folder: Path, shapes: dict[str, tuple[int, ...]], as_named: bool
) -> None:
    """Compare the tensors of a file with those that the adapter on this model has."""
    from peft import get_peft_model_state_dict

    if not as_named:
        return  # peft renames and joins them; what is left over afterwards is checked
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    extra = set(shapes) - set(expected)
    base = model.state_dict() if extra else {}
    extra -= {name for name in extra if name in base and _same(base[name], folder, name)}
    _check_names(folder, sorted(set(expected) - set(shapes)), sorted(extra))
    for name, tensor in expected.items():
        if shapes[name] != tuple(tensor.shape):
            raise _unfit(
                folder,
                f"{name.removeprefix(PREFIX)} is {_shape(shapes[name])} in the file and "
                f"{_shape(tuple(tensor.shape))} on this model",
                "It was made for another base model, or with another rank than its configuration says.",
            )


def _same(tensor: torch.Tensor, folder: Path, name: str) -> bool:
    """Return whether a file's tensor is one of the base model's own, as peft adds for adapted embeddings."""
    import torch
    from safetensors import safe_open

    with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
        found = file.get_tensor(name)
    return torch.equal(found.to(tensor.device, tensor.dtype), tensor)


def _check_names(folder: Path, missing: list[str], unexpected: list[str]) -> None:
    if missing:
        also = f", and has {_few(unexpected)} instead" if unexpected else ""
        raise _unfit(
            folder,
            f"its {ADAPTER_WEIGHTS} lacks {_few(missing)}{also}",
            "Those layers would start untrained, without a word.",
        )
    if unexpected:
        raise _unfit(
            folder,
            f"its {ADAPTER_WEIGHTS} has {_few(unexpected)}, for which this model has no place",
            "What they hold would be dropped, without a word.",
        )


def _few(names: list[str]) -> str:
    shown = ", ".join(name.removeprefix(PREFIX) for name in sorted(names)[:SHOWN])
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''} ({shown}{more})"


def _shape(sizes: tuple[int, ...]) -> str:
    return " x ".join(str(size) for size in sizes)


def _unfit(folder: Path, what: str, why: str) -> UserError:
    return UserError(
        f"The adapter in {folder} does not fit: {what}.",
        why,
        f"Give the whole adapter as save_pretrained() wrote it, with the base model that it was made for, or "
        f"correct target_modules in its {ADAPTER_CONFIG}.",
    )


def _check_finite(model: PeftModel, folder: Path) -> None:
    import torch

    bad = [n for n, p in model.named_parameters() if p.requires_grad and not bool(torch.isfinite(p).all())]
    if bad:
        raise _unfit(
            folder,
            f"{_few(bad)} hold NaN or infinity",
            "Every loss and every gradient of it would be NaN.",
        )


def _on_a_layer(base: PreTrainedModel, tensor: str) -> bool:
    """Return whether a tensor of an adapter's file names a layer that the model has."""
    import torch

    name, found, _ = tensor.removeprefix(PREFIX).partition(".lora_")
    if not found:
        return True
    try:
        module = base.get_submodule(name)
    except AttributeError:
        return False
    return is_linear(module) or isinstance(module, torch.nn.Embedding | torch.nn.modules.conv._ConvNd)


def _weights_as_layers(config: LoraConfig, base: PreTrainedModel) -> None:
    """Name linear layers among ``target_parameters`` by their modules: the same adapter, computed faster."""
    weights = {
        f"{name}.weight": name for name, module in base.named_modules() if is_linear(module)
    }  # full name of the weight -> of the layer
    layers = {weights[name] for name in config.target_parameters or () if name in weights}
    if layers and not isinstance(config.target_modules, str):
        config.target_modules = set(config.target_modules or ()) | layers
        rest = [name for name in config.target_parameters if name not in weights]
        config.target_parameters = rest or None


def _lists(config: LoraConfig) -> tuple[Any, Any]:
    """Return target_modules and target_parameters, lists sorted: sets would be saved in any order."""
    return tuple(
        sorted(found) if isinstance(found, set | frozenset | list) else found
        for found in (config.target_modules, config.target_parameters)
    )  # type: ignore[return-value]


def _split_names(model: PreTrainedModel, targets: Targets) -> tuple[list[str], list[str] | None]:
    """Return what to save as target_modules and as target_parameters, so that peft alone reads it right."""
    taken = [name for name in targets.names if _means_something_else(name, model)]
    if not taken:
        return list(targets.names), None
    layers = matching(model, taken) & targets.layers
    return sorted(set(targets.names) - set(taken)), sorted(f"{layer}.weight" for layer in layers)


def _means_something_else(name: str, model: PreTrainedModel) -> bool:
    """Return whether peft would take a target's name for that of the fused experts of this model."""
    from peft import LoraConfig

    if not _converts():
        return False
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    trial = LoraConfig(target_modules=[name])
    try:
        convert_peft_config_for_transformers(trial, model=model, conversions=None)
    except ValueError:  # it is one of two names that only mean something together
        return True
    return name not in trial.target_modules


def _converts() -> bool:
    return find_spec("peft.utils.transformers_weight_conversion") is not None


@contextmanager
def _names_as_they_are() -> Iterator[None]:
    """Keep peft from taking the names of layers for those of experts, while an adapter is put on."""
    if not _converts():
        yield
        return
    from peft.utils import transformers_weight_conversion as conversion

    kept = conversion.convert_peft_config_for_transformers
    conversion.convert_peft_config_for_transformers = lambda *_, **__: None
    try:
        yield
    finally:
        conversion.convert_peft_config_for_transformers = kept


@contextmanager
def _said(say: Say) -> Iterator[None]:
    """Pass on what peft warns of, once each, instead of letting it write to the console."""
    with warnings.catch_warnings(record=True) as caught:
        for category in (UserWarning, RuntimeWarning):
            warnings.simplefilter("always", category)
        for unsaid in (DeprecationWarning, FutureWarning):  # what transformers has to say to peft
            warnings.simplefilter("ignore", unsaid)
        yield
    for text in dict.fromkeys(str(warning.message).splitlines()[0] for warning in caught):
        say(f"peft: {text}")
