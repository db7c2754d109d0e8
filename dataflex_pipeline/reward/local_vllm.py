"""A judge that vLLM runs on this machine, all answers of a chunk at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Self

from dataflex_pipeline.reward import Answer, Reward
from dataflex_pipeline.reward.answers import JudgedAnswer
from dataflex_pipeline.reward.judge_files import JudgeFiles
from dataflex_pipeline.reward.judge_prompts import judge_messages, score_pattern
from dataflex_pipeline.reward.judge_replies import parse_score
from dataflex_pipeline.reward.settings import LocalVllmSettings
from dataflex_pipeline.seeds import derive_seed
from dataflex_pipeline.vllm.engine import VllmEngine, require_vllm

CHUNK = 512
"""Answers per call of the engine; they are kept when the call returns."""
SHORTEST_REPLY = 16
"""Tokens that a prompt has to leave for 'Score: 0.123'."""
TOO_LONG = "the judge's prompt is too long for it (vllm_max_model_len)"


class LocalVllmRewarder:
    """Judges answers with a language model; a model without a chat template gets plain text to continue.

    Args:
        settings: the judge. config: the run's, for the device. say: prints one line.
    """

    def __init__(self, settings: LocalVllmSettings, config: Any, say: Callable[[str], None]) -> None:
        require_vllm("nice.reward_model_backend: local_vllm")
        self.settings, self.config, self.say = settings, config, say
        self.files = JudgeFiles(settings.hf_model_name_or_path, "local_vllm", settings.trust_remote_code)

    def check(self) -> None:
        """Check that the judge could be loaded, as far as its files tell.

        Raises:
            UserError: a file is missing or cannot be used.
        """
        self.files.check()

    def __enter__(self) -> Self:
        from dataflex_pipeline.models.base import resolve_device

        settings = self.settings
        device = resolve_device(self.config.device)
        self.limit = settings.vllm_max_model_len or self.files.max_length
        options: dict[str, Any] = {
            "dtype": self._dtype(device),
            "tensor_parallel_size": settings.vllm_tensor_parallel_size,
            "gpu_memory_utilization": settings.vllm_gpu_memory_utilization,
            "seed": settings.vllm_seed,
            "trust_remote_code": settings.trust_remote_code,
            "max_model_len": self.limit,
        }
        self.engine = VllmEngine("generate", self.files.name, options, say=self.say, device=device)
        if self.files.tokenizer.chat_template is None:
            self.say("the judge has no chat template: it gets the prompt as plain text to continue")
        self.engine.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.engine.__exit__(*error)

    def reward(self, answers: Sequence[Answer], keep: Callable[[int, Reward], None]) -> None:
        """Judge answers in order, a chunk at a time."""
        prompts = [self._prompt(answer) for answer in answers]
        fitting = []
        for position, ids in enumerate(prompts):
            if self.limit is not None and len(ids) + SHORTEST_REPLY > self.limit:
                keep(position, Reward(None, None, 0, 0.0, TOO_LONG))
            else:
                fitting.append(position)
        for start in range(0, len(fitting), CHUNK):
            chunk = fitting[start : start + CHUNK]
            began = time.monotonic()
            sampling = [self._sampling(answers[position]) for position in chunk]
            drawn = self.engine.generate([prompts[position] for position in chunk], sampling)
            seconds = (time.monotonic() - began) / len(chunk)
            for position, completion in zip(chunk, drawn, strict=True):
                value, reason = parse_score(completion.text, self.settings.max_score)
                keep(position, Reward(value, completion.text, 1, seconds, reason))

    def _dtype(self, device: str) -> str:
        if self.settings.vllm_dtype == "auto" and device == "cpu":
            self.say("vllm_dtype: auto becomes float32 on a CPU")
            return "float32"
        return self.settings.vllm_dtype

    def _prompt(self, answer: Answer) -> list[int]:
        messages = judge_messages(answer, self.settings)
        if self.files.tokenizer.chat_template is not None:
            return self.files.token_ids(messages)
        text = "\n\n".join(message["content"] for message in messages) + "\n\nReply:\n"
        return list(self.files.tokenizer(text)["input_ids"])

    def _sampling(self, answer: Answer) -> dict[str, Any]:
        """Return how one reply is drawn; its stream depends on nothing but the seed and the answer."""
        settings = self.settings
        again = isinstance(answer, JudgedAnswer) and answer.again
        sampling: dict[str, Any] = {
            "temperature": settings.vllm_temperature,
            "top_p": settings.vllm_top_p,
            "top_k": settings.vllm_top_k,
            "max_tokens": settings.vllm_max_tokens,
            "seed": derive_seed(settings.vllm_seed, "judge", answer.key, int(again)) >> 1,  # signed 64 bits
        }
        if settings.structured_output:
            sampling["structured_outputs"] = {"regex": score_pattern(settings.max_score)}
        return sampling
