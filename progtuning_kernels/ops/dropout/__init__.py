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
    """`F.dropout(x, p, training)`, on a CPU with a mask of its own, in less time and memory.

    That mask is a function of one number of torch's default generator (Philox4x32, Salmon et al.,
    SC 2011), so that `torch.manual_seed` and checkpointing draw it again. 1 - p is rounded to a
    multiple of 2**-16. Other dtypes than float32, bfloat16 and float16 run `F.dropout`.

    Args:
        x: any shape and dtype that `F.dropout` takes.
        p: probability of an element to become 0, in [0, 1].
        training: without it, x comes back as it is.
        implementation: "native" or "reference"; None chooses.

    Returns:
        Of the shape and dtype of x: kept elements times 1 / (1 - p), and zeros.

    Raises:
        ValueError: p is not between 0 and 1, or `implementation` has no such name.
        RuntimeError: the implementation that is asked for cannot run, with its reason.
    """
    if not 0 <= p <= 1:
        raise ValueError(f"dropout: p must be between 0 and 1, got {p}")
    if not training or p in (0, 1) or not x.numel() or torch.compiler.is_compiling():
        return F.dropout(x, p, training)
    return backend.select(OP, x, implementation).function(x, p)
