"""The causal language model on its device, in its precision, with an adapter or without."""

from __future__ import annotations

import gc
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dataflex_pipeline import accelerators
from dataflex_pipeline.errors import ConfigError, CorruptError, UserError
from dataflex_pipeline.home import expanded
from dataflex_pipeline.host_memory import give_back, grow_segments
from dataflex_pipeline.models.one_base import base_of, let_go, let_go_if_trained
from dataflex_pipeline.models.quantized import is_quantized, quantization
from dataflex_pipeline.models.source import (
    attention_kernel,
    check_model_folder,
    explained,
    load_arguments,
    local_folder,
    quiet,
)
from dataflex_pipeline.models.weights import check_weights_fit

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

    from dataflex_pipeline.config.fields import Config

grow_segments()  # before a GPU is used: every model of the program is loaded through this module

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
KINDS = ("cuda", "xpu", "npu", "mps")
"""Kinds of accelerators that ``device`` may name; torch may know others, which it names itself."""
BF16_ON_A_CPU = "bf16: true becomes fp32 on a CPU."
SLOW_FP32 = (
    "bf16: false on an accelerator that has bfloat16: fp32 takes about 8 times as long and twice the memory."
)


def resolve_device(setting: str) -> str:
    """Return the torch device that a ``device`` setting stands for.

    Args:
        setting: auto (the accelerator that torch finds, else cpu), cpu, or the kind of an accelerator (cuda,
            xpu, npu, mps) with or without a number, such as cuda:1.

    Raises:
        ConfigError: not a device, or one that this machine does not have.
    """
    if setting == "auto":
        setting = accelerators.kind() or "cpu"
    if setting == "cpu":
        # DeepSpeed, where it is installed, is imported by transformers when a model is saved, and prints
        # a warning to stdout unless it is told that a CPU is what is wanted.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        return setting
    match = re.fullmatch(r"([a-z]+)(?::(\d+))?", setting)
    if match is None or (match[1] not in KINDS and match[1] != accelerators.kind()):
        raise _no_device(setting, f"It is not a device: auto, cpu, {', '.join(KINDS)} and cuda:N are.")
    count = accelerators.count() if match[1] == accelerators.kind() else 0
    if int(match[2] or 0) >= count:
        raise _no_device(setting, f"torch sees {count} {match[1]} devices here.")
    return setting


def _no_device(setting: str, why: str) -> ConfigError:
    return ConfigError(
        f"device: {setting} cannot be used.", why, "Set device to auto, or to one that there is."
    )


def widest_float(device: torch.device | str) -> torch.dtype:
    """Return the number format for sums on a device: float64, or float32 on Apple's GPUs, which lack it."""
    import torch

    return torch.float32 if torch.device(device).type == "mps" else torch.float64


def is_gpu(setting: str) -> bool:
    """Whether a ``device`` setting stands for a CUDA GPU; torch is not imported where it says cpu."""
    return setting != "cpu" and resolve_device(setting).startswith("cuda")


@dataclass(frozen=True)
class Precision:
    """The number format of the frozen weights and of the forward pass.

    Attributes:
        dtype: a name of torch.
        notices: what was said about it; empty when the setting was taken as it is.
    """

    dtype: Literal["float32", "bfloat16"]
    notices: tuple[str, ...] = ()


def precision(config: Config, device: str) -> Precision:
    """Return the precision that ``bf16`` means on this device; auto is bfloat16 where the device has it.

    Raises:
        ConfigError: bf16 on an accelerator that cannot compute in it.
    """
    kind = device.partition(":")[0]
    if kind == "cpu":
        return Precision("float32", (BF16_ON_A_CPU,) if config.bf16 is True else ())
    has = accelerators.has_bf16(device)
    if config.bf16 is True and has is False:
        raise ConfigError(
            "bf16: true was set.",
            f"The accelerator {device} does not compute in bfloat16.",
            "Set bf16: false to train in fp32, or use a GPU of compute capability 8.0 or more.",
        )
    if config.bf16 is True or (config.bf16 == "auto" and has):
        return Precision("bfloat16")
    return Precision("float32", (SLOW_FP32,) if has else ())


@dataclass(frozen=True)
class _Loaded:
    """A model on its device, and the names of weights that its files hold and it has no place for."""

    model: PreTrainedModel
    unexpected: tuple[str, ...]


