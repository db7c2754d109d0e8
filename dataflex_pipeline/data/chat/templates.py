"""Chat templates by name, for base models whose tokenizer has none; the texts are in chat_templates/.

Each is a Jinja template with the variables that transformers' own have (messages, tools,
add_generation_prompt, bos_token, eos_token). All of them are prefix-stable: what is written for the
first turns never changes when turns are added.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING

from dataflex_pipeline.data.sources.compressed import kind_name
from dataflex_pipeline.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class NamedTemplate:
    """A chat template that goes by name.

    Attributes:
        name: the name in ``template:``. summary: family, in words.
        stop: what ends a response; None for the tokenizer's end-of-sequence token.
        tokens: texts that the family's tokenizers have as single tokens.
        system: system prompt that the template writes where a row has none; empty for none.
        file: name of the file in chat_templates/; the name itself when empty.
    """

    name: str
    summary: str
    stop: str | None = None
    tokens: tuple[str, ...] = ()
    file: str = ""
    system: str = ""

    @property
    def text(self) -> str:
        """The Jinja template."""
        folder = resources.files("dataflex_pipeline.data.chat") / "chat_templates"
        return (folder / f"{self.file or self.name}.jinja").read_text(encoding="utf-8")


_ALPACA_SYSTEM = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request."
)
_VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_CHATML = ("<|im_start|>", "<|im_end|>")
_LLAMA3 = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_GEMMA = ("<start_of_turn>", "<end_of_turn>")
_PHI3 = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
_PHI4 = ("<|im_start|>", "<|im_sep|>", "<|im_end|>")
_GLM4 = ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
_QWEN3 = (*_CHATML, "<think>", "</think>")
_MISTRAL = ("[INST]", "[/INST]")
_DEEPSEEK = ("<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>")

TEMPLATES = {
    template.name: template
    for template in (
        NamedTemplate("alpaca", "Stanford Alpaca: ### Instruction: / ### Response:", system=_ALPACA_SYSTEM),
        NamedTemplate("chatml", "ChatML, no default system prompt", "<|im_end|>", _CHATML),
        NamedTemplate("deepseek", "DeepSeek LLM chat: User: / Assistant:"),
        NamedTemplate("deepseek3", "DeepSeek V3", "<｜end▁of▁sentence｜>", _DEEPSEEK),
        NamedTemplate("default", "Human: / Assistant: lines, each ended by the end-of-sequence token"),
        NamedTemplate("gemma", "Gemma 1 to 3", "<end_of_turn>", _GEMMA),
        NamedTemplate("gemma2", "the same as gemma", "<end_of_turn>", _GEMMA, "gemma"),
        NamedTemplate("gemma3", "the same as gemma", "<end_of_turn>", _GEMMA, "gemma"),
        NamedTemplate("glm4", "GLM 4: answers end with the mark of who speaks next", "<|user|>", _GLM4),
        NamedTemplate("llama2", "Llama 2 chat: [INST] <<SYS>>"),
        NamedTemplate("llama3", "Llama 3 and 3.1", "<|eot_id|>", _LLAMA3),
        NamedTemplate("mistral", "Mistral 7B v0.3", None, _MISTRAL),
        NamedTemplate("mistral_tekken", "Mistral Nemo (third version on Tekken)", None, _MISTRAL),
        NamedTemplate("phi", "the same as phi3", "<|end|>", _PHI3, "phi3"),
        NamedTemplate("phi3", "Phi 3 and 3.5", "<|end|>", _PHI3),
        NamedTemplate("phi4", "Phi 4", "<|im_end|>", _PHI4),
        NamedTemplate("plain", "prompt and response without any marks"),
        NamedTemplate("qwen", "ChatML with the system prompt and tools of Qwen 2.5", "<|im_end|>", _CHATML),
        NamedTemplate("qwen3", "Qwen 3, thinking: reasoning (or an empty block) first", "<|im_end|>", _QWEN3),
        NamedTemplate("qwen3_nothink", "Qwen 3 without thinking (Instruct-2507)", "<|im_end|>", _CHATML),
        NamedTemplate("vicuna", "Vicuna 1.1: USER: / ASSISTANT:", system=_VICUNA_SYSTEM),
        NamedTemplate("zephyr", "Zephyr: <|user|> / <|assistant|>"),
    )
}
"""All templates by name."""


def named_template(name: str) -> NamedTemplate:
    """Return the template of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in TEMPLATES:
        raise ConfigError(
            f"template: {name} is not known.{did_you_mean(name, TEMPLATES)}",
            f"The names are {', '.join(TEMPLATES)}.",
            "Use one of them, or leave template out to use the tokenizer's own.",
        )
    return TEMPLATES[name]


def own_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the tokenizer's template, its default one of several.

    Raises:
        ConfigError: there is no default one, or it is no text.
    """
    try:
        text = tokenizer.get_chat_template()
    except (ValueError, TypeError, AttributeError) as error:
        text = None
        found = str(error).strip().splitlines()[0]
    else:
        found = f"It is {kind_name(text)}, not text."
    if isinstance(text, str):
        return text
    raise ConfigError(
        "The chat template of the model's tokenizer cannot be used.",
        found,
        f"Correct chat_template in the model's folder, or set template to one of {', '.join(TEMPLATES)}.",
    )
