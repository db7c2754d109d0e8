"""The base model kept between features: the numbers of a fresh load, one copy of the weights, few loads."""

from __future__ import annotations

import gc
import importlib.util
import weakref

import pytest
import torch
from tiny_training import VOCABULARY, Listener, make_config, make_model, make_pool, save_tokenizer

from dataflex_pipeline import Run, api
from dataflex_pipeline.errors import UserError
from dataflex_pipeline.features.embedding_params import VectorParams
from dataflex_pipeline.features.gradients import Gradients
from dataflex_pipeline.features.losses import Losses
from dataflex_pipeline.features.model_embeddings import ModelEmbeddings
from dataflex_pipeline.generate import Prompt
from dataflex_pipeline.generate.settings import GenerationSettings
from dataflex_pipeline.generate.transformers import TransformersGenerator
from dataflex_pipeline.models import base
from dataflex_pipeline.models.adapters import wrap_for_training
from dataflex_pipeline.models.beside import ModelBeside
from dataflex_pipeline.models.one_base import let_go, one_base
from dataflex_pipeline.models.tokenizer import load_tokenizer

SMALL = {"warmup_step": 1, "update_step": 1, "update_times": 2, "per_device_train_batch_size": 10}
SMALL |= {"gradient_accumulation_steps": 1, "lora_rank": 2}


def make_moe(folder):
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 16}
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY, num_key_value_heads=1, max_position_embeddings=64, **sizes, **experts
    )
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    return save_tokenizer(folder)


MODELS = {
    "llama": make_model,
    "tied": lambda folder: make_model(folder, tied=True),
    "experts": make_moe,
}


@pytest.fixture(scope="module")
def models(one_thread, tmp_path_factory):
    top = tmp_path_factory.mktemp("models")
    return {name: make(top / name) for name, make in MODELS.items()}


@pytest.fixture
def loads(monkeypatch):
    """The folders that weights were loaded from, in order."""
    found, load = [], base._load

    def counted(source, *args, **more):
        found.append(source)
        return load(source, *args, **more)

    monkeypatch.setattr(base, "_load", counted)
    return found


def adapter(config, folder, seed, **more):
    """Save an adapter of random numbers."""
    wrapped = wrap_for_training(config.model_copy(update=more), base.load_base(config, "cpu"), seed)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    wrapped.save_pretrained(folder)
    return folder


SKETCH = Gradients.Params(projection="countsketch", proj_dim=32, seed=1, side="sgd")
HIDDEN = VectorParams(method="model", text="chat_template")


def computed(feature, pool, checkpoint, say=None):
    """Return a feature's table of all rows, from a model that is opened for it."""
    given = api.FeatureInput(pool, pool.fingerprint, checkpoint, str(checkpoint))
    with feature.open(given, say or api.Silent()) as compute:
        return compute(pool.rows(0, pool.n_rows, [n for n in feature.input_columns if n != "group"]))


def drawn(config, checkpoint):
    """Return tokens and their log-probabilities of a few completions."""
    settings = GenerationSettings(6, 1.0, end_ids=(2,), context=64, batch=4, tokenizer=load_tokenizer(config))
    prompts = [Prompt([3, 4 + place], place) for place in range(4)]
    with TransformersGenerator(config, checkpoint, settings) as generator:
        return [(each.token_ids, each.logprob) for each in generator.generate(prompts)]


def features(config, pool, first, second):
    """Return what features of a model give, one after the other: at two checkpoints, and at both again."""
    saving = config.model_copy(update={"gradient_checkpointing": True})
    steps = [
        lambda: computed(Losses(Losses.Params(), config), pool, first),
        lambda: computed(Gradients(SKETCH, saving), pool, second),
        lambda: computed(Losses(Losses.Params(), config), pool, None),
        lambda: drawn(config, second),
        lambda: computed(Gradients(SKETCH, config), pool, first),
        lambda: computed(Gradients(SKETCH, config), pool, None),
        lambda: computed(ModelEmbeddings(HIDDEN, config), pool, second),
        lambda: computed(Losses(Losses.Params(), config), pool, first),
        lambda: computed(Gradients(SKETCH, config), pool, second),
    ]
    return [step() for step in steps]


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    return make_pool(tmp_path_factory.mktemp("pool") / "pool", rows=12)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_features_one_after_the_other_are_those_of_fresh_loads(name, models, pool, loads, tmp_path):
    config = make_config(models[name])
    places = [adapter(config, tmp_path / str(seed), seed) for seed in (1, 2)]
    loads.clear()
    fresh = features(config, pool, *places)
    assert len(loads) == len(fresh)
    loads.clear()
    with one_base():
        assert features(config, pool, *places) == fresh
    assert loads == [str(models[name])]
    assert fresh[0] != fresh[2], "the adapters do not matter"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "tied"])
