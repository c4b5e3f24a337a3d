"""What becomes of the optimizer state: of tensors that freeze, and on its way through a state dict.

`Optimizer.load_state_dict` would cast every tensor of the state to its parameter's dtype: sixteen
bits of the moments of a bfloat16 parameter would be gone, and codes would be anything. State
therefore travels sealed, and is opened where torch hands it over, before anything is changed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..sharding import local_of
from .active_buckets import Member, parameters_of

OnFreeze = Literal["release", "keep", "offload"]
StateDict = dict[str, Any]


def release_frozen_state(optimizer: Optimizer) -> int:
    """Drop the state of every parameter that does not require grad.

    Args:
        optimizer: any; `MaskedAdamW` does this by itself.

    Returns:
        Bytes of state that were dropped.
    """
    frozen = [p for p in parameters_of(optimizer.param_groups) if not p.requires_grad]
    return sum(_bytes_of(optimizer.state.pop(p, {})) for p in frozen)


def settle_frozen_state(optimizer: Optimizer, on_freeze: OnFreeze) -> None:
    """Do with the state of frozen parameters what `on_freeze` says; bring offloaded state back.

    Copies are queued on the current stream and nothing waits for them: memory that is given up here
    is used again by later work of the same stream only.
    """
    if on_freeze == "release":
        release_frozen_state(optimizer)
    if on_freeze != "offload":
        return
    for p in parameters_of(optimizer.param_groups):
        state = optimizer.state.get(p, {})
        for key, value in state.items():
            if not isinstance(value, Tensor):
                continue
            if p.requires_grad:
                state[key] = value.to(p.device, non_blocking=True)
            elif value.is_cuda:
                pinned = torch.empty_like(value, device="cpu", pin_memory=True)
                state[key] = pinned.copy_(value, non_blocking=True)


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes that the optimizer's state tensors occupy on this rank, step counters included.

    Args:
        optimizer: any.
    """
    return sum(
        _bytes_of(state) for key, state in optimizer.state.items() if isinstance(key, Tensor)
    )


def _bytes_of(state: dict[str, Any]) -> int:
    tensors = (local_of(t) for t in state.values() if isinstance(t, Tensor))
    return sum(t.untyped_storage().nbytes() for t in tensors)


@dataclass(frozen=True)
class _Sealed:
    state: dict[str, Any]


def save_state_dict(optimizer: Optimizer, masked: dict[str, Any]) -> StateDict:
    """torch's state dict, with `masked` and with `{}` for a parameter that has no state."""

    def complete(_: Optimizer, saved: StateDict) -> None:
        for i in parameters_of(saved["param_groups"]):
            saved["state"].setdefault(i, {})
        saved["masked"] = masked

    present = set(map(id, parameters_of(optimizer.param_groups)))
    others = [k for k in optimizer.state if isinstance(k, Tensor) and id(k) not in present]
    apart = {p: optimizer.state.pop(p) for p in others}
    if any(apart.values()):
        shapes = ", ".join(str(tuple(p.shape)) for p, state in apart.items() if state)
        warnings.warn(
            f"no group holds the tensors of shape {shapes} any more: their state is not saved. "
            "optimizer.state[new] = optimizer.state.pop(old) hands it on",
            stacklevel=3,
        )
    hook = optimizer.register_state_dict_post_hook(complete, prepend=True)
    try:
        return Optimizer.state_dict(optimizer)
    finally:
        hook.remove()
        optimizer.state.update(apart)


def load_state_dict(
    optimizer: Optimizer,
    state_dict: StateDict,
    check_groups: Callable[[list[dict[str, Any]]], None],
    finish: Callable[[StateDict], None],
) -> None:
    """torch's `load_state_dict`, which hands sealed state to the optimizer's `__setstate__`.

    `check_groups` sees the groups after the user's hooks; `finish` takes what belongs to no
    parameter, before the user's hooks look at the result.
    """
    checked: StateDict = {}

    def seal(_: Optimizer, saved: StateDict) -> StateDict:
        check_groups(saved["param_groups"])
        checked.update(saved)
        own = set(parameters_of(saved["param_groups"]))
        state = {i: _Sealed(s) if i in own else s for i, s in saved["state"].items()}
        return {**saved, "state": state}

    hooks = (
        optimizer.register_load_state_dict_pre_hook(seal),  # after the user's own
        optimizer.register_load_state_dict_post_hook(lambda _: finish(checked), prepend=True),
    )
    try:
        Optimizer.load_state_dict(optimizer, state_dict)
    finally:
        for hook in hooks:
            hook.remove()


def open_state(
    state: dict[Any, Any],
    members: Iterable[Member],
    state_from: Callable[[dict[str, Any], Member], dict[str, Any]],
) -> dict[Any, Any]:
    """The state that `load_state_dict` has sealed, as `state_from` makes it from what was saved."""
    opened = state.copy()
    for member in members:
        sealed = opened.pop(member.parameter, None)
        if sealed is not None and sealed.state:
            opened[member.parameter] = state_from(sealed.state, member)
    return opened
