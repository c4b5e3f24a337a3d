"""layer_norm and rms_norm: what they are called with, and their plain torch; see README.md."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..contract import check_dtype

Cast = Literal["before_weight", "after_weight"]
Result = Tensor | tuple[Tensor, Tensor]


class Norm(NamedTuple):
    """Which norm.

    Attributes:
        eps: added to the mean of squares.
        center: subtract the mean: layer_norm.
        offset: added to the weight.
        cast_first: round to the dtype of h, then multiply by the weight.
    """

    eps: float
    center: bool
    offset: float = 0.0
    cast_first: bool = False

    def output_dtype(self, rows: torch.dtype, weight: Tensor | None) -> torch.dtype:
        if self.cast_first and weight is not None:
            return torch.promote_types(rows, weight.dtype)
        return rows


class Inputs(NamedTuple):
    """x and residual (..., C), weight and bias (C,)."""

    x: Tensor
    residual: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def check(op: str, inputs: Inputs, return_sum: bool) -> None:
    """Raise ValueError where the inputs do not fit together."""
    x, residual, weight, bias = inputs
    shape, device = x.shape, x.device
    if not shape or not shape[-1]:
        raise ValueError(f"{op}: expected rows of at least one element, got {tuple(shape)}")
    if residual is None and return_sum:
        raise ValueError(f"{op}: return_sum needs a residual")
    check_dtype(op, x.dtype, "x")
    row = shape[-1:]
    for name, tensor, expected in (
        ("residual", residual, shape),
        ("weight", weight, row),
        ("bias", bias, row),
    ):
        if tensor is None:
            continue
        if tensor.shape != expected:
            raise ValueError(
                f"{op}: {name} has shape {tuple(tensor.shape)}, expected {tuple(expected)}"
            )
        check_dtype(op, tensor.dtype, name)
        if tensor.device != device:
            raise ValueError(f"{op}: x is on {device}, {name} on {tensor.device}")


def normalise(h: Tensor, weight: Tensor | None, bias: Tensor | None, norm: Norm) -> Tensor:
    """y, bit for bit what the models compute."""
    if norm.center:
        return torch.nn.functional.layer_norm(h, h.shape[-1:], weight, bias, norm.eps)
    wide = h.to(torch.promote_types(h.dtype, torch.float32))
    normalised = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm.eps)
    if weight is None:
        return normalised.to(h.dtype)
    if norm.cast_first:
        return weight * normalised.to(h.dtype)
    scale = weight.to(wide.dtype)
    return (normalised * (norm.offset + scale if norm.offset else scale)).to(h.dtype)


def run(inputs: Inputs, norm: Norm, return_sum: bool, dropout: float = 0.0) -> Result:
    """y, or (y, h) with h = dropout(x) + residual; autograd differentiates it."""
    h = inputs.x
    if dropout:
        h = torch.nn.functional.dropout(h, dropout, training=True)
    if inputs.residual is not None:
        h = h + inputs.residual
    y = normalise(h, inputs.weight, inputs.bias, norm)
    return (y, h) if return_sum else y