def _load(source: str, config: Config, device: str, dtype: str, **arguments: Any) -> _Loaded:
    import torch
    from transformers import AutoModelForCausalLM

    kernel = attention_kernel(config)
    if kernel is not None:
        arguments["attn_implementation"] = kernel
    quantized = is_quantized(config)
    if quantized:
        arguments |= quantization(config, device, dtype)
    arguments |= placement(device, needed=quantized)
    settle_tf32(config, device)
    with explained(source, "weights"), no_bars():
        model, found = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=getattr(torch, dtype),
            use_safetensors=True,
            output_loading_info=True,
            **arguments,
        )
    if found["missing_keys"]:
        names = sorted(found["missing_keys"])
        raise UserError(
            f"The weights of '{source}' lack {len(names)} parameters: {', '.join(names[:3])}.",
            "They would be random numbers, without a word.",
            "Use the folder of a whole causal language model (not of an encoder or a headless one).",
        )
    if not quantized:  # whose layers are on their device, and may not be moved or cast
        model = model.to(device)
    return _Loaded(model, tuple(sorted(found["unexpected_keys"])))


def placement(device: str, *, needed: bool = False) -> dict[str, Any]:
    """Return what makes ``from_pretrained`` read weights straight to a device, past the machine's memory.

    Nothing on a CPU, and nothing under ZeRO-3, which takes each weight apart as it comes.

    Args:
        device: from `resolve_device`. needed: on a CPU too, as quantizing is done where the weights arrive.
    """
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    if is_deepspeed_zero3_enabled() or (device == "cpu" and not needed):
        return {}
    return {"device_map": {"": accelerators.with_index(device)}}


def settle_tf32(config: Config, device: str) -> None:
    """Let CUDA multiply fp32 matrices with 10-bit mantissas, or not, as ``tf32`` says."""
    if device.startswith("cuda"):
        import torch

        torch.backends.cuda.matmul.fp32_precision = "tf32" if config.tf32 else "ieee"


def free_memory() -> None:
    """Give back what dropped models take up: their parts name each other, so that it would stay a while."""
    gc.collect()
    give_back()
    accelerators.release()


@contextmanager
def no_bars() -> Iterator[None]:
    """Keep transformers' own progress bars and load reports off the console; errors are raised here."""
    from transformers.utils import logging

    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()


def load_base(
    config: Config, device: str, dtype: str | None = None, say: Callable[[str], None] = quiet
) -> PreTrainedModel:
    """Load the base model named by ``model_name_or_path``.

    Args:
        config: names the model, its revision, precision and attention kernel.
        device: from `resolve_device`.
        dtype: name of a torch number format; None for that of `precision`.
        say: told which weights of the files the model has no place for.

    Raises:
        UserError: missing folder, not a model, pickled weights, or a hub name that cannot be loaded.
    """
    let_go()  # what is free is looked at, too
    folder = local_folder(config.model_name_or_path)
    if folder is not None:
        check_model_folder(folder)
    name = str(folder or config.model_name_or_path)
    number_format = dtype or precision(config, device).dtype
    check_weights_fit(config, device, number_format)
    loaded = _load(name, config, device, number_format, **load_arguments(config))
    if loaded.unexpected:
        say(
            f"{len(loaded.unexpected)} weights of '{name}' have no place in a {type(loaded.model).__name__} "
            f"and are not used: {shortened(loaded.unexpected)}."
        )
    return loaded.model


def base_for_scoring(config: Config, device: str, say: Callable[[str], None] = quiet) -> PreTrainedModel:
    """Return the run's base model in the run's precision, which a command may keep (one_base.py).

    Args:
        config, device, say: as for `load_base`.
    """
    dtype = precision(config, device).dtype
    settle_tf32(config, device)
    names = config.model_name_or_path, config.model_revision, config.trust_remote_code
    key = (*names, attention_kernel(config), config.quantization_bit, device, dtype)
    return base_of(key, partial(load_base, config, device, dtype), say)


def load_for_scoring(config: Config, checkpoint: Path | None, device: str) -> PreTrainedModel | PeftModel:
    """Load the model as of a checkpoint: base and adapter, or the full weights saved in it.

    Dropout is off (eval mode); exactly the parameters that were trained require a gradient.

    Args:
        config: the run's configuration.
        checkpoint: a complete checkpoint folder; None: the model before the warm-up (the base, with
            ``adapter_name_or_path`` where that is set).
        device: from `resolve_device`.

    Raises:
        CorruptError: the checkpoint holds no weights of the kind that ``finetuning_type`` says.
    """
    adapter = checkpoint
    if checkpoint is None and config.adapter_name_or_path is not None:
        adapter = adapter_folder(config.adapter_name_or_path)
    if config.finetuning_type == "full":
        if checkpoint is None:
            return base_for_scoring(config, device).eval()
        return load_full(config, checkpoint, device).eval()
    base = base_for_scoring(config, device)
    base.requires_grad_(False)
    if adapter is None:
        return base.eval()
    model = attach_adapter(base, adapter)
    let_go_if_trained()
    return in_step_precision(model, precision(config, device)).eval()


