"""layer_norm and rms_norm: what they are called with, and their plain torch; see README.md."""

from __future__ import annotations

from collections.abc import Sequence
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
    """Raises ValueError where the inputs do not fit together."""
    x = inputs.x
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"{op}: expected rows of at least one element, got {tuple(x.shape)}")
    if inputs.residual is None and return_sum:
        raise ValueError(f"{op}: return_sum needs a residual")
    for name, tensor in inputs._asdict().items():
        if tensor is None:
            continue
        shape = x.shape if name in ("x", "residual") else x.shape[-1:]
        if tensor.shape != shape:
            raise ValueError(
                f"{op}: {name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}"
            )
        check_dtype(op, tensor.dtype, name)
        if tensor.device != x.device:
            raise ValueError(f"{op}: x is on {x.device}, {name} on {tensor.device}")


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


def sum_of(inputs: Inputs, dropout: float = 0.0) -> Tensor:
    """h = dropout(x) + residual."""
    x = inputs.x
    if dropout:
        x = torch.nn.functional.dropout(x, dropout, training=True)
    return x if inputs.residual is None else x + inputs.residual


def run(inputs: Inputs, norm: Norm, return_sum: bool, dropout: float = 0.0) -> Result:
    """y or (y, h), differentiated by autograd."""
    h = sum_of(inputs, dropout)
    y = normalise(h, inputs.weight, inputs.bias, norm)
    return (y, h) if return_sum else y


def forward(inputs: Inputs, norm: Norm) -> tuple[Tensor, Tensor | None, Tensor]:
    """y, mean and 1 / sqrt(...) of x, for an operator, which cannot use autograd."""
    x, _, weight, bias = inputs
    x = x.contiguous()  # an operator's results have the strides that its fake has promised
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    mean = wide.mean(-1) if norm.center else None
    if mean is not None:
        wide = wide - mean.unsqueeze(-1)
    rstd = torch.rsqrt(wide.square().mean(-1) + norm.eps)
    y = wide * rstd.unsqueeze(-1)
    if norm.cast_first:
        y = y.to(x.dtype)
    if weight is not None:
        y = y * (weight if norm.cast_first else weight.to(wide.dtype) + norm.offset)
    if bias is not None:
        y = y + bias
    return y.to(norm.output_dtype(x.dtype, weight)), mean, rstd


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    norm: Norm,
    demanded: Sequence[bool],
) -> list[Tensor | None]:
    """The demanded ones of the gradients of x, weight and bias (that in the weight's dtype)."""
    x, columns = x.contiguous(), x.shape[-1]
    normalised = x.to(rstd.dtype)
    if mean is not None:
        normalised = normalised - mean.unsqueeze(-1)
    normalised = normalised * rstd.unsqueeze(-1)
    dy = dy.contiguous().to(rstd.dtype)
    dx = dweight = dbias = None
    if demanded[0]:
        scaled = dy if weight is None else dy * (weight.to(rstd.dtype) + norm.offset)
        dx = scaled - normalised * (normalised * scaled).mean(-1, keepdim=True)
        if norm.center:
            dx = dx - scaled.mean(-1, keepdim=True)
        dx = (dx * rstd.unsqueeze(-1)).to(x.dtype)
    parameter_dtype = x.dtype if weight is None else weight.dtype
    if demanded[1]:
        dweight = (dy * normalised).reshape(-1, columns).sum(0).to(parameter_dtype)
    if demanded[2]:
        dbias = dy.reshape(-1, columns).sum(0).to(parameter_dtype)
    return [dx, dweight, dbias]
