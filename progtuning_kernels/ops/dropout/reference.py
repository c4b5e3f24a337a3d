"""dropout in plain torch; see README.md."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import dropout


def drop(x: Tensor, p: float) -> Tensor:
    """x * noise."""
    return dropout(x, p, training=True)
