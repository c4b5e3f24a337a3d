"""Parameter groups for optimizers: all parameters, so that a change of plan changes no group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..model.layout import Layout, parameter_slots
from .active_set import ActiveSet


def decay_groups(
    parameters: Sequence[nn.Parameter], weight_decay: float | None
) -> list[dict[str, Any]]:
    """Parameter groups with and without decay; an empty one is left out.

    Matrices decay, as the optimizer says where `weight_decay` is None; biases and norm weights,
    which have one dimension or none, do not.
    """
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim >= 2]},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    if weight_decay is not None:
        groups[0]["weight_decay"] = weight_decay
    return [group for group in groups if group["params"]]


def param_groups(
    model: nn.Module,
    layout: Layout,
    active: ActiveSet,
    *,
    lr: float | None,
    weight_decay: float | None,
    by_unit: bool,
) -> list[dict[str, Any]]:
    """See `PatchHandle.param_groups`."""
    slots = list(parameter_slots(model, layout))
    names = {id(slot.parameter): slot.name for slot in slots}
    if by_unit:
        groups = []
        for unit in layout.units:
            own = [slot.parameter for slot in slots if active.freezes_with(slot) == unit]
            groups += [{**group, "unit": unit} for group in decay_groups(own, weight_decay)]
    else:
        groups = decay_groups([slot.parameter for slot in slots], weight_decay)
    for group in groups:
        group["param_names"] = [names[id(p)] for p in group["params"]]
        if lr is not None:
            group["lr"] = lr
    return groups
