"""The main program of vLLM's own process: started by engine.py, ended by the end of its input.

Requests and replies are JSON lines; a float array follows its reply as raw little-endian float32 bytes.

    {"op": "open", "task", "model", "options", "adapter", "device"}   first; the reply says what was chosen
    {"op": "generate", "prompts": [[id, ...], ...], "sampling": [{...}, ...]}
    {"op": "embed", "texts": [...], "max_length"}
    {"op": "classify", "texts": [...], "max_length", "activation"}
    {"op": "close"}

An exception ends the process: its last reply says why, the traceback goes to stderr.
"""

from __future__ import annotations

import ctypes
import json
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from typing import IO, TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from types import TracebackType

    from vllm import LLM, SamplingParams

PR_SET_PDEATHSIG = 1
CPU_KV_CACHE_BYTES = 1 << 30
CPU_MEMORY_SHARE = 0.05
"""On a CPU vLLM checks this share of all memory to be free; the cache has a size of its own there."""

ERROR_CHARACTERS = 500

Reply = tuple[dict[str, Any], np.ndarray | None]


class Server:
    """One engine and the requests to it.

    Args:
        opened: the first request.
    """

    def __init__(self, opened: Mapping[str, Any]) -> None:
        self.task: str = opened["task"]
        self.options = dict(opened["options"])
        self.adapter: str | None = opened["adapter"]
        self.notices: list[str] = []
        self._check_device(opened["device"])
        self.llm = self._load(opened["model"])

    def _check_device(self, wanted: str | None) -> None:
        from vllm.platforms import current_platform

        found = str(current_platform.device_type)
        if wanted is not None and wanted != found:
            raise RuntimeError(
                f"device {wanted} was asked for, and the vLLM that is installed computes on {found}"
            )
        if current_platform.is_cpu():
            self._settle_cpu()

    def _settle_cpu(self) -> None:
        """Choose what has no good default on a CPU, and keep a line that says so."""
        asked = self.options.pop("gpu_memory_utilization", None)
        chosen = {"enforce_eager": True, "gpu_memory_utilization": CPU_MEMORY_SHARE}
        if self.task == "generate":
            # a prompt read in two steps would rewind its seed's generator, which a CPU's cannot do
            chosen |= {"kv_cache_memory_bytes": CPU_KV_CACHE_BYTES, "enable_chunked_prefill": False}
        missing = {key: value for key, value in chosen.items() if key not in self.options}
        self.options |= missing
        ignored = "" if asked is None else f" (instead of {asked})"
        listed = ", ".join(
            f"{key} {value}{ignored if key == 'gpu_memory_utilization' else ''}"
            for key, value in missing.items()
        )
        self.notices.append(f"vLLM on a CPU: {listed}")

    def _load(self, model: str) -> LLM:
        from vllm import LLM

        options = {"load_format": "safetensors"} | self.options  # a pickle can run any code that is in it
        if self.task != "generate":
            options["runner"] = "pooling"
        if self.adapter is not None:
            options |= lora_options(self.adapter)
        return LLM(model, **options)

    def opened(self) -> Reply:
        """Return the reply to the first request."""
        return {"notices": self.notices, "dimension": self.llm.model_config.embedding_size}, None

    def answer(self, request: Mapping[str, Any]) -> Reply:
        """Answer one request."""
        operations: dict[str, Callable[[Mapping[str, Any]], Reply]] = {
            "generate": self._generate,
            "embed": self._embed,
            "classify": self._classify,
        }
        # what an earlier call left in the cache would move the last digits of this one
        self.llm.reset_prefix_cache()
        return operations[request["op"]](request)

    def _lora(self) -> Any:
        from vllm.lora.request import LoRARequest

        return None if self.adapter is None else LoRARequest("adapter", 1, self.adapter)

    def _generate(self, request: Mapping[str, Any]) -> Reply:
        from vllm import TokensPrompt

        prompts = [TokensPrompt(prompt_token_ids=ids) for ids in request["prompts"]]
        params = [sampling_params(each, logprobs=0) for each in request["sampling"]]
        made = self.llm.generate(prompts, params, use_tqdm=False, lora_request=self._lora())
        drawn = [output.outputs[0] for output in made]
        return {
            "completions": [
                [list(one.token_ids), one.text, one.finish_reason, one.cumulative_logprob] for one in drawn
            ]
        }, None

    def _embed(self, request: Mapping[str, Any]) -> Reply:
        made = self.llm.embed(
            request["texts"], use_tqdm=False, tokenization_kwargs=truncation(request["max_length"])
        )
        return {}, np.array([output.outputs.embedding for output in made], dtype="<f4")

    def _classify(self, request: Mapping[str, Any]) -> Reply:
        from vllm import PoolingParams

        made = self.llm.classify(
            request["texts"],
            use_tqdm=False,
            pooling_params=PoolingParams(use_activation=request["activation"]),
            tokenization_kwargs=truncation(request["max_length"]),
        )
        return {}, np.array([output.outputs.probs for output in made], dtype="<f4")


