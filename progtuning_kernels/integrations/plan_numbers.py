"""What the callbacks of all trainers log, and how they treat the optimizer at a change of plan.

A handle here is the `PatchHandle` of a run under way.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

import torch
from torch.optim import Optimizer

from ..model.rows import TrainedRows
from ..optim import MaskedOptimizer, release_frozen_state, state_bytes
from ..schedules import Schedule, decides_in_training

if sys.platform != "win32":
    import resource


def inner_optimizer(optimizer: Any) -> Any:
    """The optimizer inside accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


def device_of(handle: Any) -> torch.device:
    return next(handle.model.parameters()).device


def plan_numbers(handle: Any) -> dict[str, Any]:
    """What a log says of the plan in force; `active_share` of what was trainable before."""
    share = round(handle.active_params / handle.trainable_params, 4)
    return {"stage": handle.stage + 1, "boundary": handle.boundary, "active_share": share}


def saved_decisions(schedule: Schedule, saved: dict[str, Any] | None) -> dict[str, Any] | None:
    """What a checkpoint holds of a schedule that decides in training, if the schedule is one.

    One of plain training, or of a schedule that does not decide, holds nothing: a warning says so.
    """
    if not decides_in_training(schedule):
        return None
    if saved is not None and "format" in saved:
        return saved
    warnings.warn(
        f"the checkpoint holds no decisions of a {type(schedule).__name__}: it begins with its "
        "first stage",
        stacklevel=2,
    )
    return None


def costs(handle: Any, optimizer: Optimizer | None) -> dict[str, Any]:
    """What a log says of memory."""
    found: dict[str, Any] = {"peak_memory_bytes": _peak_memory_bytes(device_of(handle))}
    if optimizer is not None:
        found["state_bytes"] = state_bytes(optimizer)
    if handle.cache is not None:
        found["cache_rows"] = sum(handle.cache.report().rows.values())
    return {key: value for key, value in found.items() if value is not None}


def smaller_norm(masked: MaskedOptimizer, norm: float) -> float:
    """At what a masked optimizer clips in the place of a trainer, which clips at `norm`."""
    return norm if masked.max_grad_norm is None else min(norm, masked.max_grad_norm)


def refuse_without_rows(optimizer: Any, rows: TrainedRows) -> None:
    """Raise `RuntimeError` if rows train of which the optimizer does not know."""
    held = {id(p) for group in inner_optimizer(optimizer).param_groups for p in group["params"]}
    for one in rows.of_tensors:
        # ZeRO's groups have flat tensors, and it says itself what they leave out
        if id(one.leaf) not in held and not hasattr(one.leaf, "_hp_mapping"):
            raise RuntimeError(
                f"ProgtuningCallback: the optimizer was made without the rows of {one.name} that "
                "train: call callback.hold_rows(model) before it is made, or give the callback to "
                "a new Trainer's constructor and let that make the optimizer"
            )


def release(optimizer: Optimizer) -> None:
    """Release the state of what is frozen; a masked optimizer does as it was told."""
    if not isinstance(inner_optimizer(optimizer), MaskedOptimizer):
        release_frozen_state(optimizer)


def _peak_memory_bytes(device: torch.device) -> int | None:
    """Of this process: what was allocated on its GPU, or what it has taken of the CPU's memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