def test_all_weights_of_a_checkpoint_are_its_own(name, models, pool, loads, tmp_path):
    config = make_config(models[name], finetuning_type="full")
    other = make_model(tmp_path / "other", seed=1, tied=name == "tied")
    fresh = features(config, pool, other, other)
    with one_base():
        loads.clear()
        assert features(config, pool, other, other) == fresh
        kinds = [place == str(models[name]) for place in loads]
    assert kinds == [False, False, True, False, False, True, False, False, False]
    loads.clear()
    with one_base():  # the model as it was given is one, too
        for _ in range(2):
            assert computed(Gradients(SKETCH, config), pool, None) == fresh[5]
            assert computed(Losses(Losses.Params(), config), pool, None) == fresh[2]
    assert loads == [str(models[name])]


@pytest.mark.slow
def test_an_adapter_with_numbers_for_the_base_ends_it(models, pool, loads, tmp_path):
    """The weights of a norm, say, or biases: an adapter may bring them, and writes them into the base."""
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Qwen2Config(vocab_size=VOCABULARY, num_key_value_heads=1, **sizes)
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "model")
    config = make_config(save_tokenizer(tmp_path / "model"))
    lora = LoraConfig(r=2, target_modules=["q_proj"], bias="all", task_type="CAUSAL_LM")
    wrapped = get_peft_model(base.load_base(config, "cpu"), lora)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    wrapped.save_pretrained(tmp_path / "adapter")
    losses = Losses(Losses.Params(), config)
    before = computed(losses, pool, None), computed(losses, pool, tmp_path / "adapter")
    loads.clear()
    with one_base():
        for _ in range(2):
            assert computed(losses, pool, None) == before[0]
            assert computed(losses, pool, tmp_path / "adapter") == before[1]
    assert before[0] != before[1]
    assert len(loads) == 2  # the second round of it


def test_nothing_is_left_on_the_model(models, pool, tmp_path):
    config = make_config(models["llama"], lora_dropout=0.5)
    place = adapter(config, tmp_path / "adapter", 1)

    def state():
        model = base.base_for_scoring(config, "cpu")
        hooks = [
            (name, len(each._forward_hooks), len(each._forward_pre_hooks), "forward" in vars(each))
            for name, each in model.named_modules()
        ]
        flags = [(name, each.requires_grad, each.grad) for name, each in model.named_parameters()]
        return hooks, flags, model.training, model.is_gradient_checkpointing, str(model.config), str(model)

    expected = state()
    with one_base():
        assert state() == expected
        model = base.load_for_scoring(config, place, "cpu")
        model.get_base_model().gradient_checkpointing_enable()
        model.train().requires_grad_(True)
        model.get_base_model().config.use_cache = False
        model(input_ids=torch.tensor([[3, 4, 5]])).logits.sum().backward()
        model.get_base_model().lm_head.register_forward_hook(lambda *_: None)
        assert state() == expected


