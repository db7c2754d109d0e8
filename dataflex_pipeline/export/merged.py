"""The merged model: W' = W + (alpha / r) B A for every adapted weight, in the base model's number format.

Merged on a freshly loaded base, in the number format of its weights on disk, so that an export is as large
as the base. peft computes the products of LoRA (Hu et al. 2022, section 4) in float32 on a CPU. In float32 a
reloaded export gives the logits of base and adapter within 1e-6; in bfloat16 each merged weight is rounded.

Where embedding and head of the base are one weight (tied), an adapter can still change the two differently:
LoRA on the embedding leaves the head as it was, and of ``modules_to_save`` each has its own copy. The weight
is therefore doubled before merging, and stays two, with ``tie_word_embeddings: false``, unless both end up
equal. The merged model's logits are compared with those of base and adapter before anything is written.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from dataflex_pipeline.data.chat.labelled import ChatFormat, Piece
from dataflex_pipeline.data.chat.templates import named_template
from dataflex_pipeline.data.conversation import Message
from dataflex_pipeline.errors import ConfigError, DataflexError, UserError
from dataflex_pipeline.models.base import attach_adapter, no_bars
from dataflex_pipeline.models.quantized import own_method
from dataflex_pipeline.models.source import check_model_folder, explained, load_arguments, local_folder
from dataflex_pipeline.models.tokenizer import load_tokenizer

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

    from dataflex_pipeline.config.fields import Config

Say = Callable[[str], None]
_SAMPLING = {"temperature": 1.0, "top_p": 1.0, "top_k": 50, "min_p": None, "typical_p": 1.0}
"""Generation settings that only sampling reads, with the values that mean nothing."""
_TIED = "Input and output embeddings are no longer tied|Model with `tie_word_embeddings=True`"
"""What peft warns of while it merges an adapter into a base whose embedding and head are one weight."""
TOLERANCE = {"float32": 1e-4}
ROUNDED = 0.25
"""How far logits may change by merging, as a share of the largest: in a number format; in any other."""
PROBED = 16
"""Tokens of the text whose logits are compared."""


def save_merged(
    config: Config, adapter: Path | None, full: Path | None, device: str, folder: Path, say: Say
) -> PreTrainedTokenizerBase:
    """Write a model that needs no adapter, with its tokenizer and chat template.

    Args:
        config: names the base model, the template, and the size of a weight file (``export_size``, GB).
        adapter: folder of the LoRA adapter; or else full: folder of a fully fine-tuned checkpoint.
        device: torch device that is merged on. folder: where the files go; it exists.
        say: is told what a user should know.

    Returns:
        The tokenizer as it was saved.

    Raises:
        UserError: base or adapter cannot be loaded, or they do not fit each other.
        DataflexError: the merged model is not base and adapter.
    """
    if adapter is not None:
        _check_base(config, say)
    model = _load(config, full, device)
    if adapter is not None:
        model = _merge(model, adapter, say)
    tokenizer, chat = exported_tokenizer(config, say)
    _set_generation(model.generation_config, chat, say)
    say(f"weights in {str(model.dtype).removeprefix('torch.')}, {config.export_size} GB per file at most")
    with no_bars():
        model.save_pretrained(folder, max_shard_size=f"{config.export_size}GB")
    tokenizer.save_pretrained(folder)
    return tokenizer


def _check_base(config: Config, say: Say) -> None:
    """Refuse to merge into quantized files; say what it means where only the training quantized them."""
    own = own_method(config)
    if own is not None:
        raise ConfigError(
            f"A merged model was asked for, and {config.model_name_or_path} is quantized by {own}.",
            "Merged weights would be rounded to a few bits again, by more than the adapter changes.",
            "Export the adapter alone, or merge it into the model that the quantized one was made from.",
        )
    if config.quantization_bit is not None:
        say(
            f"the adapter was trained on a base of {config.quantization_bit} bits and is merged into its "
            "plain weights, which gives slightly other numbers"
        )


def _merge(model: PreTrainedModel, adapter: Path, say: Say) -> PreTrainedModel:
    """Return base and adapter as one model whose logits are theirs."""
    with explained(str(adapter), "adapter", "adapter_name_or_path"):
        adapted = attach_adapter(model, adapter, say, to_merge=True).eval()
    expected = _probe(adapted)
    doubled = _double_tied_head(adapted)
    # peft warns before `_tie_if_equal`, also where both stay one; what is true is said below
    with explained(str(adapter), "adapter", "adapter_name_or_path"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", _TIED)
        merged: PreTrainedModel = adapted.merge_and_unload(safe_merge=True)
    if doubled and not _tie_if_equal(merged):
        say(
            "embedding and head are one weight in the base, and the adapter changes them differently: they "
            "are exported as two (tie_word_embeddings: false)"
        )
    _check_merged(expected, _probe(merged), merged, adapter)
    return merged


def _probe(model: PreTrainedModel | PeftModel) -> torch.Tensor:
    """Return the logits of a text of tokens from the whole vocabulary. [1, PROBED, V]"""
    import torch

    size = int(model.get_input_embeddings().weight.shape[0])
    ids = torch.arange(PROBED, device=model.device)[None] * size // PROBED
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits.float()
    return logits


def _double_tied_head(adapted: PeftModel) -> bool:
    """Give the head parameters of its own where it shares them with the rest; return whether it did."""
    import torch

    base = adapted.get_base_model()
    head = base.get_output_embeddings()
    if head is None:
        return False
    own = set(head.modules())
    elsewhere = {
        id(parameter)
        for module in base.modules()
        if module not in own
        for parameter in module.parameters(recurse=False)
    }
    doubled = False
    for module in own:
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) in elsewhere:
                doubled = True
                copy = torch.nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
                setattr(module, name, copy)
    return doubled


def _tie_if_equal(merged: PreTrainedModel) -> bool:
    """Make embedding and head one weight again where they are equal; the configuration says what they are."""
    import torch

    head, embedding = merged.get_output_embeddings(), merged.get_input_embeddings()
    equal = torch.equal(head.weight, embedding.weight)
    if equal:
        head.weight = embedding.weight
    merged.config.tie_word_embeddings = merged.config.get_text_config().tie_word_embeddings = equal
    return equal


def _check_merged(
    expected: torch.Tensor, found: torch.Tensor, merged: PreTrainedModel, adapter: Path
) -> None:
    """Raise unless the merged model computes what base and adapter do."""
    dtype = str(merged.dtype).removeprefix("torch.")
    difference = float((found - expected).abs().max()) / max(1.0, float(expected.abs().max()))
    if difference <= TOLERANCE.get(dtype, ROUNDED):
        return
    raise DataflexError(
        f"The adapter {adapter} cannot be merged: the logits of the merged model differ from those of base "
        f"and adapter by {difference:.2g} of the largest one (in {dtype}).",
        "An export has to be the model that was trained.",
        "Export the adapter alone with --what adapter, and load it on its base with peft.",
    )


def _load(config: Config, full: Path | None, device: str) -> PreTrainedModel:
    """Load the base, or a fully fine-tuned checkpoint, in the number format of the base's weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    name = config.model_name_or_path
    base = local_folder(name)
    if base is not None:
        check_model_folder(base)
    source = str(full or base or name)
    arguments = load_arguments(config)
    with explained(name, "configuration"):
        stored = AutoConfig.from_pretrained(str(base or name), **arguments).dtype
    if full is not None:
        arguments = {"trust_remote_code": config.trust_remote_code, "local_files_only": True}
    with explained(source, "weights"), no_bars():
        model, found = AutoModelForCausalLM.from_pretrained(
            source, dtype=stored or "auto", use_safetensors=True, output_loading_info=True, **arguments
        )
    if found["missing_keys"]:
        raise UserError(
            f"The weights of '{source}' lack {', '.join(sorted(found['missing_keys'])[:3])}.",
            "An export would hold random numbers in their place.",
            "Use the folder of a whole causal language model.",
        )
    return model.to(device)


