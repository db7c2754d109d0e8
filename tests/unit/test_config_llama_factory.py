"""A plain LLaMA-Factory file for fine-tuning loads as a selection, and what it cannot have here is said."""

import pytest
from config_refusal import refused

from dataflex_pipeline.config import llama_factory
from dataflex_pipeline.config.fields import Config
from dataflex_pipeline.config.llama_factory import ATTENTION, PASSED_OVER, REFUSED, RENAMED
from dataflex_pipeline.config.load import load_config
from dataflex_pipeline.config.peer import _TAKEN, FIXED, HINTS, IGNORED

SFT = """
    model_name_or_path: ./model
    trust_remote_code: false
    flash_attn: fa2
    stage: sft
    do_train: true
    finetuning_type: lora
    lora_rank: 8
    lora_target: all
    dataset: identity,notes
    template: llama3
    cutoff_len: 2048
    max_samples: 1000
    packing: false
    overwrite_cache: true
    preprocessing_num_workers: 16
    dataloader_num_workers: 4
    output_dir: saves/sft
    logging_steps: 10
    save_steps: 500
    plot_loss: true
    overwrite_output_dir: true
    save_only_model: false
    report_to: none
    per_device_train_batch_size: 1
    gradient_accumulation_steps: 8
    learning_rate: 1.0e-4
    num_train_epochs: 3.0
    lr_scheduler_type: cosine
    warmup_ratio: 0.1
    bf16: true
    gradient_checkpointing: true
    ddp_timeout: 180000000
    resume_from_checkpoint: null
    val_size: 0.1
    per_device_eval_batch_size: 1
    eval_strategy: steps
    eval_steps: 500
"""


def test_a_plain_file_for_fine_tuning(write):
    loaded = load_config(write(SFT, "sft.yaml"), [])
    config = loaded.config
    assert (config.num_train_epochs, config.attn_implementation) == (3.0, "flash_attention_2")
    assert (config.eval_strategy, config.eval_dataset, config.gradient_checkpointing) == ("no", None, True)
    assert (config.warmup_step, config.update_step, config.update_times) == (
        Config().warmup_step,
        Config().update_step,
        Config().update_times,
    )
    said = {line.partition(" ")[0].rstrip(":") for line in loaded.notices}
    assert said == {
        "flash_attn",
        "overwrite_cache",
        "overwrite_output_dir",
        "val_size",
        "eval_strategy",
        "eval_steps",
    }
    assert len(loaded.notices) == 6  # one line each
    (split,) = [line for line in loaded.notices if line.startswith("val_size")]
    assert "sft.yaml, line 35" in split
    assert "eval_dataset" in split


def test_evaluation_stays_where_there_are_rows_for_it(write):
    path = write(SFT, "sft.yaml")
    loaded = load_config(path, ["eval_dataset=target.json", "load_best_model_at_end=true"])
    assert (loaded.config.eval_strategy, loaded.config.eval_steps) == ("steps", 500)
    alone = load_config(path, ["load_best_model_at_end=true", "early_stopping_steps=3"])
    assert (alone.config.load_best_model_at_end, alone.config.early_stopping_steps) == (False, None)
    (said,) = [line for line in alone.notices if line.startswith("eval_strategy")]
    assert said.startswith("eval_strategy, load_best_model_at_end, early_stopping_steps have no effect: ")


# ---------------------------------------------------------------- every key, one by one


def test_every_foreign_key_has_one_meaning():
    tables = [
        *map(set, (PASSED_OVER, REFUSED, RENAMED, FIXED, IGNORED)),
        set(_TAKEN),
        set(Config.model_fields),
    ]
    for number, table in enumerate(tables):
        for other in tables[number + 1 :]:
            assert not table & other
    assert not set(HINTS) & set().union(*tables[:5], tables[-1])


@pytest.mark.parametrize("name", sorted(PASSED_OVER))
def test_what_has_no_meaning_is_said_once_and_changes_nothing(name):
    value = "a_word"
    loaded = load_config(None, [f"{name}={value}"], {})
    assert loaded.config == Config()
    (said,) = loaded.notices
    assert said.startswith(name)
    assert "(command line) has no effect: " in said
    assert PASSED_OVER[name].why in said
    assert (value in said) != name.endswith("_token")
    assert load_config(None, [f"{name}=null"], {}).notices == ()


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_would_change_the_result_is_refused(name):
    error = refused(None, [f"{name}=4"], {})
    assert error.what == f"{name}: 4 (command line) cannot be used here."
    assert (error.why, error.fix) == (REFUSED[name].why, REFUSED[name].fix)
    assert load_config(None, [f"{name}=null"], {}).notices == ()


