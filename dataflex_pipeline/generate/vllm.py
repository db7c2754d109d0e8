"""Completions drawn with vLLM: continuous batching, the round's adapter as a LoRA request, a seed per sample.

Every sample is a request of its own with its own seed (children of one request would get seed, seed + 1 ...,
which neighbouring seeds share). With one seed the engine draws the same tokens whatever the order, the batch
and the process, as far as the batch does not move its logits: on a CPU it was not seen to; on a GPU vLLM
promises it only with VLLM_BATCH_INVARIANT=1. Its numbers are other ones than the transformers generator's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from dataflex_pipeline.generate import Completion, Prompt
from dataflex_pipeline.generate.settings import GenerationSettings
from dataflex_pipeline.home import expanded
from dataflex_pipeline.vllm.engine import VllmEngine

if TYPE_CHECKING:
    from dataflex_pipeline.config.fields import Config


class VllmGenerator:
    """Draws completions with a vLLM engine; entering loads it, leaving ends its process.

    Args:
        config: names the model, its precision and the device.
        checkpoint: folder of the adapter or of the whole model; None: the model before the warm-up.
        settings: how completions are drawn.
        longest: tokens of the longest prompt that may come.
        say: is told what was chosen for the engine.
    """

    def __init__(
        self,
        config: Config,
        checkpoint: Path | None,
        settings: GenerationSettings,
        longest: int,
        say: Callable[[str], None],
    ) -> None:
        from dataflex_pipeline.models.base import precision, resolve_device

        device = resolve_device(config.device)
        model, adapter = config.model_name_or_path, checkpoint
        options: dict[str, Any] = {
            "dtype": precision(config, device).dtype,
            "trust_remote_code": config.trust_remote_code,
            "generation_config": "vllm",  # or the model's own sampling defaults would be mixed in
            "max_model_len": engine_length(settings, longest),
            "gpu_memory_utilization": settings.gpu_memory_utilization,
            "tensor_parallel_size": settings.tensor_parallel_size,
            "seed": 0,
        }
        if settings.batch is not None:
            options |= {"max_num_seqs": settings.batch}
        if config.finetuning_type == "full" and checkpoint is not None:
            options |= {"tokenizer": model, "tokenizer_revision": config.model_revision}
            model, adapter = str(checkpoint), None
        elif config.model_revision is not None:
            options |= {"revision": config.model_revision}
        if checkpoint is None and config.adapter_name_or_path is not None:
            adapter = expanded(config.adapter_name_or_path)
        self._settings = settings
        instead = "Or set nice.generator: transformers."
        # over several GPUs only rank 0 of a launch draws (features/generations.py), and has all of them
        alone = settings.tensor_parallel_size > 1
        self._engine = VllmEngine("generate", model, options, adapter, say, device, instead, alone)

    def __enter__(self) -> Self:
        self._engine.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._engine.__exit__(*error)

    def generate(self, prompts: Sequence[Prompt]) -> list[Completion]:
        """Return one completion per prompt, in order."""
        drawn = self._engine.generate(
            [prompt.token_ids for prompt in prompts], [self._sampling(prompt) for prompt in prompts]
        )
        return [replace(each, text=self._settings.text(each.token_ids)) for each in drawn]

    def _sampling(self, prompt: Prompt) -> dict[str, Any]:
        settings = self._settings
        return {
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "top_k": settings.top_k,
            "max_tokens": settings.room(len(prompt.token_ids)),
            "seed": prompt.seed,
            "stop_token_ids": list(settings.end_ids),
            "stop": settings.end_text,
            "detokenize": settings.end_text is not None,
        }


def engine_length(settings: GenerationSettings, longest: int) -> int:
    """Return the longest sequence that the engine has to hold, in tokens."""
    wanted = longest + settings.max_new_tokens
    return wanted if settings.context is None else min(wanted, settings.context)
