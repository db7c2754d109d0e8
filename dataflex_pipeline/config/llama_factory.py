"""Keys of LLaMA-Factory's and DataFlex's files that are no keys here, and what becomes of each.

    PASSED_OVER   changes no score, selection or training, or is done by other means here: said
    REFUSED       would change the result, and is not offered: an error, unless it is off
    RENAMED       the same thing under another name here: taken as that
    ATTENTION     values of ``flash_attn``

A null, and a value that asks for nothing (``packing: false``), is taken without a word everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_NOT_OFF: tuple[Any, ...] = (False, 0, "", "none", "no")


@dataclass(frozen=True)
class Foreign:
    """A key that has no place here.

    Attributes:
        why: what is said of it: why it has no effect, or why it cannot be used.
        fix: of a refused key, what to do instead.
        off: the values that ask for nothing.
    """

    why: str
    fix: str = ""
    off: tuple[Any, ...] = _NOT_OFF

    def is_off(self, value: Any) -> bool:
        """Whether a value asks for nothing; true and 1 are not the same."""
        return any(isinstance(value, bool) == isinstance(each, bool) and value == each for each in self.off)


def _same(names: str, foreign: Foreign) -> dict[str, Foreign]:
    return dict.fromkeys(names.split(), foreign)


_SPEED = Foreign("it changes speed or memory, not the result, and is not offered here")
_LOGS = Foreign("logs and progress are written in one way here")
_PIXELS = Foreign("only text is trained on; rows with images, videos or audio are refused one by one", off=())
_RAY = Foreign("processes are started with torchrun: torchrun ... -m dataflex_pipeline round N", off=())
_UPLOAD = Foreign("nothing is uploaded while it runs; `dataflex export --push-to-hub NAME` does it")
_TOKEN = Foreign("the token of the hub is read from HF_TOKEN", off=("",))
_ON_TARGET = Foreign("`dataflex evaluate` generates answers and has the metrics")
_LOADER = Foreign("the data loader is set by dataloader_num_workers alone", off=(False, True, 0, 2))
_KERNEL = Foreign(
    "fused kernels do not give a weighted loss row by row; transformers' own code is run", off=(False,)
)
_PACKED = Foreign("rows are not packed here: each is scored and weighted by itself")

PASSED_OVER: dict[str, Foreign] = {
    "val_size": Foreign(
        "no rows are split off here: eval_dataset names those to evaluate on and to select towards"),
    **_same("packing neat_packing", _PACKED),
    "streaming": Foreign("data is always read as a stream"),
    "buffer_size": Foreign("data is always read as a stream, and rows are drawn from all of it", off=()),
    "do_eval": Foreign("eval_strategy says whether it is evaluated", off=(False, True)),
    **_same("do_predict predict_with_generate compute_accuracy eval_on_each_dataset", _ON_TARGET),
    "eval_num_beams": _ON_TARGET,
    "save_strategy": Foreign(
        "a round's end is always saved, and save_steps adds checkpoints inside it", off=("steps",)
    ),
    "save_total_limit": Foreign("a round keeps its newest checkpoint, or all (keep_checkpoints)", off=()),
    "save_safetensors": Foreign("weights are always safetensors", off=(True,)),
    "tokenized_path": Foreign("prepared rows are kept in the run's own folder", off=("",)),
    **_same("preprocessing_batch_size ignore_pad_token_for_loss cache_dir offload_folder", Foreign(
        "it is settled in one way here", off=(True, 1000, "", "offload"))),
    "data_seed": Foreign("seed is the one seed, and everything random follows from it", off=()),
    "optim": Foreign(
        "torch's AdamW is what trains, since some methods score with its states",
        off=("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw"),
    ),
    **_same("enable_liger_kernel use_unsloth use_v1_kernels use_kt", _KERNEL),
    "use_unsloth_gc": Foreign("gradient_checkpointing: true saves memory with transformers' own code"),
    **_same("use_reentrant_gc gradient_checkpointing_kwargs low_cpu_mem_usage use_fast_tokenizer", Foreign(
        _SPEED.why, off=(False, True, ""))),
    **_same("torch_compile torch_compile_backend torch_compile_mode group_by_length", _SPEED),
    **_same("train_sampling_strategy", Foreign(_SPEED.why, off=("random",))),
    **_same("use_cache use_kv_cache infer_backend infer_dtype", Foreign(
        "it is about inference only", off=(False, True, "huggingface", "hf", "auto"))),
    **_same("upcast_layernorm upcast_lmhead_output", Foreign(
        "bf16 decides the number format of everything; losses are always taken in fp32")),
    **_same("dataloader_pin_memory dataloader_drop_last dataloader_persistent_workers", _LOADER),
    "dataloader_prefetch_factor": _LOADER,
    **_same("remove_unused_columns ddp_find_unused_parameters local_rank", Foreign(
        "it is settled in one way here", off=(False, True, -1, 0))),
    **_same("logging_dir logging_strategy", Foreign(_LOGS.why, off=("", "steps"))),
    **_same("logging_first_step disable_tqdm log_level print_param_status include_mfu", _LOGS),
    **_same("include_num_input_tokens_seen include_tokens_per_second", _LOGS),
    "include_effective_tokens_per_second": _LOGS,
    **_same("push_to_hub hub_model_id hub_strategy hub_private_repo", _UPLOAD),
    **_same("hf_hub_token ms_hub_token om_hub_token hub_token", _TOKEN),
    **_same("ray_run_name ray_storage_path ray_num_workers ray_init_kwargs", _RAY),
    **_same("resources_per_worker placement_strategy master_addr master_port", _RAY),
    **_same("media_dir image_max_pixels image_min_pixels video_max_pixels video_min_pixels", _PIXELS),
    **_same("video_fps video_maxlen audio_sampling_rate use_audio_in_video image_do_pan_and_scan", _PIXELS),
    **_same("crop_to_patches freeze_vision_tower freeze_multi_modal_projector", _PIXELS),
    "freeze_language_model": Foreign(_PIXELS.why),
    **_same("enable_thinking preserve_thinking tool_format", Foreign(
        "the chat template decides it: choose template, or give a row chat_template_kwargs", off=())),
}  # fmt: skip

_OTHER_TRAINING = (
    "Rows are scored with the states of plain AdamW training, of a LoRA adapter or of all weights."
)
_OTHER_LORA = Foreign(_OTHER_TRAINING, "Leave it out: LoRA adapters are trained in the standard form.")
_OTHER_LOSS = Foreign(
    "The loss of training is the mean negative log-likelihood of response tokens, weighted by rows.",
    "Leave it out.",
)
_TOKENS = Foreign(
    "The tokenizer and the embedding are taken as they are.",
    "Add the tokens to the model first, save it, and name that model.",
)
_SHARES = Foreign(
    "The pool is all rows of all data sets, and a method selects among them.",
    "Leave it out; for fixed shares of the data sets set source_quotas.",
    off=(False, "", "none", "concat"),
)
_QUANTIZED = Foreign(
    "A base model is loaded in bf16 or fp32, or by bitsandbytes in nf4 (doubly quantized) or int8.",
    "Leave it out; quantization_bit: 4 or 8 needs the least memory.",
    off=(*_NOT_OFF, "bnb", "bitsandbytes", "nf4"),
)

REFUSED: dict[str, Foreign] = {
    **_same("quantization_method quantization_type fp8 fp8_backend", _QUANTIZED),
    "enable_fsdp_float8_all_gather": _QUANTIZED,
    "double_quantization": Foreign(_QUANTIZED.why, "Leave it out.", off=(True,)),
    "quantization_device_map": Foreign(
        "A model is on one device here.", "Leave it out; quantization_bit: 4 needs least memory.", off=("",)),
    "fp16": Foreign("Half precision without a loss scale is not offered.", "Set bf16: true."),
    **_same("use_dora use_rslora pissa_init loraplus_lr_ratio additional_target", _OTHER_LORA),
    **_same("use_galore use_apollo use_badam use_adam_mini use_muon use_llama_pro", _OTHER_LORA),
    **_same("shift_attn mixture_of_depths rope_scaling train_from_scratch freeze_gate", Foreign(
        "The model is taken as it was given.", "Leave it out, or change the model's own files.")),
    **_same("use_dft_loss use_asft_loss use_eaft_loss", _OTHER_LOSS),
    **_same("neftune_noise_alpha label_smoothing_factor", _OTHER_LOSS),
    "train_on_prompt": Foreign(
        "Losses, gradients and scores are those of the responses.", "Leave it out; mask_history narrows it."),
    **_same("resize_vocab add_tokens add_special_tokens new_special_tokens_config", _TOKENS),
    **_same("mix_strategy interleave_probs static_mix mixture_sample_rule init_mixture_proportions", _SHARES),
    "mixer_eval_dataset": _SHARES,
    "lr_scheduler_kwargs": Foreign(
        "Schedules take nothing but the horizon and warmup_ratio.", "Leave it out.", off=({}, "")),
    **_same("fsdp fsdp_config", Foreign(
        "Several processes train under DDP or DeepSpeed.", "Set deepspeed, or start torchrun without it.",
        off=(False, "", [], {}))),
    "train_step": Foreign(
        "The length of a run is warmup_step + update_step x update_times.", "Set update_step."),
}  # fmt: skip

RENAMED: dict[str, str] = {
    "moe_aux_loss_coef": "router_aux_loss_coef",
    "early_stopping_patience": "early_stopping_steps",
    "early_stopping_threshold": "early_stopping_min_delta",
    "evaluation_strategy": "eval_strategy",
}
"""Keys of LLaMA-Factory and transformers that mean the same as one of another name here."""

ATTENTION: dict[Any, str | None] = {
    "auto": None,
    "disabled": "eager",
    "off": "eager",
    False: "eager",
    "sdpa": "sdpa",
    "fa2": "flash_attention_2",
    True: "flash_attention_2",
    "fa3": "flash_attention_3",
}
"""Value of ``flash_attn`` -> ``attn_implementation``; None for transformers' own choice."""