def exported_tokenizer(config: Config, say: Say) -> tuple[PreTrainedTokenizerBase, ChatFormat]:
    """Return the base model's tokenizer with the chat template that the rows were written with.

    With a named template, prompts rendered from the exported one have the very tokens that the model was
    trained on, the beginning-of-sequence token included; where they cannot, ``say`` is told.
    """
    tokenizer = load_tokenizer(config)
    named = named_template(config.template) if config.template is not None else None
    chat = ChatFormat(tokenizer, named)
    if named is None:
        return tokenizer, chat
    asked = [Message("user", "Hello")]
    text = chat.render(asked, add_generation_prompt=True)
    trained_on = chat.encode([[Piece(text, False)]])[0][0]
    tokenizer.chat_template = named.text
    if _rendered(tokenizer) == trained_on[1:]:
        tokenizer.chat_template = "{{- bos_token -}}" + named.text
    if _rendered(tokenizer) != trained_on:
        say(f"the exported chat template {named.name} gives other tokens than the rows were made of")
    return tokenizer, chat


def _rendered(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    found = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}], add_generation_prompt=True, return_dict=False
    )
    return list(found)


def _set_generation(generation: GenerationConfig, chat: ChatFormat, say: Say) -> None:
    """Let the exported model stop where it was trained to, and its generation settings be savable."""
    stop = chat.stop_ids
    known = generation.eos_token_id
    ends = [] if known is None else list(known) if isinstance(known, list) else [known]
    if len(stop) == 1 and stop[0] not in ends:
        generation.eos_token_id = [stop[0], *ends]
        say(f"generation stops at '{chat.tokenizer.decode(stop)}' too, which ends the trained responses")
    odd = {name: getattr(generation, name, None) for name in _SAMPLING}
    sampled = [name for name, value in odd.items() if value is not None and value != _SAMPLING[name]]
    if sampled and not generation.do_sample:
        generation.do_sample = True
        say(f"generation settings of the base name {', '.join(sampled)}, so do_sample is set: true")
