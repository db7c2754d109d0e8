"""Settings of every generator: the drawing of tokens, the end of a completion, its longest length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dataflex_pipeline.data.chat.labelled import ChatFormat
from dataflex_pipeline.data.chat.templates import named_template
from dataflex_pipeline.data.conversation import Conversation, Message
from dataflex_pipeline.models.source import explained, load_arguments, local_folder
from dataflex_pipeline.models.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from dataflex_pipeline.config.fields import Config


@dataclass(frozen=True)
class GenerationSettings:
    """How completions are drawn.

    Attributes:
        max_new_tokens: tokens of a completion at most, its end included.
        temperature: logits are divided by it; 0 takes the likeliest token.
        top_p: the smallest set of likeliest tokens with this probability is drawn from; 1: all.
        top_k: so many of the likeliest tokens are drawn from; 0: all. Applied before top_p.
        end_ids: token ids of which any one ends a completion.
        end_text: text that ends one, where its end marker is no single token; None: no such.
        context: tokens that the model can look at, prompt and completion together; None: no limit known.
        batch: completions that are drawn at the same time, at most; None: as the generator likes.
        gpu_memory_utilization, tensor_parallel_size: of a vLLM engine on GPUs.
    """

    max_new_tokens: int
    temperature: float
    top_p: float = 1.0
    top_k: int = 0
    end_ids: tuple[int, ...] = ()
    end_text: str | None = None
    context: int | None = None
    batch: int | None = None
    gpu_memory_utilization: float = 0.9
    tensor_parallel_size: int = 1
    tokenizer: PreTrainedTokenizerBase = field(kw_only=True, repr=False, compare=False)

    def room(self, prompt_tokens: int) -> int:
        """Return how many tokens may follow a prompt; at most 0 where it fills the context."""
        if self.context is None:
            return self.max_new_tokens
        return min(self.max_new_tokens, self.context - prompt_tokens)

    def text(self, token_ids: Sequence[int]) -> str:
        """Return a completion's text, without its end and without special tokens."""
        ended = bool(token_ids) and token_ids[-1] in self.end_ids
        kept = list(token_ids[:-1] if ended else token_ids)
        text = str(self.tokenizer.decode(kept, skip_special_tokens=True))
        return text if self.end_text is None else text.partition(self.end_text)[0]


def model_settings(config: Config) -> PreTrainedConfig:
    """Load the base model's configuration, not its weights."""
    from transformers import AutoConfig

    name = config.model_name_or_path
    with explained(name, "configuration"):
        return AutoConfig.from_pretrained(str(local_folder(name) or name), **load_arguments(config))


def context_of(model: PreTrainedConfig) -> int | None:
    """Return the positions that a model knows, or None where its configuration does not say."""
    positions = getattr(model.get_text_config(), "max_position_embeddings", None)
    return None if positions is None else int(positions)


def endings(
    config: Config, model: PreTrainedConfig, say: Callable[[str], None]
) -> tuple[PreTrainedTokenizerBase, tuple[int, ...], str | None]:
    """Return the tokenizer, the token ids that end a completion, and the text that does.

    A completion ends with the end-of-sequence token of the tokenizer or of the model's configuration, or with
    what the run's chat template writes after a response, which is what training has taught. White space alone
    is no end: answers contain it.

    Args:
        config: names the model and the chat template. model: the model's configuration.
        say: is told where nothing but the limit ends a completion.
    """
    tokenizer = load_tokenizer(config)
    declared = model.get_text_config().eos_token_id
    ids = {tokenizer.eos_token_id, *(declared if isinstance(declared, list) else [declared])} - {None}
    marker = response_marker(config, tokenizer).strip()
    marker_ids = tokenizer(marker, add_special_tokens=False)["input_ids"] if marker else []
    if len(marker_ids) == 1:
        ids |= set(marker_ids)
    text = marker if len(marker_ids) > 1 else None
    if not ids and text is None:
        say("neither the model nor the chat template has an end token: completions end at max_new_tokens")
    return tokenizer, tuple(sorted(int(each) for each in ids)), text


def response_marker(config: Config, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return what the run's chat template writes after a response; "" where there is no template."""
    if config.template is None and not tokenizer.chat_template:
        return ""
    chat = ChatFormat(tokenizer, named_template(config.template) if config.template is not None else None)
    answer = "yes"
    pieces = chat.pieces(Conversation((Message("user", "a"), Message("assistant", answer))))
    return next(piece.text for piece in pieces if piece.labelled).partition(answer)[2]
