"""dropout: `F.dropout` in training, on a CPU from random numbers of our own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import backend
from . import native, reference

OP = backend.register(
    backend.Op(
        "dropout",
        (
            backend.Implementation("native", native.drop, native.reason_against),
            backend.Implementation("reference", reference.drop),
        ),
        probe=lambda device: torch.zeros(8, dtype=torch.float32, device=device),
    )
)


def dropout(
    x: Tensor, p: float = 0.5, training: bool = True, *, implementation: str | None = None
) -> Tensor:
    """`F.dropout(x, p, training)` with a mask of its own, a function of torch's generator.

    Args:
        x: any shape and dtype that `F.dropout` takes.
        p: probability of an element to become 0.
        training: without it, x comes back as it is.
        implementation: "native" or "reference"; None chooses (see `backend.select`).

    Raises:
        ValueError: p is not between 0 and 1.
    """
    if not 0 <= p <= 1:
        raise ValueError(f"dropout: p must be between 0 and 1, got {p}")
    if not training or p in (0, 1) or not x.numel() or torch.compiler.is_compiling():
        return F.dropout(x, p, training)
    return backend.select(OP, x, implementation).function(x, p)
