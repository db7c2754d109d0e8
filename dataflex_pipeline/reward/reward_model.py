"""A sequence-classification model whose output is the reward, through transformers or vLLM.

With z [labels] the logits for a conversation that ends with the answer, and k the label:

    logit    z_k            sigmoid  1 / (1 + exp(-z_k))            softmax  exp(z_k) / sum_j exp(z_j)

The conversation goes through the model's chat template; a model without one (a cross-encoder) gets prompt and
answer as a pair of texts. A text that is too long is unscored, never cut.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from dataflex_pipeline.errors import ConfigError, UserError
from dataflex_pipeline.reward import Answer, Reward
from dataflex_pipeline.reward.address import PLACE
from dataflex_pipeline.reward.answers import JudgedAnswer
from dataflex_pipeline.reward.judge_files import JudgeFiles
from dataflex_pipeline.reward.settings import RewardModelSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from dataflex_pipeline.vllm.engine import VllmEngine

TOO_LONG = "the text has more tokens than the reward model takes (max_length)"
Encoded = Mapping[str, Sequence[int]]
"""What the tokenizer makes of one text: input_ids and the like, each [tokens]."""


class ModelRewarder:
    """Judges answers with a reward model.

    Args:
        settings: the model. config: the run's, for device and precision. say: prints one line.

    Raises:
        UserError: the folder holds no model.
    """

    def __init__(self, settings: RewardModelSettings, config: Any, say: Callable[[str], None]) -> None:
        self.settings, self.config, self.say = settings, config, say
        self.files = JudgeFiles(
            settings.hf_model_name_or_path or "", "reward_model", settings.trust_remote_code
        )
        self._stack = ExitStack()
        self._model: PreTrainedModel | None = None
        self._engine: VllmEngine | None = None

    def check(self) -> None:
        """Check that the model could be loaded and gives what is asked for, as far as its files tell.

        Raises:
            UserError: a file is missing or cannot be used, or the model is of another kind.
        """
        self.files.check()
        self._check_head()
        self._check_engine()

    def __enter__(self) -> Self:
        from dataflex_pipeline.models.base import precision, resolve_device

        device = resolve_device(self.config.device)
        dtype = precision(self.config, device).dtype
        self._check_head()
        self._check_engine()
        self.limit = self.settings.max_length or self.files.max_length
        if self.settings.engine == "vllm":
            self._open_engine(device, dtype)
        else:
            self._load(device, dtype)
        return self

    def __exit__(self, *error: object) -> None:
        from dataflex_pipeline.models.base import free_memory

        self._model = self._engine = None
        self._stack.close()
        free_memory()

    def _check_head(self) -> None:
        """Check that the model has outputs of its own, and the label among them."""
        config, settings = self.files.config, self.settings
        architecture = (getattr(config, "architectures", None) or ["none"])[0]
        if not architecture.endswith("ForSequenceClassification"):
            raise self._unusable(
                f"is a {architecture}",
                "Only ...ForSequenceClassification has a trained output for a whole text.",
            )
        if settings.label >= config.num_labels:
            raise self._unusable(
                f"has {config.num_labels} outputs, and label: {settings.label} was asked for",
                "Outputs are counted from 0.",
            )
        if settings.output == "softmax" and config.num_labels == 1:
            raise self._unusable(
                "has one output, and output: softmax was asked for", "The softmax of one is always 1."
            )

    def _check_engine(self) -> None:
        """Check that vLLM is there and can run the model, where it is to."""
        if self.settings.engine != "vllm":
            return
        from dataflex_pipeline.vllm.engine import require_vllm

        require_vllm(f"{PLACE}.reward_model.engine: vllm")
        if self.files.tokenizer.chat_template is None:
            raise self._unusable(
                "has no chat template, and engine: vllm was asked for",
                "vLLM takes one text, and a cross-encoder wants a pair: choose engine: transformers.",
            )

    def _unusable(self, found: str, why: str) -> ConfigError:
        return ConfigError(
            f"The reward model {self.files.name} {found}.",
            why,
            f"Correct the settings below {PLACE}.reward_model (hf_model_name_or_path, output, label).",
        )

    def _open_engine(self, device: str, dtype: str) -> None:
        from dataflex_pipeline.vllm.engine import VllmEngine

        options = {
            "dtype": dtype,
            "gpu_memory_utilization": self.settings.gpu_memory_utilization,
            "trust_remote_code": self.settings.trust_remote_code,
            "max_model_len": self.limit,
        }
        engine = VllmEngine("classify", self.files.name, options, say=self.say, device=device)
        self._engine = self._stack.enter_context(engine)

    def _load(self, device: str, dtype: str) -> None:
        import torch
        from transformers import AutoModelForSequenceClassification

        from dataflex_pipeline.models.base import no_bars
        from dataflex_pipeline.models.one_base import let_go
        from dataflex_pipeline.models.source import explained

        let_go()
        files = self.files
        with explained(files.name, "weights", files.key), no_bars():
            model, found = AutoModelForSequenceClassification.from_pretrained(
                str(files.folder or files.name),
                dtype=getattr(torch, dtype),
                use_safetensors=True,
                output_loading_info=True,
                **files.arguments,
            )
        if found["missing_keys"]:
            some = ", ".join(sorted(found["missing_keys"])[:3])
            raise self._unusable(f"lacks weights ({some})", "They would be drawn at random.")
        self._model = model.to(device).eval()
        if model.config.get_text_config().pad_token_id is None:
            self.say("the reward model has no pad token: texts go through it one by one")

    def reward(self, answers: Sequence[Answer], keep: Callable[[int, Reward], None]) -> None:
        """Judge answers, those of about the same length together."""
        fitting = []
        encoded = [self._encode(answer) for answer in answers]
        lengths = [len(each["input_ids"]) for each in encoded]
        for position, length in enumerate(lengths):
            if self.limit is not None and length > self.limit:
                keep(position, Reward(None, None, 0, 0.0, TOO_LONG))
            else:
                fitting.append(position)
        for batch in self._batches(fitting, lengths):
            began = time.monotonic()
            logits = self._logits([answers[p] for p in batch], [encoded[p] for p in batch])
            seconds = (time.monotonic() - began) / len(batch)
            for position, row in zip(batch, logits, strict=True):
                value = self._value(row)
                reason = None if math.isfinite(value) else "the reward model's output is not finite"
                keep(position, Reward(None if reason else value, None, 1, seconds, reason))

    def _batches(self, positions: Sequence[int], lengths: Sequence[int]) -> Iterator[list[int]]:
        """Yield positions by falling length, as many as fit into ``batch_tokens`` with their padding."""
        single = self._model is not None and self._model.config.get_text_config().pad_token_id is None
        batch: list[int] = []
        for position in sorted(positions, key=lambda p: -lengths[p]):
            full = batch and (len(batch) + 1) * lengths[batch[0]] > self.settings.batch_tokens
            if batch and (single or full):
                yield batch
                batch = []
            batch.append(position)
        if batch:
            yield batch

    def _logits(self, answers: Sequence[Answer], encoded: Sequence[Encoded]) -> np.ndarray:
        """Return the model's raw outputs. [answers, labels] float64"""
        if self._engine is not None:
            texts = [self._text(answer) for answer in answers]
            return self._engine.classify(texts, activation=False).astype(np.float64)
        import torch

        if self._model is None:
            raise UserError("The reward model is not open.", "It has to be entered.", "Use a with statement.")
        tokenizer = self.files.tokenizer
        if tokenizer.pad_token is None:  # one text per batch, so nothing is filled up
            batch = {name: torch.tensor([list(values)]) for name, values in encoded[0].items()}
        else:
            batch = dict(tokenizer.pad(list(encoded), return_tensors="pt"))
        with torch.inference_mode():
            found = self._model(**{name: tensor.to(self._model.device) for name, tensor in batch.items()})
        array: np.ndarray = found.logits.cpu().double().numpy()
        return array

    def _value(self, logits: np.ndarray) -> float:
        """Return the reward of one answer's logits. [labels]"""
        chosen = float(logits[self.settings.label])
        if self.settings.output == "logit":
            return chosen
        if self.settings.output == "sigmoid":
            return math.exp(-np.logaddexp(0.0, -chosen))
        return math.exp(chosen - float(np.logaddexp.reduce(logits)))

    def _encode(self, answer: Answer) -> Encoded:
        tokenizer = self.files.tokenizer
        if tokenizer.chat_template is None:
            return dict(tokenizer(answer.prompt, answer.completion))
        if self._engine is not None:
            return dict(tokenizer(self._text(answer)))
        return dict(tokenizer(self._conversation(answer), add_special_tokens=False))

    def _conversation(self, answer: Answer) -> str:
        turns = (
            answer.turns if isinstance(answer, JudgedAnswer) and answer.turns else (("user", answer.prompt),)
        )
        messages = [{"role": role, "content": content} for role, content in turns]
        messages.append({"role": "assistant", "content": answer.completion})
        return self.files.chat_text(messages, reply=False)

    def _text(self, answer: Answer) -> str:
        """Return the conversation for an engine that puts the beginning token before it itself."""
        tokenizer, text = self.files.tokenizer, self._conversation(answer)
        first = tokenizer.bos_token
        adds = first is not None and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
        return text.removeprefix(first) if adds and first is not None else text
