"""A quantized base model, by bitsandbytes: ``quantization_bit``, or what the model's files hold.

The base model's linear layers but the head are kept in 4 bits (nf4, the scales quantized too) or 8 bits
(int8) and multiplied in the run's precision; LoRA is trained on top (QLoRA, Dettmers et al. 2023). Gradients
of the adapter pass through the base as through any frozen layer. Files that another package quantized are
refused by name: their layers take no adapter that is tested here.
"""

from __future__ import annotations

import importlib.util
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dataflex_pipeline.errors import ConfigError, UserError
from dataflex_pipeline.models.source import explained, load_arguments, local_folder, model_configuration

if TYPE_CHECKING:
    from dataflex_pipeline.config.fields import Config

PACKAGE = "bitsandbytes"
DEVICES = ("cuda", "xpu", "npu", "cpu")
"""Devices that bitsandbytes has kernels or plain torch code for."""


def own_method(config: Config) -> str | None:
    """Return the package that quantized a model's files, as its config.json says; None for plain weights."""
    folder = local_folder(config.model_name_or_path)
    if folder is not None:
        there = (folder / "config.json").is_file()
        found = model_configuration(folder).get("quantization_config") if there else None
        if not isinstance(found, dict | None):
            raise UserError(
                f"{folder / 'config.json'} cannot be used: its quantization_config is no object.",
                "It says how the weights are quantized.",
                "Copy the model's own config.json again.",
            )
    else:
        from transformers import AutoConfig

        with explained(config.model_name_or_path, "configuration"):
            loaded = AutoConfig.from_pretrained(config.model_name_or_path, **load_arguments(config))
        found = getattr(loaded, "quantization_config", None)
        found = found if found is None or isinstance(found, dict) else found.to_dict()
    if not found:
        return None
    method = found.get("quant_method")
    # Files of the first releases name no method.
    return str(method or (PACKAGE if found.get("load_in_4bit") or found.get("load_in_8bit") else "unnamed"))


def is_quantized(config: Config) -> bool:
    """Return whether the base model is quantized.

    Raises:
        ConfigError: it is, and what the settings ask for cannot be done with it here.
    """
    own, bits = own_method(config), config.quantization_bit
    if own is None and bits is None:
        return False
    if own not in (None, PACKAGE):
        raise ConfigError(
            f"The model {config.model_name_or_path} is quantized by {own}.",
            f"Adapters are tried here on layers of bitsandbytes only, not on those of {own}.",
            "Name the model that it was made from, and set quantization_bit: 4 or 8 if it has to be small.",
        )
    if own is not None and bits is not None:
        raise ConfigError(
            f"quantization_bit: {bits} was set, and {config.model_name_or_path} is quantized already.",
            "Weights are quantized once.",
            "Leave quantization_bit out, or name the model that it was made from.",
        )
    if config.finetuning_type == "full":
        raise ConfigError(
            f"finetuning_type: full was set, and the model {config.model_name_or_path} is quantized.",
            "Quantized weights are whole numbers, which no gradient step moves.",
            "Set finetuning_type: lora, or name the model that it was made from.",
        )
    if importlib.util.find_spec(PACKAGE) is None:
        what = f"quantization_bit: {bits} was set" if bits else f"{config.model_name_or_path} is quantized"
        raise ConfigError(
            f"{what}, by {PACKAGE}.",
            f"The package {PACKAGE} is not installed in this environment.",
            "Install it (pip install 'dataflex-pipeline[quant]'), or take plain weights.",
        )
    _refuse_sharding(config)
    return True


def _refuse_sharding(config: Config) -> None:
    path = None if config.deepspeed is None else Path(config.deepspeed)
    if path is None or not path.is_file():
        return
    if json.loads(path.read_bytes()).get("zero_optimization", {}).get("stage") == 3:
        raise ConfigError(
            f"Set together: deepspeed: {config.deepspeed} (ZeRO-3), and a quantized model.",
            "ZeRO-3 takes weights apart into pieces of one number format; quantized ones have scales, too.",
            "Use ds_z2 or no deepspeed: a model of 4 bits per weight is meant to fit one GPU.",
        )


def quantization(config: Config, device: str, dtype: str) -> dict[str, Any]:
    """Return what ``from_pretrained`` is told of the quantization; nothing where there is none to make.

    Args:
        config: names the model. device: from `resolve_device`. dtype: name of a torch number format, to
            multiply in.

    Raises:
        ConfigError: as `is_quantized`; or the device cannot do it.
    """
    kind = device.partition(":")[0]
    if kind not in DEVICES:
        raise ConfigError(
            f"A quantized model was asked for, and the device is {device}.",
            f"{PACKAGE} computes on {', '.join(DEVICES)}.",
            "Leave quantization_bit out, or use another device.",
        )
    # On a CPU it says at import that faster kernels could be downloaded, which nobody asked for.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if config.quantization_bit is None:
        return {}
    import torch
    from transformers import BitsAndBytesConfig

    if config.quantization_bit == 8:
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, dtype),
        )
    }
