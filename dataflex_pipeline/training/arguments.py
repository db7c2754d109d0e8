"""The run configuration in the words of transformers and TRL, and the settings that cannot train."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dataflex_pipeline import launch
from dataflex_pipeline.config.checks import TRACKERS, schedule
from dataflex_pipeline.errors import ConfigError, did_you_mean
from dataflex_pipeline.launch.accelerate import refuse_accelerate
from dataflex_pipeline.models.base import precision, resolve_device
from dataflex_pipeline.seeds import derive_seed
from dataflex_pipeline.training.plan import RoundPlan

if TYPE_CHECKING:
    from trl import SFTConfig

    from dataflex_pipeline.config.fields import Config


def accumulation(config: Config, global_batch: int, world: int) -> int:
    """Return the forward passes per optimizer step that keep the global batch as it was at the warm-up.

    Raises:
        ConfigError: the global batch is no multiple of per_device_train_batch_size x processes.
    """
    rows = config.per_device_train_batch_size * world
    if global_batch % rows:
        raise ConfigError(
            f"{world} processes train {config.per_device_train_batch_size} rows each "
            "(per_device_train_batch_size) per forward pass.",
            f"The run trains {global_batch} rows per step since its warm-up, which is no multiple of {rows}.",
            "Use another number of processes, or a per-device batch that divides "
            f"{global_batch} by the number of processes.",
        )
    return global_batch // rows


def trackers(config: Config) -> list[str]:
    """Return the experiment trackers to report to.

    Raises:
        ConfigError: an unknown tracker, or one whose package is not installed.
    """
    names = [name.strip() for name in config.report_to.split(",") if name.strip()]
    if config.use_swanlab and "swanlab" not in names:
        names.append("swanlab")
    names = [name for name in names if name != "none"]
    for name in names:
        if name not in TRACKERS:
            raise ConfigError(
                f"report_to: '{name}' is not known.{did_you_mean(name, TRACKERS)}",
                f"Known are none, {', '.join(TRACKERS)}.",
                "Set report_to to some of them, comma-separated.",
            )
        if not any(importlib.util.find_spec(package) for package in TRACKERS[name]):
            raise ConfigError(
                f"report_to: {name} was set.",
                f"The package {TRACKERS[name][0]} is not installed in this environment.",
                f"Install it (pip install {TRACKERS[name][0]}), or set report_to: none.",
            )
    return names


def training_device(config: Config) -> str:
    """Return the device of the training.

    Raises:
        ConfigError: a GPU other than the first one; the trainer takes the first that it sees.
    """
    device = resolve_device(config.device)
    kind, _, number = device.partition(":")
    if number and int(number):
        raise ConfigError(
            f"device: {device} was set.",
            "Training takes the first GPU that it sees.",
            f"Set device: {kind} and the environment variable CUDA_VISIBLE_DEVICES={number} (or what it is "
            f"called for {kind}).",
        )
    return kind


def check_settings(config: Config, global_batch: int) -> None:
    """Refuse settings that cannot train, before anything is loaded.

    Args:
        config: the run's configuration. global_batch: rows per optimizer step.

    Raises:
        ConfigError: tracker, schedule, device, batch size, DeepSpeed file or setting of accelerate that
            cannot be used, or checkpoints to keep and none made.
    """
    trackers(config)
    schedule(config)
    training_device(config)
    accumulation(config, global_batch, launch.world_size())
    refuse_accelerate(mixed=precision(config, resolve_device(config.device)).dtype == "bfloat16")
    if config.keep_checkpoints and config.save_steps is None:
        raise ConfigError(
            "keep_checkpoints: true was set without save_steps.",
            "There is no checkpoint inside a round to keep; its end always stays.",
            "Set save_steps to less than the steps of a round, or leave keep_checkpoints out.",
        )
    if config.deepspeed is None:
        return
    if not Path(config.deepspeed).is_file():
        raise ConfigError(
            f"deepspeed: {config.deepspeed} was set.",
            "There is no such file.",
            "Give the path of a DeepSpeed configuration (JSON), or leave the key out.",
        )
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            f"deepspeed: {config.deepspeed} was set.",
            "The package deepspeed is not installed in this environment.",
            "Install it (pip install 'dataflex-pipeline[deepspeed]'), or leave the key out.",
        )


def check_router_coefficient(config: Config, model: Any) -> None:
    """Refuse ``router_aux_loss_coef`` for a model without routers.

    Raises:
        ConfigError: it is set to more than 0, and the model is no mixture of experts.
    """
    text = model.config.get_text_config()
    if config.router_aux_loss_coef and not hasattr(text, "output_router_logits"):
        raise no_aux_loss(config.router_aux_loss_coef, str(text.model_type))


def balances_experts(config: Config, model: Any) -> bool:
    """Return whether a load-balancing loss may be added, whose value depends on which rows are together."""
    return hasattr(model.config.get_text_config(), "output_router_logits") and (
        config.router_aux_loss_coef is None or config.router_aux_loss_coef > 0
    )


def no_aux_loss(coefficient: float, model_type: str) -> ConfigError:
    """Return the error for a load-balancing loss that was asked for and that the model does not give."""
    return ConfigError(
        f"router_aux_loss_coef: {coefficient} was set.",
        f"A model of type {model_type} gives no load-balancing loss that it could weigh.",
        "Set router_aux_loss_coef: 0, or leave it out.",
    )


def training_arguments(config: Config, plan: RoundPlan) -> SFTConfig:
    """Return the trainer's arguments. Creating them joins the process group, where there is one."""
    from trl import SFTConfig

    device = training_device(config)
    if config.deepspeed is not None and "WORLD_SIZE" not in os.environ:
        _world_of_one()
    arguments = SFTConfig(
        output_dir=str(plan.work),
        run_name=f"{config.run_name or plan.run_folder.name}-round-{plan.round:02d}",
        seed=derive_seed(config.seed, "training") % 2**32,
        use_cpu=device == "cpu",
        **_schedule(config, plan),
        **_optimizer(config, device),
        **_data(config, device),
        bf16=precision(config, device).dtype == "bfloat16",
        gradient_checkpointing=recomputes(config, device),
        gradient_checkpointing_kwargs={"use_reentrant": False} if recomputes(config, device) else None,
        deepspeed=_deepspeed(config, device),
        ddp_timeout=config.ddp_timeout,
        router_aux_loss_coef=config.router_aux_loss_coef,
        **_quiet(config),
    )
    if config.deepspeed is not None:
        # ZeRO-3 shards the weights while they are loaded, which is before the trainer would tell
        # DeepSpeed how many processes there are.
        importlib.import_module("deepspeed").init_distributed()
    return arguments


