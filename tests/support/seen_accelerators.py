"""Accelerators that this machine does not have, as torch would report them."""

from __future__ import annotations

import types
from typing import Any


def see(
    monkeypatch: Any,
    kind: str | None,
    count: int = 1,
    *,
    memory: tuple[int, int] = (0, 0),
    bf16: bool | None = True,
    name: str = "",
) -> list[int]:
    """Let torch report accelerators until the test ends.

    Args:
        monkeypatch: of pytest. kind: such as cuda or npu; None for none. count: how many.
        memory: free and total bytes. bf16: what it says of bfloat16; None: it cannot be asked. name: of each.

    Returns:
        The numbers that are claimed from now on.
    """
    import torch

    claimed: list[int] = []
    own = None if kind is None else types.SimpleNamespace(type=kind)
    answers: dict[str, Any] = {
        "current_accelerator": lambda *_, **__: own,
        "is_available": lambda: own is not None,
        "device_count": lambda: count if own is not None else 0,
        "get_memory_info": lambda *_: memory,
        "set_device_index": claimed.append,
        "current_device_index": lambda: claimed[-1] if claimed else 0,
    }
    for attribute, answer in answers.items():
        monkeypatch.setattr(torch.accelerator, attribute, answer)
    module = types.SimpleNamespace(get_device_name=lambda *_: name)
    if bf16 is not None:
        module.is_bf16_supported = lambda *_, **__: bf16
    if kind is not None:
        monkeypatch.setattr(torch, kind, module, raising=False)
        monkeypatch.setattr(torch, "get_device_module", lambda *_: module)
    return claimed
