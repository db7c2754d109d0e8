"""The size of a model by the heads of its weight files: parameters and bytes, before anything is loaded."""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from dataflex_pipeline.errors import UserError
from dataflex_pipeline.hub import hub_reachable
from dataflex_pipeline.models.quantized import own_method
from dataflex_pipeline.models.source import (
    MODEL_KEY,
    WEIGHT_FILES,
    check_cached_weights,
    check_model_folder,
    check_weights,
    explained,
    load_arguments,
    local_folder,
    unreadable_weights,
)

if TYPE_CHECKING:
    from dataflex_pipeline.config.fields import Config

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
TRAINED_BYTES = 16
"""Of a parameter that is trained in fp32: itself, its gradient and Adam's two moments."""
GIB = 1 << 30


@dataclass(frozen=True)
class StoredWeights:
    """The weights in a model's files.

    Attributes:
        parameters: numbers in all tensors; tied ones are there once. bytes: of them on disk.
    """

    parameters: int
    bytes: int


def stored_weights(name: str, revision: str | None = None) -> StoredWeights | None:
    """Return the size of a model's weights; None for a hub model that is not in the cache, or no safetensors.

    Args:
        name: folder or hub name. revision: of a hub model.
    """
    folder = local_folder(name) or _cached(name, revision)
    if folder is None:
        return None
    found = [_head(path) for path in _weight_files(folder)]
    if not found:
        return None
    return StoredWeights(sum(each.parameters for each in found), sum(each.bytes for each in found))


def row_flops(config: Config, tokens: float, passes: float) -> float:
    """Return about the FLOPs of a row of so many tokens: 2 per parameter and token for a forward pass.

    Args:
        config: names the model; 0 where the size of it is not known. tokens: of the row.
        passes: forward passes; a backward pass is two.
    """
    found = stored_weights(config.model_name_or_path, config.model_revision)
    return 0.0 if found is None else 2.0 * found.parameters * tokens * passes


def _cached(name: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    for file in WEIGHT_FILES:
        found = try_to_load_from_cache(name, file, revision=revision)
        if isinstance(found, str):
            return Path(found).parent
    return None


def _weight_files(folder: Path) -> list[Path]:
    """Return the files that transformers reads: some models have the same weights in another form, too."""
    whole, index = (folder / name for name in WEIGHT_FILES)
    if whole.is_file():
        return [whole]
    if index.is_file():
        with unreadable_weights(index):
            names = set(json.loads(index.read_bytes())["weight_map"].values())
        return [folder / name for name in sorted(names) if (folder / name).is_file()]
    return sorted(path for path in folder.glob("*.safetensors") if path.is_file())


def _head(path: Path) -> StoredWeights:
    """Read the head of a safetensors file: 8 bytes of length, then JSON of each tensor's shape and place."""
    with unreadable_weights(path), path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(length)) if length < path.stat().st_size else {}
        tensors = [entry for name, entry in entries.items() if name != "__metadata__"]
        places = [entry["data_offsets"] for entry in tensors]
        return StoredWeights(
            sum(prod(entry["shape"]) for entry in tensors), sum(stop - start for start, stop in places)
        )


def check_model_here(config: Config) -> None:
    """Refuse a model whose weights are not there, or larger than the memory, before any data is read.

    Raises:
        UserError: a file is missing or cannot be used. What config.json says of the weights is named, too.
    """
    from dataflex_pipeline.models.base import precision, resolve_device

    device = resolve_device(config.device)
    dtype = precision(config, device).dtype
    folder = local_folder(config.model_name_or_path)
    if folder is None:
        if not hub_reachable():
            check_cached_weights(config.model_name_or_path, revision=config.model_revision)
    else:
        try:
            check_model_folder(folder)
        except UserError as error:
            if not (folder / "config.json").is_file():
                raise
            why = f"{error.why} {_described(config, device, dtype)}"
            raise UserError(error.what, why, error.fix) from None
        check_weights(folder)
    check_weights_fit(config, device, dtype)
    if config.horizon:
        check_training_fits(config, device)


