"""What becomes of the optimizer state of a tensor that stops being active."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..sharding import local_of

OnFreeze = Literal["release", "keep", "offload"]


def release_frozen_state(optimizer: Optimizer) -> int:
    """Drop the state of every parameter that does not require grad; works on any optimizer.

    Returns:
        Bytes of state that were dropped.
    """
    dropped = 0
    for group in optimizer.param_groups:
        for p in group["params"]:
            if not p.requires_grad and p in optimizer.state:
                dropped += _bytes_of(optimizer.state.pop(p))
    return dropped


def offload_frozen_state(optimizer: Optimizer) -> None:
    """Move the state of frozen parameters to pinned CPU memory, that of active ones back.

    Copies are queued on the current stream and nothing waits for them: memory that is given up here
    is used again by later work of the same stream only.
    """
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state.get(p)
            if not state:
                continue
            for key, value in state.items():
                if not isinstance(value, Tensor):
                    continue
                if p.requires_grad:
                    state[key] = value.to(p.device, non_blocking=True)
                elif value.is_cuda:
                    pinned = torch.empty_like(value, device="cpu", pin_memory=True)
                    state[key] = pinned.copy_(value, non_blocking=True)


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes that the optimizer's state tensors occupy on this rank, step counters included."""
    return sum(
        _bytes_of(state) for key, state in optimizer.state.items() if isinstance(key, Tensor)
    )


def _bytes_of(state: dict[str, Any]) -> int:
    tensors = (local_of(t) for t in state.values() if isinstance(t, Tensor))
    return sum(t.untyped_storage().nbytes() for t in tensors)
