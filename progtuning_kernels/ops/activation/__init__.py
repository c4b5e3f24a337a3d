"""gelu, bias_gelu, swiglu and geglu: activations whose backward recomputes and obeys the demand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import backend
from ..contract import once_differentiable
from . import reference
from .reference import Approximate, Inputs, Kind


def _reason_against_triton(inputs: Sequence[Any]) -> str | None:
    return backend.triton_reason(inputs[0].device, inputs[0].dtype)


def _probe(device: torch.device) -> Inputs:
    return Inputs(torch.zeros(8, dtype=torch.float32, device=device))


def _register(name: str) -> backend.Op:
    forward = backend.triton_function(__name__, "forward")
    backward = backend.triton_function(__name__, "backward")
    implementations = (
        backend.Implementation("triton", forward, _reason_against_triton, backward=backward),
        backend.Implementation("reference", reference.forward, backward=reference.backward),
    )
    return backend.register(backend.Op(name, implementations, _probe))


GELU, BIAS_GELU = _register("gelu"), _register("bias_gelu")
SWIGLU, GEGLU = _register("swiglu"), _register("geglu")


def gelu(
    x: Tensor, *, approximate: Approximate = "none", implementation: str | None = None
) -> Tensor:
    """`F.gelu(x, approximate=approximate)`.

    The formula is Hendrycks and Gimpel's (arXiv 1606.08415). There is no second derivative.

    Args:
        x: any shape; float32, bfloat16, float16 or float64.
        approximate: "none", or "tanh".
        implementation: "triton" or "reference"; None chooses.

    Returns:
        Contiguous, of the shape and dtype of x.

    Raises:
        ValueError: the arguments do not fit together, or `implementation` has no such name.
        RuntimeError: the implementation that is asked for cannot run, with its reason.
    """
    reference.check("gelu", Inputs(x), approximate)
    return _run(GELU, Inputs(x), approximate, implementation)


def bias_gelu(
    x: Tensor,
    bias: Tensor,
    *,
    approximate: Approximate = "none",
    implementation: str | None = None,
) -> Tensor:
    """`F.gelu(x + bias, approximate=approximate)`, for a linear layer without its bias.

    Args:
        x: (..., C); dtypes as in `gelu`.
        bias: (C,), of the dtype and device of x.
        approximate: as in `gelu`.
        implementation: as in `gelu`.

    Returns:
        Contiguous, of the shape and dtype of x.

    Raises:
        ValueError: as `gelu`.
        RuntimeError: as `gelu`.
    """
    reference.check("bias_gelu", Inputs(x, bias), approximate)
    return _run(BIAS_GELU, Inputs(x, bias), approximate, implementation)


def swiglu(
    gate: Tensor, up: Tensor, *, gate_multiplier: float = 1.0, implementation: str | None = None
) -> Tensor:
    """`F.silu(gate * gate_multiplier) * up` (Shazeer, arXiv 2002.05202).

    Args:
        gate: any shape; dtypes as in `gelu`. May be half of a tensor, up the other half.
        up: of the shape, dtype and device of gate.
        gate_multiplier: a number, as in Falcon-H1; no gradient.
        implementation: as in `gelu`.

    Returns:
        Contiguous, of the shape and dtype of gate.

    Raises:
        ValueError: as `gelu`.
        RuntimeError: as `gelu`.
    """
    reference.check("swiglu", Inputs(gate, up=up), "none")
    return _run(SWIGLU, Inputs(gate, up=up), "silu", implementation, float(gate_multiplier))


def geglu(
    gate: Tensor,
    up: Tensor,
    *,
    approximate: Approximate = "none",
    implementation: str | None = None,
) -> Tensor:
    """`F.gelu(gate, approximate=approximate) * up` (Shazeer, arXiv 2002.05202).

    Args:
        gate: any shape; dtypes as in `gelu`. May be half of a tensor, up the other half.
        up: of the shape, dtype and device of gate.
        approximate: as in `gelu`.
        implementation: as in `gelu`.

    Returns:
        Contiguous, of the shape and dtype of gate.

    Raises:
        ValueError: as `gelu`.
        RuntimeError: as `gelu`.
    """
    reference.check("geglu", Inputs(gate, up=up), approximate)
    return _run(GEGLU, Inputs(gate, up=up), approximate, implementation)


def _run(
    op: backend.Op,
    inputs: Inputs,
    kind: Kind,
    implementation: str | None,
    multiplier: float = 1.0,
) -> Tensor:
    chosen = backend.select(op, inputs, implementation)
    if torch.compiler.is_compiling():
        return chosen.function(inputs, kind, multiplier)
    if torch.is_grad_enabled() and any([t is not None and t.requires_grad for t in inputs]):
        return _Activation.apply(*inputs, kind, multiplier, chosen)
    return chosen.function(inputs, kind, multiplier)


class _Activation(torch.autograd.Function):
    """An implementation with its backward; a custom op would cost 20 us more in eager mode."""

    @staticmethod
    def forward(ctx, x, bias, up, kind, multiplier, chosen):
        ctx.save_for_backward(x, bias, up if ctx.needs_input_grad[0] else None)
        ctx.kind, ctx.multiplier, ctx.chosen = kind, multiplier, chosen
        return chosen.function(Inputs(x, bias, up), kind, multiplier)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        inputs, demanded = Inputs(*ctx.saved_tensors), ctx.needs_input_grad[:3]
        gradients = ctx.chosen.backward(grad, inputs, ctx.kind, demanded, ctx.multiplier)
        return *gradients, None, None, None
