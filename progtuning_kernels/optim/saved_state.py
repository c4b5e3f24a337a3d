"""State dicts on their way through torch, whose hooks see all of them.

`Optimizer.load_state_dict` would cast every tensor of the state to its parameter's dtype: sixteen
bits of the moments of a bfloat16 parameter would be gone, and codes would be anything. State
therefore travels sealed, and is opened where torch hands it over, before anything is changed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from .groups import Member, parameters_of

StateDict = dict[str, Any]


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

    Args:
        check_groups: refuses groups, as the user's hooks have left them.
        finish: takes what belongs to no parameter, before the user's hooks look at the result.
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