def in_step_precision(model: PeftModel, step: Precision) -> PeftModel:
    """Put an adapter into the number format that a training step multiplies it in.

    peft makes adapters float32, the format in which training adds up their updates; its step multiplies them
    in bfloat16 under autocast. Left in float32, every adapted layer would keep and multiply float32 copies of
    its inputs, which is slower and another function than the one that is trained.
    """
    import torch

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(getattr(torch, step.dtype))
    return model


def load_full(config: Config, checkpoint: Path, device: str, dtype: str | None = None) -> PreTrainedModel:
    """Load the weights that a fully fine-tuned checkpoint holds, every one of them and nothing else.

    Args:
        config: precision and attention kernel. checkpoint: its folder. device: from `resolve_device`.
        dtype: name of a torch number format; None for that of `precision`.

    Raises:
        CorruptError: there are none, or one that the model has no place for.
        UserError: one is missing.
    """
    let_go()
    if not (checkpoint / "config.json").is_file() or not any(checkpoint.glob("model*.safetensors")):
        raise _no_weights(checkpoint, "model.safetensors with its config.json", "full")
    loaded = _load(
        str(checkpoint),
        config,
        device,
        dtype or precision(config, device).dtype,
        trust_remote_code=config.trust_remote_code,
        local_files_only=True,
    )
    if loaded.unexpected:
        raise CorruptError(
            f"The weights in {checkpoint} hold {len(loaded.unexpected)} that a {type(loaded.model).__name__} "
            f"has no place for: {shortened(loaded.unexpected)}.",
            "What was trained in them would be lost without a word.",
            "Use the version of transformers that it was made with, or train that round again (--overwrite).",
        )
    return loaded.model


def shortened(names: Sequence[str]) -> str:
    """Return the first three names, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def attach_adapter(
    base: PreTrainedModel, folder: Path, say: Callable[[str], None] = quiet, to_merge: bool = False
) -> PeftModel:
    """Put the adapter of a folder on a freshly loaded base; its parameters require a gradient.

    Args:
        base: from `load_base`. folder: of a LoRA adapter. say: is told what peft warns of.
        to_merge: only to merge it; see `read_adapter`.

    Raises:
        CorruptError: the folder has no adapter. UserError: its tensors are not those that its configuration
            means on this base, or it is not a LoRA adapter that is scored and trained right here.
    """
    from dataflex_pipeline.models.attached import read_adapter

    if not (folder / ADAPTER_CONFIG).is_file() or not (folder / ADAPTER_WEIGHTS).is_file():
        raise _no_weights(folder, f"{ADAPTER_WEIGHTS} with its {ADAPTER_CONFIG}", "lora")
    return read_adapter(base, folder, say, to_merge)


def _no_weights(folder: Path, wanted: str, kind: str) -> CorruptError:
    return CorruptError(
        f"{folder} has no {wanted}.",
        f"finetuning_type: {kind} reads its weights from there, and never from pickled files.",
        "Train that round again with --overwrite, or set finetuning_type to what the folder was made with.",
    )


def adapter_folder(name: str) -> Path:
    """Return the folder of ``adapter_name_or_path``.

    Raises:
        ConfigError: several adapters, not a folder, or an adapter that is only there as pickle.
    """
    folder = expanded(name)
    why = ""
    if not folder.is_dir():
        why = "It is not a folder; an adapter is started from a local folder, one at a time."
    elif not (folder / ADAPTER_CONFIG).is_file():
        why = f"The folder has no {ADAPTER_CONFIG}."
    elif not (folder / ADAPTER_WEIGHTS).is_file():
        why = f"The folder has no {ADAPTER_WEIGHTS} (pickled weights are not read)."
    if why:
        raise ConfigError(
            f"adapter_name_or_path: {name} cannot be used.",
            why,
            "Give the folder of one LoRA adapter as save_pretrained() writes it, or leave the key out.",
        )
    return folder
