"""Making a model trainable: a fresh LoRA adapter, a given one, or all weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dataflex_pipeline.errors import ConfigError, did_you_mean
from dataflex_pipeline.models.base import adapter_folder, attach_adapter, load_base, load_full
from dataflex_pipeline.models.source import quiet

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from peft import PeftModel
    from transformers import PreTrainedModel

    from dataflex_pipeline.config.fields import Config


def load_for_training(
    config: Config, checkpoint: Path | None, device: str, seed: int, say: Callable[[str], None] = quiet
) -> PreTrainedModel | PeftModel:
    """Load the model as of a checkpoint, with what is trained trainable.

    The weights are loaded as scoring loads them. The trainer's own way goes by the names that parameters have
    in the live model; some families are saved under others, and theirs would stay the base model's.

    Args:
        config: the run's configuration.
        checkpoint: of the step before; None: nothing was trained yet.
        device: from `resolve_device`.
        seed: of a fresh adapter's random initialisation, in [0, 2**64).
        say: told what has to be said about the weights.

    Raises:
        UserError: what `load_base`, `load_full` and `wrap_for_training` refuse.
    """
    if config.finetuning_type == "full":
        # AdamW steps are far below the resolution of bfloat16 near a weight: master weights stay in fp32 and
        # bf16 then means autocast around the forward pass.
        if checkpoint is not None:
            return load_full(config, checkpoint, device, "float32").requires_grad_(True)
        return wrap_for_training(config, load_base(config, device, "float32", say), seed)
    base = load_base(config, device, say=say)
    return wrap_for_training(config, base, seed) if checkpoint is None else attach_adapter(base, checkpoint)


def wrap_for_training(config: Config, model: PreTrainedModel, seed: int) -> PreTrainedModel | PeftModel:
    """Make a freshly loaded base model trainable as ``finetuning_type`` says.

    Args:
        config: LoRA rank, alpha, dropout and targets, or the adapter to start from.
        model: from `load_base`; changed in place.
        seed: of the adapter's random initialisation, in [0, 2**64).

    Raises:
        ConfigError: unknown target modules, a target on the output head, an unusable given adapter.
    """
    if config.finetuning_type == "full":
        return _trainable_whole(config, model)
    if config.adapter_name_or_path is not None:
        wrapped = attach_adapter(model, adapter_folder(config.adapter_name_or_path))
        _refuse_adapted_head(wrapped, config.adapter_name_or_path)
        return wrapped
    return _fresh_lora(config, model, seed)


def _trainable_whole(config: Config, model: PreTrainedModel) -> PreTrainedModel:
    if config.adapter_name_or_path is not None:
        raise ConfigError(
            "adapter_name_or_path was set together with finetuning_type: full.",
            "Training all weights has no adapter to start from.",
            "Merge the adapter into the model first (dataflex export) and use the result as the model.",
        )
    return model.float().requires_grad_(True)


def _fresh_lora(config: Config, model: PreTrainedModel, seed: int) -> PeftModel:
    import torch
    from peft import LoraConfig, get_peft_model

    targets = target_modules(config.lora_target, model)
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha or 2 * config.lora_rank,
        lora_dropout=config.lora_dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
        base_model_name_or_path=model.name_or_path,  # peft warns about any other spelling of the folder
    )
    torch.manual_seed(seed)
    return get_peft_model(model, lora)


def linear_modules(model: PreTrainedModel) -> dict[str, bool]:
    """Return the full name of every linear layer, and whether it is the output head."""
    import torch
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    return {
        name: module is head
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D)
    }


def target_modules(setting: str, model: PreTrainedModel) -> list[str]:
    """Return the module names that LoRA goes on, sorted, so that saved adapters are byte-equal.

    Args:
        setting: ``all``, or comma-separated names; a name matches a module whose full name ends with it.
        model: the base model.

    Raises:
        ConfigError: a name matches no linear layer, or matches the output head.
    """
    linear = linear_modules(model)
    body = _body_names(linear)
    names = [name.strip() for name in setting.split(",") if name.strip()]
    if names == ["all"] or not names:
        return body
    for name in names:
        matched = [full for full in linear if full == name or full.endswith(f".{name}")]
        if not matched:
            raise ConfigError(
                f"lora_target names '{name}', and the model has no linear layer of that name."
                f"{did_you_mean(name, body)}",
                f"Its linear layers are called {', '.join(body)}.",
                "Set lora_target: all, or comma-separated names of those.",
            )
        if any(linear[full] for full in matched):
            raise _head_error(f"lora_target names '{name}', the model's output head.")
    return sorted(set(names))


def _body_names(linear: dict[str, bool]) -> list[str]:
    short = {name.rpartition(".")[2] for name, is_head in linear.items() if not is_head}
    if any(is_head and name.rpartition(".")[2] in short for name, is_head in linear.items()):
        return sorted(name for name, is_head in linear.items() if not is_head)
    return sorted(short)


def _head_error(what: str) -> ConfigError:
    return ConfigError(
        what,
        "The training loss multiplies the hidden states by the head's own weight, so an adapter there "
        "would be ignored and never trained.",
        "Take it out; lora_target: all means every linear layer but the head.",
    )


def _refuse_adapted_head(model: PeftModel, name: str) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    if isinstance(model.get_output_embeddings(), BaseTunerLayer):
        raise _head_error(f"The adapter in {name} changes the model's output head.")