def _described(config: Config, device: str, dtype: str) -> str:
    """Say what the weights would take, by config.json alone."""
    from dataflex_pipeline.models.memory import free_bytes

    numbers = described_parameters(config)
    size = numbers * DTYPE_BYTES[dtype]
    free = free_bytes(device)
    there = "" if free is None else f", and {free / GIB:.1f} GiB are free on {device}"
    return f"By config.json there are {numbers:,} parameters, {size / GIB:.1f} GiB in {dtype}{there}."


def described_parameters(config: Config) -> int:
    """Return the number of a model's parameters by its config.json, without any weights.

    Raises:
        UserError: config.json is none of a causal language model.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    name = config.model_name_or_path
    with explained(name, "configuration"):
        found = AutoConfig.from_pretrained(name, **load_arguments(config))
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(found, trust_remote_code=config.trust_remote_code)
    return sum(parameter.numel() for parameter in model.parameters())


def check_weights_fit(config: Config, device: str, dtype: str, processes: int = 1) -> None:
    """Refuse a model whose weights are larger than the memory that is free for them.

    Args:
        config: names the model. device: torch's. dtype: that they are loaded in, a name of torch.
        processes: of this machine that load them, each for itself, into the same memory.

    Raises:
        UserError: they do not fit.
    """
    found = stored_weights(config.model_name_or_path, config.model_revision)
    if found is None or dtype not in DTYPE_BYTES:
        return
    size: float = found.parameters * DTYPE_BYTES[dtype]
    what = f"{found.parameters:,} parameters in {dtype}"
    if (
        config.quantization_bit is not None
    ):  # embedding and head, which stay as they are, are the smaller part
        size = found.parameters * config.quantization_bit / 8
        what = f"{found.parameters:,} parameters in {config.quantization_bit} bits"
    elif own_method(config) is not None:
        size, what = found.bytes, "quantized weights"
    refuse_too_large(config, device, int(size) * (processes if device == "cpu" else 1), what, processes)


def check_training_fits(config: Config, device: str, processes: int = 1) -> None:
    """Refuse to train all weights where they, their gradients and Adam's moments are larger than the memory.

    Args:
        config: of a run without DeepSpeed, which may share them out. device, processes: as above.

    Raises:
        UserError: they do not fit.
    """
    found = stored_weights(config.model_name_or_path, config.model_revision)
    if found is None or config.finetuning_type != "full" or config.deepspeed is not None:
        return
    needed = found.parameters * TRAINED_BYTES * (processes if device == "cpu" else 1)
    what = f"{found.parameters:,} trained parameters with gradients and Adam's moments in fp32"
    refuse_too_large(config, device, needed, what, processes)


def refuse_too_large(config: Config, device: str, needed: int, what: str, processes: int) -> None:
    """Raise UserError where so many bytes are not free on a device.

    Args:
        config: names the model. needed: bytes. what: takes them. processes: that share the memory.
    """
    from dataflex_pipeline.host_memory import available_bytes
    from dataflex_pipeline.models.memory import free_bytes

    free = available_bytes() if device == "cpu" else free_bytes(device)
    if free is None or needed <= free:
        return
    times = f" in {processes} processes" if processes > 1 and device == "cpu" else ""
    ways = ["a smaller model"]
    if config.finetuning_type == "full":
        ways.append("finetuning_type: lora, which keeps gradients and moments of the adapter only")
    if config.finetuning_type == "lora" and config.quantization_bit is None:
        ways.append("quantization_bit: 4")
    if not config.bf16 and device != "cpu":
        ways.append("bf16: true, which halves the weights")
    if processes > 1 and device == "cpu":
        ways.append("fewer processes per machine")
    raise UserError(
        f"The model {config.model_name_or_path} takes {needed / GIB:.1f} GiB{times} ({what}), and "
        f"{free / GIB:.1f} GiB are free on {device}.",
        "It could not be loaded: on a CPU the system ends a process that takes more than there is.",
        f"Use {' or '.join(ways)}, or a machine with more memory ({MODEL_KEY}, device).",
    )