def _deepspeed(config: Config, device: str) -> str | dict[str, Any] | None:
    """Return the DeepSpeed configuration: the file, but on a CPU, which has no streams to overlap in."""
    if config.deepspeed is None or device != "cpu":
        return config.deepspeed
    content: dict[str, Any] = json.loads(Path(config.deepspeed).read_bytes())
    if "overlap_comm" in content.get("zero_optimization", {}):
        content["zero_optimization"]["overlap_comm"] = False
    return content


def _world_of_one() -> None:
    """Say what a launcher would: DeepSpeed wants a process group for one process too, and looks for MPI."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}
    os.environ.update({**alone, "MASTER_PORT": str(port)})


def _schedule(config: Config, plan: RoundPlan) -> dict[str, Any]:
    return {
        "max_steps": plan.horizon,
        "per_device_train_batch_size": config.per_device_train_batch_size,
        "per_device_eval_batch_size": config.per_device_eval_batch_size,
        "gradient_accumulation_steps": accumulation(config, plan.global_batch, launch.world_size()),
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": schedule(config),
        # A fraction below 1 is a share of max_steps to transformers, and 1.0 would be one single step.
        "warmup_steps": config.warmup_ratio if config.warmup_ratio < 1 else plan.horizon,
        # When to evaluate and save is decided by the round's own conductor.
        "eval_strategy": "no",
        "save_strategy": "no",
    }


def recomputes(config: Config, device: str) -> bool:
    """Return whether training recomputes activations: auto does on an accelerator, whose memory is small."""
    if config.gradient_checkpointing == "auto":
        return device.partition(":")[0] != "cpu"
    return config.gradient_checkpointing


def _optimizer(config: Config, device: str) -> dict[str, Any]:
    # torch's own choice on CUDA holds one more copy of all weights in each step. Everywhere else, and for
    # the few weights of an adapter, the same arithmetic as ever.
    fused = config.finetuning_type == "full" and device == "cuda" and config.deepspeed is None
    return {
        "optim": "adamw_torch_fused" if fused else "adamw_torch",
        "adam_beta1": config.adam_beta1,
        "adam_beta2": config.adam_beta2,
        "adam_epsilon": config.adam_epsilon,
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
    }


def _data(config: Config, device: str) -> dict[str, Any]:
    return {
        "train_sampling_strategy": "sequential",
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "max_length": config.cutoff_len,
        "packing": False,
        "completion_only_loss": False,
        "dataloader_num_workers": config.dataloader_num_workers,
        "dataloader_pin_memory": device not in ("cpu", "mps"),
    }


def _quiet(config: Config) -> dict[str, Any]:
    return {
        "logging_steps": config.logging_steps,
        # A loss that is not finite stops the training here; it is not averaged away in the log.
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
        "log_level": "error",
        "report_to": trackers(config) or "none",
    }


@contextmanager
def tracker_environment(config: Config, run_folder: Path) -> Iterator[None]:
    """Set the environment variables that the trackers read, and restore them afterwards.

    Secrets go only through here: they are in no file and in no line of output.
    """
    wanted = {
        "TENSORBOARD_LOGGING_DIR": str(run_folder / "logs"),
        "WANDB_DIR": str(run_folder),
        "SWANLAB_API_KEY": config.swanlab_api_key,
        "SWANLAB_PROJECT": config.swanlab_project,
        "SWANLAB_WORKSPACE": config.swanlab_workspace,
        "SWANLAB_EXP_NAME": config.swanlab_run_name,
        "SWANLAB_MODE": config.swanlab_mode,
        "SWANLAB_LOG_DIR": config.swanlab_logdir,
        "TOKENIZERS_PARALLELISM": "false",
    }
    # What the user already exported wins over the defaults of this program, not over the configuration.
    defaults = {"TENSORBOARD_LOGGING_DIR", "WANDB_DIR", "TOKENIZERS_PARALLELISM"}
    chosen = {
        name: value
        for name, value in wanted.items()
        if value is not None and not (name in defaults and name in os.environ)
    }
    before = {name: os.environ.get(name) for name in chosen}
    os.environ.update(chosen)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def announce_to_lark(config: Config) -> None:
    """Register SwanLab's Lark notification, where a webhook is configured."""
    if config.swanlab_lark_webhook_url is None or "swanlab" not in trackers(config):
        return
    swanlab = importlib.import_module("swanlab")
    notification = importlib.import_module("swanlab.plugin.notification")
    callback = notification.LarkCallback(config.swanlab_lark_webhook_url, config.swanlab_lark_secret)
    swanlab.register_callbacks([callback])