@pytest.mark.slow
def test_one_copy_of_the_weights_at_any_time(models, pool, tmp_path, monkeypatch):
    config = make_config(models["llama"])
    place, other = adapter(config, tmp_path / "adapter", 1), models["tied"]
    alive, load = [], base._load

    def watched(*args, **more):
        gc.collect()
        assert not any(each() is not None for each in alive), "another model's weights are still there"
        found = load(*args, **more)
        alive.extend(weakref.ref(parameter) for parameter in found.model.parameters())
        return found

    monkeypatch.setattr(base, "_load", watched)
    weights = sum(each.numel() for each in base.load_base(config, "cpu").parameters())
    gc.collect()
    assert not any(each() is not None for each in alive)
    with one_base():
        for checkpoint in (None, place):
            computed(Losses(Losses.Params(), config), pool, checkpoint)
            gc.collect()
            assert sum(each().numel() for each in alive if each() is not None) == weights
        ModelBeside(str(other), None, "score_model", config).load("cpu")
        computed(Gradients(SKETCH, config), pool, place)
        base.load_full(config, other, "cpu")
        base.load_base(config, "cpu")
        computed(Losses(Losses.Params(), config), pool, None)
        let_go()
        gc.collect()
        assert not any(each() is not None for each in alive)
        computed(Losses(Losses.Params(), config), pool, None)
    gc.collect()
    assert not any(each() is not None for each in alive)


def test_other_settings_load_anew_and_what_loading_says_is_said_each_time(models, loads, tmp_path):
    from safetensors.torch import load_file, save_file

    make_model(tmp_path / "more")
    path = tmp_path / "more" / "model.safetensors"
    save_file(load_file(path) | {"model.odd": torch.ones(2)}, path, {"format": "pt"})
    config = make_config(tmp_path / "more")
    eager = config.model_copy(update={"attn_implementation": "eager"})
    with one_base():
        for settings, count in ((config, 1), (config, 1), (eager, 2), (eager, 2), (config, 3)):
            listener = Listener()
            model = base.base_for_scoring(settings, "cpu", listener.say)
            assert len(loads) == count
            assert model.config._attn_implementation == ("eager" if settings is eager else "sdpa")
            assert [line for line in listener.lines if "model.odd" in line] == listener.lines != []


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_models(bits, pool, loads, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes)).save_pretrained(tmp_path / "model")
    config = make_config(save_tokenizer(tmp_path / "model"), quantization_bit=bits)
    places = [adapter(config, tmp_path / str(seed), seed) for seed in (1, 2)]
    fresh = features(config, pool, *places)
    loads.clear()
    with one_base():
        assert features(config, pool, *places) == fresh
    assert len(loads) == (1 if bits == 4 else len(fresh))


def settings_of(demo, **more):
    files = {"dataset": demo.pool, "eval_dataset": demo.target, "model_name_or_path": demo.model}
    return {key: str(path) for key, path in files.items()} | SMALL | more


@pytest.mark.slow
def test_a_command_loads_the_model_once(tiny_demo, tmp_path, loads):
    run = Run(tmp_path / "run", **settings_of(tiny_demo, warmup_step=0))
    run.score_together(1, ["less", "perplexity"], less={"gradient_type": "sgd"})
    assert len(loads) == 1  # its check, the target's directions, the pool's influence, the losses


@pytest.mark.parametrize("warmup_step", [0, 1])
def test_what_was_checked_is_kept_where_scoring_comes_next(warmup_step, tiny_demo, tmp_path, monkeypatch):
    alive, load = [], base._load

    def watched(*args, **more):
        found = load(*args, **more)
        alive.extend(weakref.ref(parameter) for parameter in found.model.parameters())
        return found

    def prepare(*given):
        gc.collect()
        raise UserError(str(any(each() is not None for each in alive)), "It stops here.", "Do nothing.")

    monkeypatch.setattr(base, "_load", watched)
    monkeypatch.setattr("dataflex_pipeline.pipeline.outputs.prepare_rows", prepare)
    run = Run(tmp_path / "run", **settings_of(tiny_demo, warmup_step=warmup_step))
    with pytest.raises(UserError) as stopped:
        run.round(1)
    assert stopped.value.what == str(warmup_step == 0)


@pytest.mark.slow
def test_loads_of_rounds(tiny_demo, tmp_path, loads):
    for method, before_training in (("less", 1), ("delta_loss", 1)):
        run = Run(tmp_path / method, **settings_of(tiny_demo, component_name=method))
        run.warmup()
        for number in (1, 2):
            loads.clear()
            run.round(number)
            assert len(loads) == before_training + 1, (method, number)
