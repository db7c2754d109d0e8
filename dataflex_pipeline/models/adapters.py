"""Trainable models: a fresh LoRA adapter, a given one, or all weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from dataflex_pipeline.errors import ConfigError
from dataflex_pipeline.models.attached import adapted_layers, put_on, read_configuration
from dataflex_pipeline.models.base import (
    adapter_folder,
    attach_adapter,
    base_for_scoring,
    in_step_precision,
    load_base,
    load_for_scoring,
    load_full,
    precision,
)
from dataflex_pipeline.models.source import quiet
from dataflex_pipeline.models.targets import find_targets, head_error, read_past
from dataflex_pipeline.seeds import derive_seed

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from dataflex_pipeline.config.fields import Config
    from dataflex_pipeline.models.targets import Targets

Say = Callable[[str], None]


def load_for_training(
    config: Config, checkpoint: Path | None, device: str, seed: int, say: Say = quiet
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
        return wrap_for_training(config, load_base(config, device, "float32", say), seed, say)
    base = load_base(config, device, say=say)
    if checkpoint is None:
        return wrap_for_training(config, base, seed, say)
    if config.adapter_name_or_path is None:
        _announced_targets(config, base, say)  # said of every round, wherever it goes on from
    return attach_adapter(base, checkpoint, say)


def load_for_gradients(
    config: Config, checkpoint: Path | None, device: str, say: Say = quiet
) -> PreTrainedModel | PeftModel:
    """Load the model as of a checkpoint to take gradients of the weights that are trained; dropout is off.

    Before anything was trained, those of a run with LoRA are the weights of its fresh adapter, whose matrix B
    is 0: the model's output is the base model's.

    Args:
        config: the run's configuration.
        checkpoint: a complete checkpoint folder; None: the model as it was given.
        device: from `resolve_device`.
        say: told what has to be said about a fresh adapter.

    Raises:
        UserError: what `load_for_scoring` and `load_for_training` refuse.
    """
    fresh = checkpoint is None and config.finetuning_type == "lora" and config.adapter_name_or_path is None
    if fresh:
        base = base_for_scoring(config, device, say)
        model = wrap_for_training(config, base, fresh_seed(config), say)
        return in_step_precision(model, precision(config, device)).eval()
    return load_for_scoring(config, checkpoint, device)


def fresh_seed(config: Config) -> int:
    """Return the seed of a fresh adapter's random initialisation."""
    return derive_seed(config.seed, "adapter")


def wrap_for_training(
    config: Config, model: PreTrainedModel, seed: int, say: Say = quiet
) -> PreTrainedModel | PeftModel:
    """Make a freshly loaded base model trainable as ``finetuning_type`` says.

    Args:
        config: LoRA rank, alpha, dropout and targets, or the adapter to start from.
        model: from `load_base`; changed in place.
        seed: of the adapter's random initialisation, in [0, 2**64).
        say: is told what ``lora_target: all`` leaves out, and what is odd about a given adapter.

    Raises:
        ConfigError: unknown target modules, a target on the output head, an unusable given adapter.
    """
    if config.finetuning_type == "full":
        return _trainable_whole(config, model)
    if config.adapter_name_or_path is not None:
        return _given_lora(config.adapter_name_or_path, model, say)
    return _fresh_lora(config, model, seed, say)


def _trainable_whole(config: Config, model: PreTrainedModel) -> PreTrainedModel:
    if config.adapter_name_or_path is not None:
        raise ConfigError(
            "adapter_name_or_path was set together with finetuning_type: full.",
            "Training all weights has no adapter to start from.",
            "Merge the adapter into the model first (dataflex export) and use the result as the model.",
        )
    return model.float().requires_grad_(True)


def _fresh_lora(config: Config, model: PreTrainedModel, seed: int, say: Say) -> PeftModel:
    import torch
    from peft import LoraConfig
    from transformers.pytorch_utils import Conv1D

    targets = _announced_targets(config, model, say)
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha or 2 * config.lora_rank,
        lora_dropout=config.lora_dropout,
        target_modules=list(targets.names),
        task_type="CAUSAL_LM",
        fan_in_fan_out=any(isinstance(model.get_submodule(name), Conv1D) for name in targets.layers),
        # peft warns about any other spelling of the folder
        base_model_name_or_path=model.name_or_path or None,
    )
    torch.manual_seed(seed)
    return put_on(model, lora, targets, say)


def _announced_targets(config: Config, model: PreTrainedModel, say: Say) -> Targets:
    targets = find_targets(config.lora_target, model)
    if targets.notice is not None:
        say(targets.notice)
    return targets


def _given_lora(name: str, model: PreTrainedModel, say: Say) -> PeftModel:
    folder = adapter_folder(name)
    unseen = read_past(model)
    made_for = read_configuration(folder).get("base_model_name_or_path")
    if made_for and Path(made_for).name != Path(model.name_or_path).name:
        say(
            f"the adapter in {name} says that it was made for {made_for}, and the model here is "
            f"{model.name_or_path}"
        )
    wrapped = attach_adapter(model, folder, say)
    adapted = adapted_layers(wrapped)
    if _is_adapted(wrapped.get_output_embeddings()):
        raise head_error(f"The adapter in {name} changes the model's output head.")
    useless = sorted(unseen & adapted)
    if useless:
        say(
            f"the adapter in {name} is on {len(useless)} layers ({useless[0]}, ...) whose weights the model "
            "reads past the layer: there it has no effect and is not trained"
        )
    return wrapped


def _is_adapted(module: object) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(module, BaseTunerLayer)
