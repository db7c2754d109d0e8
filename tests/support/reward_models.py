"""Tiny random models on bytes: a judge, reward models with and without a chat template."""

from __future__ import annotations

from pathlib import Path

CHAT = (
    "{% for m in messages %}{{ '[' + m['role'] + '] ' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
)
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + CHAT
)


def make_tokenizer(folder: Path, template: str | None, pair: bool = False):
    """Save a tokenizer whose tokens are bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*special, *alphabet])}
    core = Tokenizer(models.BPE(vocabulary, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A",
        pair="<s> $A </s> $B:1 </s>:1" if pair else "<s> $A $B",
        special_tokens=[("<s>", 1), ("</s>", 2)],
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=1024,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"]
        if pair
        else ["input_ids", "attention_mask"],
    )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return tokenizer


def _llama(**more):
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=259,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=2048,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        **more,
    )


def make_judge(folder: Path, template: str | None = CHAT) -> Path:
    import torch
    from transformers import LlamaForCausalLM

    torch.manual_seed(3)
    LlamaForCausalLM(_llama(pad_token_id=0)).save_pretrained(folder)
    make_tokenizer(folder, template)
    return folder


def make_reward_model(folder: Path, labels: int = 1, pad: bool = True) -> Path:
    import torch
    from transformers import LlamaForSequenceClassification

    torch.manual_seed(4)
    config = _llama(num_labels=labels, **({"pad_token_id": 0} if pad else {}))
    LlamaForSequenceClassification(config).save_pretrained(folder)
    make_tokenizer(folder, "{{ bos_token }}" + CHAT)
    return folder


def make_cross_encoder(folder: Path) -> Path:
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(5)
    config = BertConfig(
        vocab_size=259,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=256,
        num_labels=3,
        initializer_range=0.3,
        pad_token_id=0,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    make_tokenizer(folder, None, pair=True)
    return folder