@pytest.mark.parametrize(
    "text",
    [
        "packing=false",
        "neat_packing=false",
        "val_size=0",
        "val_size=0.0",
        "resume_from_checkpoint=false",
        "resume_from_checkpoint=",
        "quantization_bit=null",
        "fp16=false",
        "pure_bf16=false",
        "use_dora=false",
        "push_to_hub=false",
        "streaming=false",
        "torch_compile=false",
        "enable_liger_kernel=false",
        "optim=adamw_torch",
        "save_strategy=steps",
        "warmup_steps=0",
        "max_steps=-1",
        "train_step=0",
        "label_smoothing_factor=0",
        "mix_strategy=concat",
        "do_eval=true",
        "do_predict=false",
        "use_fast_tokenizer=true",
        "component_overrides={}",
    ],
)
def test_what_asks_for_nothing_is_taken_without_a_word(text):
    loaded = load_config(None, [text], {})
    assert (loaded.config, loaded.notices) == (Config(), ())


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("flash_attn=fa2", "attn_implementation", "flash_attention_2"),
        ("flash_attn=fa3", "attn_implementation", "flash_attention_3"),
        ("flash_attn=sdpa", "attn_implementation", "sdpa"),
        ("flash_attn=disabled", "attn_implementation", "eager"),
        ("flash_attn=off", "attn_implementation", "eager"),
        ("flash_attn=true", "attn_implementation", "flash_attention_2"),
        ("flash_attn=auto", "attn_implementation", None),
        ("pure_bf16=true", "bf16", True),
        ("disable_gradient_checkpointing=false", "gradient_checkpointing", True),
        ("disable_gradient_checkpointing=true", "gradient_checkpointing", False),
        ("warmup_steps=0.25", "warmup_ratio", 0.25),
        ("moe_aux_loss_coef=0.01", "router_aux_loss_coef", 0.01),
        ("early_stopping_threshold=0.0", "early_stopping_min_delta", 0.0),
        ("resume_from_checkpoint=true", "seed", 42),
    ],
)
def test_what_has_another_name_here_is_said(text, key, value):
    loaded = load_config(None, [text], {})
    assert getattr(loaded.config, key) == value
    (said,) = loaded.notices
    assert said.startswith(text.partition("=")[0])


def test_a_key_of_ours_beside_a_foreign_one_counts(write):
    loaded = load_config(write("flash_attn: fa2\nattn_implementation: sdpa\n"), [])
    assert loaded.config.attn_implementation == "sdpa"
    assert loaded.notices == (
        "flash_attn: fa2 (run.yaml, line 1) is not used: attn_implementation is set beside it",
    )


def test_an_older_name_of_the_strategy(write):
    config = load_config(write("evaluation_strategy: no\n"), []).config
    assert config.eval_strategy == "no"
    config = load_config(write("evaluation_strategy: steps\neval_dataset: t.json\n"), []).config
    assert config.eval_strategy == "steps"


@pytest.mark.parametrize("value", ["fa9", "3", "[1]"])
def test_attention_that_is_not_known(value):
    error = refused(None, [f"flash_attn={value}"], {})
    assert error.why == f"It takes {', '.join(key for key in ATTENTION if isinstance(key, str))}."


@pytest.mark.parametrize("text", ["warmup_steps=100", "max_steps=500", "resume_from_checkpoint=saves/x"])
def test_what_needs_another_number_is_refused_with_a_hint(text):
    name = text.partition("=")[0]
    assert refused(None, [text], {}).fix == HINTS[name]


def test_parameters_beside_the_component(write):
    path = write("component_name: less\ncomponent_overrides: {proj_dim: 64}\n")
    loaded = load_config(path, [])
    assert loaded.config.methods == {"less": {"proj_dim": 64}}
    assert loaded.notices == ("component_overrides (run.yaml, line 2) is taken as parameters of less",)
    assert "component_name" in refused(write("component_overrides: {proj_dim: 64}\n")).fix


def test_a_slip_of_the_pen_is_told_from_a_foreign_key():
    assert "Did you mean 'neat_packing'?" in refused(None, ["neat_packin=true"], {}).what


def test_the_reasons_are_sentences():
    for rule in (*PASSED_OVER.values(), *REFUSED.values()):
        assert not rule.why.startswith(" ")
        assert rule.why.endswith(".") == bool(rule.fix)  # a clause of a notice, or a sentence of an error
    assert llama_factory.Foreign("x").is_off(False)
    assert llama_factory.Foreign("x").is_off(0.0)
    assert not llama_factory.Foreign("x").is_off(True)
    assert not llama_factory.Foreign("x", off=(1,)).is_off(True)


# ---------------------------------------------------------------- steps or epochs


def test_steps_win_over_epochs_and_it_is_said(write):
    loaded = load_config(write("num_train_epochs: 3.0\nupdate_step: 7\n"), [])
    assert (loaded.config.num_train_epochs, loaded.config.update_step) == (None, 7)
    (said,) = loaded.notices
    assert said.startswith(
        "num_train_epochs: 3.0 (run.yaml, line 1) is not used: update_step: 7 (run.yaml, line 2)"
    )
    loaded = load_config(write("num_train_epochs: 3.0\n"), ["update_step=9"])
    assert (loaded.config.num_train_epochs, loaded.config.update_step) == (None, 9)
    assert len(loaded.notices) == 1


def test_one_epoch_beside_steps_is_what_the_steps_say(write):
    loaded = load_config(write("num_train_epochs: 1.0\nupdate_step: 7\n"), [])
    assert (loaded.config.num_train_epochs, loaded.notices) == (None, ())


@pytest.mark.parametrize("value", ["0", "-1", "true", "many"])
def test_epochs_that_are_none(value):
    assert "a number above 0" in refused(None, [f"num_train_epochs={value}"], {}).why


def test_a_runs_own_record_holds_both():
    base = {"num_train_epochs": 3.0, "update_step": 71, "warmup_step": 20}
    loaded = load_config(None, [], base)
    assert (loaded.config.num_train_epochs, loaded.config.update_step, loaded.notices) == (3.0, 71, ())
    again = load_config(None, ["num_train_epochs=4"], base)
    assert (again.config.num_train_epochs, again.sources["update_step"]) == (4.0, "default")
    steps = load_config(None, ["update_step=5"], base)
    assert (steps.config.num_train_epochs, steps.config.update_step, steps.notices) == (None, 5, ())
