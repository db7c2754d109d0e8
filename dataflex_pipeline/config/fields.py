"""Every key of the run configuration: type, default, range and meaning.

The keys are flat and carry the names that users of LLaMA-Factory and DataFlex know; each description
is what ``dataflex init`` writes beside the key. A field's *role* says what a change of it means:

- ``run``: part of what a run is (model, data, horizon, optimizer); fixed once the warm-up started.
- ``selection``: how a round scores and selects; may differ from round to round.
- ``runtime``: where and how fast things run; never changes a result, may change at any time.
"""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from dataflex_pipeline.config.candidates import CandidateRule, candidate_rule
from dataflex_pipeline.config.keys import MOST_WORKERS, CountOrAuto, Role, key

DEMO = "demo"
"""In place of the name of a model or data set: those that are embedded."""


class Config(BaseModel):
    """The resolved configuration of a run; immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    # model
    model_name_or_path: str = key(
        DEMO, "folder or hub name of a causal LM; demo: the embedded small model", "run", "model"
    )
    model_revision: str | None = key(None, "branch, tag or commit of a hub model", "run", "model")
    adapter_name_or_path: str | None = key(
        None, "folder of a LoRA adapter to start from instead of a fresh one", "run", "model"
    )
    trust_remote_code: bool = key(
        False, "run Python code that comes with a hub model; only for models that you trust", "run", "model"
    )
    finetuning_type: Literal["lora", "full"] = key(
        "lora", "train a LoRA adapter or all weights", "run", "model"
    )
    lora_rank: int = key(8, "LoRA rank r", "run", "model", ge=1, le=65_536)
    lora_alpha: int | None = key(None, "LoRA alpha; by default twice the rank", "run", "model", ge=1)
    lora_dropout: float = key(0.0, "dropout inside LoRA during training", "run", "model", ge=0.0, lt=1.0)
    lora_target: str = key(
        "all",
        "all (every linear layer but the head that an adapter can go on), or comma-separated module names",
        "run",
        "model",
    )
    bf16: bool | Literal["auto"] = key(
        "auto",
        "load and train in bfloat16; auto: where the accelerator has it when the run begins; on a CPU true "
        "becomes fp32, and says so",
        "run",
        "model",
    )
    tf32: bool | None = key(
        None,
        "multiply fp32 matrices with 10-bit mantissas on NVIDIA GPUs (Ampere and newer), about 5 times as "
        "fast; by default not",
        "run",
        "model",
    )
    quantization_bit: Literal[4, 8] | None = key(
        None,
        "load the base model in 4 bits (nf4, double quantization) or 8 bits (int8) by bitsandbytes and train "
        "LoRA on it",
        "run",
        "model",
    )
    attn_implementation: str | None = key(
        None, "attention kernel: eager, sdpa, flash_attention_2; by default by transformers", "run", "model"
    )

    # data
    dataset: str = key(
        DEMO,
        "the pool: files, folders, entries of dataset_info.json or hub names, comma-separated; "
        "demo: the embedded corpus",
        "run",
        "data",
    )
    eval_dataset: str | None = key(
        None,
        "the target set, given like dataset; methods select towards it; first_100 (or any number): "
        "so many rows from the start of the pool",
        "run",
        "data",
    )
    test_dataset: str | None = key(
        None,
        "rows held out for `dataflex evaluate`, given like dataset; without it, the target is evaluated on",
        "runtime",
        "data",
    )
    dataset_dir: str = key(
        "data", "folder of dataset_info.json and of data sets named without a folder", "run", "data"
    )
    template: str | None = key(
        None,
        "chat template by name (dataflex methods --templates lists them); by default the tokenizer's own",
        "run",
        "data",
    )
    default_system: str | None = key(None, "system prompt for rows that have none", "run", "data")
    cutoff_len: int = key(2048, "tokens kept of a row; what is over is cut at the end", "run", "data", ge=2)
    max_samples: int | None = key(None, "rows taken of each data set, from its start", "run", "data", ge=1)
    mask_history: bool = key(False, "loss on the last assistant turn only", "run", "data")
    data_columns: dict[str, str] = key(
        {}, "names of unusual columns: {prompt: question, response: answer, ...}", "run", "data"
    )
    data_tags: dict[str, str] = key(
        {}, "unusual sharegpt tags: {role_tag: speaker, user_tag: visitor, ...}", "run", "data"
    )
    eval_group_column: str | None = key(
        None, "column of the target set that names each row's group; by default its data set", "run", "data"
    )
    preprocessing_num_workers: int | None = key(
        None,
        "processes that tokenize; by default one per core, at most 8",
        "runtime",
        "data",
        ge=1,
        le=MOST_WORKERS,
    )
    dataloader_num_workers: int = key(
        0, "worker processes of the training data loader", "runtime", "data", ge=0, le=MOST_WORKERS
    )

    # rounds
    warmup_step: int = key(
        20,
        "optimizer steps of the warm-up (round 0); 0: none, round 0 is the model as it is given",
        "run",
        "rounds",
        ge=0,
    )
    update_step: int = key(
        20, "optimizer steps of every round; 0: nothing is trained on what is selected", "run", "rounds", ge=0
    )
    update_times: int = key(
        5,
        "rounds after the warm-up; the horizon of the learning-rate schedule; 0: score and select only",
        "run",
        "rounds",
        ge=0,
    )
    num_train_epochs: float | None = key(
        None,
        "passes over the pool in place of update_step: so many steps, shared out over the rounds once the "
        "pool is counted",
        "run",
        "rounds",
        gt=0.0,
        le=1_000_000.0,
    )
    component_name: str = key(
        "loss", "the method that scores the pool: dataflex methods lists them", "selection", "rounds"
    )
    components_cfg_file: str | None = key(
        None,
        "YAML file with every method's parameters; by default the shipped components.yaml",
        "selection",
        "rounds",
    )
    methods: dict[str, dict[str, Any]] = key(
        {},
        "parameters of methods, over those of components_cfg_file: {loss: {focus: low}}",
        "selection",
        "rounds",
    )
    candidates: dict[str, str | float | int] = key(
        {},
        "a cheaper method scores all rows first, and the method only its best: "
        "{method: near, fraction: 0.1}, or num_samples in place of fraction",
        "selection",
        "rounds",
    )

    # selection
    strategy: Literal["sample", "top_k", "round_robin"] | None = key(
        None, "how scores become an index; by default the method's own", "selection", "selection"
    )
    round_robin_over: Literal["groups", "target_rows"] | None = key(
        None,
        "what takes turns in strategy: round_robin; by default groups where there is more than one",
        "selection",
        "selection",
    )
    num_samples: int | None = key(
        None, "rows to select; by default update_step x global_batch", "selection", "selection", ge=1
    )
    fraction: float | None = key(
        None, "share of the valid rows to select", "selection", "selection", gt=0.0, le=1.0
    )
    token_budget: int | None = key(
        None, "tokens to select, counted over whole rows", "selection", "selection", ge=1
    )
    replacement: bool | None = key(
        None,
        "draw with replacement; by default the method's own parameter, else without",
        "selection",
        "selection",
    )
    weights: Literal["uniform", "importance", "probability"] = key(
        "uniform", "loss weight of a selected row", "selection", "selection"
    )
    source_quotas: dict[str, float] = key(
        {},
        "share of the selected rows per source, {name: share}; the shares sum to at most 1",
        "selection",
        "selection",
    )
    balanced: Literal["source"] | None = key(
        None,
        "source: the same number of selected rows from every source; by default as the scores have it",
        "selection",
        "selection",
    )
    max_similarity: float | None = key(
        None,
        "pass over a row whose embedding has a higher cosine with that of a row already taken",
        "selection",
        "selection",
        gt=0.0,
        le=1.0,
    )
    similarity: dict[str, str | float | int] = key(
        {},
        "the embeddings that max_similarity compares, {embed_model: ..., embed_text: prompt, ...} as for "
        "near; by default those of the method, or of what chooses its candidates, else near's defaults",
        "selection",
        "selection",
    )
    disable_shuffling: bool = key(
        False,
        "keep the order of selection (best or first drawn first) instead of a seeded shuffle",
        "selection",
        "selection",
    )

    order: Literal["shuffled", "ascending", "descending", "folded"] = key(
        "shuffled",
        "order of a round's rows in training: shuffled, or by score in every pass over them: ascending, "
        "descending, or folded (from low to high three times over, each time with every third row)",
        "selection",
        "selection",
    )

    # training
    per_device_train_batch_size: int = key(8, "rows per process and forward pass", "run", "training", ge=1)
    gradient_accumulation_steps: int = key(1, "forward passes per optimizer step", "run", "training", ge=1)
    learning_rate: float = key(1e-4, "peak learning rate", "run", "training", gt=0.0, le=100.0)
    lr_scheduler_type: str = key(
        "cosine", "learning-rate schedule over the horizon: cosine, linear, constant, ...", "run", "training"
    )
    warmup_ratio: float = key(
        0.0, "share of the horizon over which the learning rate rises", "run", "training", ge=0.0, le=1.0
    )
    weight_decay: float = key(0.0, "AdamW weight decay", "run", "training", ge=0.0, le=100.0)
    adam_beta1: float = key(0.9, "AdamW beta1", "run", "training", ge=0.0, lt=1.0)
    adam_beta2: float = key(0.999, "AdamW beta2", "run", "training", ge=0.0, lt=1.0)
    adam_epsilon: float = key(1e-8, "AdamW epsilon", "run", "training", ge=1e-37)
    max_grad_norm: float = key(1.0, "gradient clipping; 0: off", "run", "training", ge=0.0)
    router_aux_loss_coef: float | None = key(
        None,
        "factor of the load-balancing loss that is added when a mixture of experts is trained; "
        "by default the model's own, 0: none",
        "run",
        "training",
        ge=0.0,
    )
    gradient_checkpointing: bool | Literal["auto"] = key(
        "auto",
        "recompute activations to save memory; auto: in training on an accelerator, and where a step would "
        "not fit without",
        "runtime",
        "training",
    )
    seed: int = key(
        42,
        "the one seed; every consumer derives its own stream from it",
        "run",
        "training",
        ge=0,
        le=2**32 - 1,
    )
    logging_steps: int = key(
        5,
        "steps between two lines of the training log; with eval_strategy: steps and no eval_steps also "
        "between evaluations, and then fixed for the run",
        "runtime",
        "training",
        ge=1,
    )
    save_steps: int | None = key(
        None, "steps between checkpoints inside a round; by default only its end", "runtime", "training", ge=1
    )
    keep_checkpoints: bool = key(
        False,
        "keep the checkpoints of save_steps when their round ends (weights and optimizer states each), "
        "for less.checkpoints: all",
        "runtime",
        "training",
    )
    plot_loss: bool = key(False, "write a PNG of the training loss after every round", "runtime", "training")
    report_to: str = key(
        "none",
        "none, tensorboard, wandb, swanlab, mlflow or trackio; several comma-separated",
        "runtime",
        "training",
    )
    run_name: str | None = key(None, "name shown by the tracker of report_to", "runtime", "training")
    use_swanlab: bool = key(False, "the same as report_to: swanlab", "runtime", "training")
    swanlab_project: str | None = key(None, "SwanLab project", "runtime", "training")
    swanlab_workspace: str | None = key(None, "SwanLab workspace", "runtime", "training")
    swanlab_run_name: str | None = key(None, "SwanLab experiment name", "runtime", "training")
    swanlab_mode: str | None = key(None, "SwanLab mode: cloud or local", "runtime", "training")
    swanlab_logdir: str | None = key(None, "folder of SwanLab's own logs", "runtime", "training")
    swanlab_api_key: str | None = key(
        None, "SwanLab key (never written to disk)", "runtime", "training", repr=False
    )
    swanlab_lark_webhook_url: str | None = key(
        None, "Lark webhook (never written to disk)", "runtime", "training", repr=False
    )
    swanlab_lark_secret: str | None = key(
        None, "Lark secret (never written to disk)", "runtime", "training", repr=False
    )
    deepspeed: str | None = key(None, "DeepSpeed configuration file (JSON)", "runtime", "training")
    ddp_timeout: int = key(
        1800, "seconds until a silent process group gives up", "runtime", "training", ge=1, le=10**9
    )

    # evaluation on the target
    per_device_eval_batch_size: int = key(
        8, "rows per process when evaluating", "runtime", "evaluation", ge=1
    )
    eval_strategy: Literal["no", "steps", "epoch"] = key(
        "no",
        "evaluate on the target: no, every eval_steps, or at the end of each round (epoch)",
        "run",
        "evaluation",
    )
    eval_steps: int | None = key(
        None, "steps between evaluations; by default logging_steps", "run", "evaluation", ge=1
    )
    metric_for_best_model: str = key(
        "eval_loss", "what names the best checkpoint: eval_loss or eval_token_accuracy", "run", "evaluation"
    )
    greater_is_better: bool | None = key(
        None, "whether a larger metric is better; by default not for a loss", "run", "evaluation"
    )
    load_best_model_at_end: bool = key(
        False,
        "keep the best checkpoint in best/ for export; scoring always takes the last",
        "run",
        "evaluation",
    )
    early_stopping_steps: int | None = key(
        None,
        "evaluations (not steps) without improvement after which the run ends, counted over rounds",
        "run",
        "evaluation",
        ge=1,
    )
    early_stopping_min_delta: float = key(
        0.0, "least improvement that counts for early stopping", "run", "evaluation", ge=0.0
    )

    # scoring
    device: str = key("auto", "auto, cpu, cuda, cuda:N, xpu, npu or mps", "runtime", "scoring")
    score_batch_tokens: CountOrAuto = key(
        "auto",
        "padded tokens per scoring batch; auto: as the memory has room for, up to 16384 (32768 on a GPU)",
        "runtime",
        "scoring",
    )
    rows_per_part: CountOrAuto = key(
        "auto",
        "rows per part of a feature: the unit of resume; auto: up to 1024, fewer where they take long",
        "runtime",
        "scoring",
    )

    # where
    runs_dir: str = key("runs", "folder that holds the runs", "runtime", "run folder")
    output_dir: str | None = key(
        None, "the run folder itself; by default runs_dir/<run name>", "runtime", "run folder"
    )
    features_dir: str | None = key(
        None,
        "folder of features (losses, gradients, embeddings, ...) that several runs share; by default each "
        "run keeps its own",
        "runtime",
        "run folder",
    )
    export_dir: str | None = key(None, "folder that export writes to", "runtime", "run folder")
    export_size: int = key(5, "GB per exported weight file", "runtime", "run folder", ge=1)
    export_device: Literal["cpu", "auto"] = key(
        "cpu", "device that export merges on", "runtime", "run folder"
    )

    @property
    def target_head(self) -> int | None:
        """Rows from the start of the pool that are the target, where ``eval_dataset`` is first_<number>."""
        match = re.fullmatch(r"first_([1-9][0-9]*)", self.eval_dataset or "")
        return None if match is None else int(match[1])

    def candidates_of(self, method: str) -> CandidateRule | None:
        """Return how the candidates of a method are chosen; None where it scores every row.

        So does the method that chooses them.
        """
        rule = candidate_rule(self.candidates)
        return None if rule is None or rule.method == method else rule

    @property
    def horizon(self) -> int:
        """Optimizer steps of the whole run: the warm-up and every round."""
        return self.warmup_step + self.update_step * self.update_times

    @property
    def trains_rounds(self) -> bool:
        """Whether rounds are trained on what is selected for them, not only scored."""
        return bool(self.update_step and self.update_times)

    @property
    def first_round(self) -> int:
        """The first round that is trained: the warm-up, or the one after it where there is none."""
        return 0 if self.warmup_step else 1

    @property
    def last_round(self) -> int:
        """The last round that can be scored: without training after it, the first is also the last."""
        return self.update_times if self.trains_rounds else 1


SECRETS = ("swanlab_api_key", "swanlab_lark_webhook_url", "swanlab_lark_secret")


def role_of(name: str) -> Role:
    """Return what a change of this key means: run, selection or runtime."""
    return _extra(name)["role"]  # type: ignore[no-any-return]


def group_of(name: str) -> str:
    """Return the section that a key is shown in."""
    return str(_extra(name)["group"])


def _extra(name: str) -> dict[str, Any]:
    extra = Config.model_fields[name].json_schema_extra
    assert isinstance(extra, dict)  # noqa: S101 (key() always sets it)
    return extra
