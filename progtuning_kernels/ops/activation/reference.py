"""A(multiplier (x + bias)) * up for four activations: contract and plain torch; see README.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ..contract import check_dtype

Approximate = Literal["none", "tanh"]
Kind = Literal["none", "tanh", "silu"]  # of A: an Approximate, or silu
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]  # of x, bias and up
_CHOICES = get_args(Approximate)
_ATEN = torch.ops.aten


class Inputs(NamedTuple):
    """x and up of one shape, bias (x.shape[-1],)."""

    x: Tensor
    bias: Tensor | None = None
    up: Tensor | None = None


def check(op: str, inputs: Inputs, approximate: str) -> None:
    """Raise ValueError where the inputs do not fit together."""
    x, bias, up = inputs
    if approximate not in _CHOICES:
        raise ValueError(f"{op}: approximate must be one of {_CHOICES}, got {approximate!r}")
    check_dtype(op, x.dtype, "x" if up is None else "gate")
    if bias is not None and (not x.dim() or bias.shape != x.shape[-1:]):
        raise ValueError(f"{op}: x {tuple(x.shape)} and bias {tuple(bias.shape)} do not fit")
    if up is not None and x.shape != up.shape:
        raise ValueError(f"{op}: gate is {tuple(x.shape)}, up is {tuple(up.shape)}")
    for other in (bias, up):
        if other is not None and (x.dtype != other.dtype or x.device != other.device):
            raise ValueError(
                f"{op}: expected one dtype and device, got {x.dtype} on {x.device} and "
                f"{other.dtype} on {other.device}"
            )


def _activated(z: Tensor, kind: Kind) -> Tensor:
    return F.silu(z) if kind == "silu" else F.gelu(z, approximate=kind)


def _argument(x: Tensor, bias: Tensor | None, multiplier: float) -> Tensor:
    z = x if bias is None else x + bias
    return z if multiplier == 1 else z * multiplier


def forward(inputs: Inputs, kind: Kind, multiplier: float = 1.0) -> Tensor:
    """A(multiplier (x + bias)) * up, as a model writes it."""
    x, bias, up = inputs
    out = _activated(_argument(x, bias, multiplier), kind)
    return (out if up is None else out * up).contiguous()


def backward(
    grad: Tensor, inputs: Inputs, kind: Kind, demanded: Sequence[bool], multiplier: float = 1.0
) -> Gradients:
    """What autograd computes of `forward`; up may be None if only its own gradient is demanded."""
    x, bias, up = inputs
    z = _argument(x, bias, multiplier)
    dx, dbias, dup = None, None, None
    if demanded[2]:
        dup = (grad * _activated(z, kind)).contiguous()
    if demanded[0] or demanded[1]:
        grad = grad if up is None else grad * up
        if kind == "silu":
            dz = _ATEN.silu_backward(grad, z)
        else:
            dz = _ATEN.gelu_backward(grad, z, approximate=kind)
        dz = dz if multiplier == 1 else dz * multiplier
        dbias = dz.sum_to_size(bias.shape).contiguous() if demanded[1] else None
        dx = dz.contiguous() if demanded[0] else None
    return dx, dbias, dup
