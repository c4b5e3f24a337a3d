"""What several ops check of their arguments, and that none has a second derivative."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_dtype(op: str, dtype: torch.dtype, name: str = "") -> None:
    """Raise ValueError for a dtype that no op computes in."""
    if dtype not in DTYPES:
        names = ", ".join(str(known).removeprefix("torch.") for known in DTYPES)
        found = f"{name} is {dtype}" if name else f"got {dtype}"
        raise ValueError(f"{op}: {found}, expected one of {names}")


def present(tensors: Iterable[Tensor | None]) -> list[Tensor]:
    """The tensors that are not None."""
    return [tensor for tensor in tensors if tensor is not None]


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """torch's own, but called only where autograd records the backward, as it takes 2 us."""
    refusing = torch.autograd.function.once_differentiable(backward)

    @functools.wraps(backward)
    def call(ctx: Any, *gradients: Tensor | None) -> Any:
        return (refusing if torch.is_grad_enabled() else backward)(ctx, *gradients)

    return call