def lora_options(adapter: str) -> dict[str, Any]:
    """Return the engine's settings for one PEFT adapter; the output head is never wrapped.

    Without ``lora_target_modules`` vLLM wraps the head too, and log-probabilities of a prompt then fail.
    """
    with open(os.path.join(adapter, "adapter_config.json"), encoding="utf-8") as file:  # noqa: PTH118, PTH123
        config = json.load(file)
    modules = config["target_modules"]
    chosen: dict[str, Any] = {"enable_lora": True, "max_loras": 1, "max_lora_rank": lora_rank(config["r"])}
    if isinstance(modules, list):
        # Layers that share a name with a mixture's experts are saved by their weight (models/attached.py).
        weights = [name for name in config.get("target_parameters") or () if name.endswith(".weight")]
        modules = modules + [name.removesuffix(".weight") for name in weights]
        chosen["lora_target_modules"] = sorted({name.rpartition(".")[2] for name in modules} - {"lm_head"})
    return chosen


def lora_rank(rank: int) -> int:
    """Return the smallest rank that vLLM has room for and that holds this one."""
    return next((size for size in (1, 8, 16, 32, 64, 128, 256, 320, 512) if size >= rank), rank)


def truncation(max_length: int | None) -> dict[str, Any] | None:
    """Return how texts are tokenised: cut on the right at ``max_length`` tokens; None: not cut."""
    return None if max_length is None else {"truncation": True, "max_length": max_length}


def sampling_params(settings: Mapping[str, Any], **more: Any) -> SamplingParams:
    """Return vLLM's form of sampling settings."""
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    made = {**settings, **more}
    if made.get("structured_outputs") is not None:
        made["structured_outputs"] = StructuredOutputsParams(**made["structured_outputs"])
    return SamplingParams(**made)


def private_stdout() -> IO[bytes]:
    """Take standard output for the replies; whatever else prints there goes to stderr from now on."""
    sys.stdout.flush()
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return replies


def die_with_parent(parent: int, has_children: bool) -> None:
    """Make sure that nothing survives the process that started this one (Linux; elsewhere stdin says it).

    Args:
        parent: its process id. has_children: vLLM starts processes of its own, so the whole group has to
            be ended, which only a handler can do.
    """
    if not sys.platform.startswith("linux"):
        return
    if has_children:
        signal.signal(signal.SIGTERM, lambda number, frame: end_group())
    wanted = signal.SIGTERM if has_children else signal.SIGKILL
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, int(wanted), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")
    if os.getppid() != parent:  # it died before the request took hold
        end_group()


def end_group() -> None:
    """Kill this process and every one that it started: they share its process group."""
    os.killpg(os.getpgrp(), signal.SIGKILL)


def read_requests(requests: queue.Queue[dict[str, Any]]) -> None:
    """Queue the requests; the end of the input means that nobody is left to read a reply."""
    for line in sys.stdin.buffer:
        requests.put(json.loads(line))
    end_group()


def send(replies: IO[bytes], reply: Reply) -> None:
    """Write one reply and its array."""
    message, array = reply
    if array is not None:
        message = message | {"shape": list(array.shape)}
    replies.write(json.dumps(message).encode() + b"\n")
    if array is not None:
        replies.write(array.tobytes())
    replies.flush()


def report_failures(replies: IO[bytes]) -> None:
    """Let an exception that ends the process be its last reply."""

    def report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        traceback.print_exception(kind, error, trace)
        said = " ".join(str(error).split())[:ERROR_CHARACTERS]
        send(replies, ({"error": f"{kind.__name__}: {said}"}, None))
        end_group()

    sys.excepthook = report


def main() -> None:
    """Serve requests until there are no more."""
    replies = private_stdout()
    report_failures(replies)
    requests: queue.Queue[dict[str, Any]] = queue.Queue()
    first = json.loads(sys.stdin.buffer.readline())
    die_with_parent(first["parent"], first["options"].get("tensor_parallel_size", 1) > 1)
    threading.Thread(target=read_requests, args=(requests,), daemon=True).start()
    server = Server(first)
    send(replies, server.opened())
    while (request := requests.get())["op"] != "close":
        send(replies, server.answer(request))
    server.llm.llm_engine.engine_core.shutdown()
    os._exit(0)


if __name__ == "__main__":
    main()
