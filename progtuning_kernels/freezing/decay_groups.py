"""Which parameters decay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn


def decay_groups(
    parameters: Sequence[nn.Parameter], weight_decay: float | None
) -> list[dict[str, Any]]:
    """Parameter groups with and without decay; an empty one is left out.

    Matrices decay, by the optimizer's default where `weight_decay` is None; what has one dimension
    or none, as biases and norm weights have, does not.
    """
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim >= 2]},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    if weight_decay is not None:
        groups[0]["weight_decay"] = weight_decay
    return [group for group in groups if group["params"]]
