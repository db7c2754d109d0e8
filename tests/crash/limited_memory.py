"""Several commands in one launch, with less memory than there is: batches fail, or little is said to be free.

LIMITED: JSON of rank -> padded tokens from which on a forward pass fails. FREE: JSON of rank -> bytes free.
IN_TRAINING: as LIMITED, of the body alone, which TRL's fused head calls, and in training only.
"""

from __future__ import annotations

import json
import os
from typing import Any

from crash.several_commands import _all
from dataflex_pipeline import launch
from dataflex_pipeline.launch.team import end_now
from dataflex_pipeline.process import several


def _limit(tokens: int) -> None:
    import torch
    from transformers import LlamaForCausalLM

    plain = LlamaForCausalLM.forward

    def forward(self: Any, input_ids: Any = None, **more: Any) -> Any:
        if input_ids is not None and input_ids.numel() > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return plain(self, input_ids=input_ids, **more)

    LlamaForCausalLM.forward = forward


def _limit_training(tokens: int) -> None:
    import torch
    from transformers import LlamaModel

    plain = LlamaModel.forward

    def forward(self: Any, input_ids: Any = None, *given: Any, **more: Any) -> Any:
        if self.training and input_ids is not None and input_ids.numel() > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return plain(self, input_ids, *given, **more)

    LlamaModel.forward = forward


def _free(count: int) -> None:
    from dataflex_pipeline.models import memory

    memory.free_bytes = lambda device: count


if __name__ == "__main__":
    own = str(launch.rank())
    for name, act in (("LIMITED", _limit), ("FREE", _free), ("IN_TRAINING", _limit_training)):
        said = json.loads(os.environ.get(name, "{}"))
        if own in said:
            act(said[own])
    end_now(_all() if launch.world_size() == 1 else several.run(_all))
