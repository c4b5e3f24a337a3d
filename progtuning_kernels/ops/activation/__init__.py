"""gelu, bias_gelu, swiglu and geglu: activations whose backward recomputes and obeys the demand.

    gelu = G(x)    bias_gelu = G(x + bias)    swiglu = silu(gate) * up    geglu = G(gate) * up

with G(z) = z * Phi(z) for approximate="none", and for "tanh" the usual approximation of Phi:
all four are A(x + bias) * up, with no bias or no up, and here have one implementation.

- x, gate, up: any shape, gate and up the same; bias: (x.shape[-1],). One device and one dtype per
  call: float32, bfloat16 or float16, in the reference float64, too. Nothing is mutated.
- Halves of one tensor along the last dimension (`gate_up.chunk(2, -1)`), and all else that is rows
  with a stride, are read where they are. Results and gradients are contiguous.
- Saved for backward are the tensors themselves: x, or gate and up, and bias; up only for dgate,
  nothing if no gradient is demanded. An undemanded gradient is None, and no memory is taken for it.
- The reference has the bits of the plain torch code, forward and backward: `F.gelu(x + bias)`,
  `F.silu(gate) * up`, rounded to the dtype after every step.
- Triton computes in float32 and rounds once, so it is nearer to the truth and a rounding or two
  off the reference in bfloat16 and float16. Finite x gives a finite gradient up to the largest
  float32, where torch's "tanh" and eager products in float16 give NaN or inf. At inf and NaN it
  gives what the float32 formula of torch gives.
- dbias in Triton: fixed pieces of rows, summed in float32 in a fixed order without atomics.
- There is no second derivative.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ... import backend

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
Approximate = Literal["none", "tanh"]
Kind = Literal["none", "tanh", "silu"]  # of A: an Approximate, or silu
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]  # of x, bias and up
_ATEN = torch.ops.aten


def _activated(z: Tensor, kind: Kind) -> Tensor:
    return F.silu(z) if kind == "silu" else F.gelu(z, approximate=kind)


def reference(x: Tensor, bias: Tensor | None, up: Tensor | None, kind: Kind) -> Tensor:
    """A(x + bias) * up, as a model writes it."""
    out = _activated(x if bias is None else x + bias, kind)
    return (out if up is None else out * up).contiguous()


def reference_backward(
    grad: Tensor,
    x: Tensor,
    bias: Tensor | None,
    up: Tensor | None,
    kind: Kind,
    demanded: Sequence[bool],
) -> Gradients:
    """What autograd computes of `reference`; up may be None if only its own gradient is demanded"""
    z = x if bias is None else x + bias
    dx, dbias, dup = None, None, None
    if demanded[2]:
        dup = (grad * _activated(z, kind)).contiguous()
    if demanded[0] or demanded[1]:
        grad = grad if up is None else grad * up
        if kind == "silu":
            dz = _ATEN.silu_backward(grad, z)
        else:
            dz = _ATEN.gelu_backward(grad, z, approximate=kind)
        dbias = dz.sum_to_size(bias.shape).contiguous() if demanded[1] else None
        dx = dz.contiguous() if demanded[0] else None
    return dx, dbias, dup


def _triton(x: Tensor, bias: Tensor | None, up: Tensor | None, kind: Kind) -> Tensor:
    from .triton import forward  # not before it is needed: triton need not be there

    return forward(x, bias, up, kind)


def _triton_backward(*arguments: Any) -> Gradients:
    from .triton import backward

    return backward(*arguments)


def _reason_against_triton(tensors: Sequence[Tensor]) -> str | None:
    reason = backend.triton_reason(tensors[0].device)
    if reason is None and tensors[0].dtype == torch.float64:
        return "no Triton kernel for torch.float64"
    return reason


_BACKWARDS: dict[str, Callable[..., Gradients]] = {
    "triton": _triton_backward,
    "reference": reference_backward,
}


def _register(name: str) -> backend.Op:
    implementations = (
        backend.Implementation("triton", _triton, _reason_against_triton),
        backend.Implementation("reference", reference, lambda tensors: None),
    )
    return backend.register(backend.Op(name, implementations))


GELU, BIAS_GELU = _register("gelu"), _register("bias_gelu")
SWIGLU, GEGLU = _register("swiglu"), _register("geglu")


def gelu(
    x: Tensor, *, approximate: Approximate = "none", implementation: str | None = None
) -> Tensor:
    """`F.gelu(x, approximate=approximate)`.

    Args:
        x: float32, bfloat16, float16 or float64.
        approximate: "none", or "tanh".
        implementation: "triton" or "reference"; None chooses (see `backend.select`).
    """
    _check("gelu", x, approximate)
    if torch.compiler.is_compiling():
        return gelu_op(x, approximate, implementation)
    return _run(GELU, x, None, None, approximate, implementation)


def bias_gelu(
    x: Tensor,
    bias: Tensor,
    *,
    approximate: Approximate = "none",
    implementation: str | None = None,
) -> Tensor:
    """`F.gelu(x + bias, approximate=approximate)`, for a linear layer without its bias.

    Args:
        x, bias: of one dtype; bias has one element per column of x.
        approximate, implementation: as in `gelu`.
    """
    _check("bias_gelu", x, approximate)
    if not x.dim() or bias.shape != x.shape[-1:]:
        raise ValueError(f"bias_gelu: x {tuple(x.shape)} and bias {tuple(bias.shape)} do not fit")
    _check_alike("bias_gelu", x, bias)
    if torch.compiler.is_compiling():
        return bias_gelu_op(x, bias, approximate, implementation)
    return _run(BIAS_GELU, x, bias, None, approximate, implementation)


def swiglu(gate: Tensor, up: Tensor, *, implementation: str | None = None) -> Tensor:
    """`F.silu(gate) * up`.

    Args:
        gate, up: of one shape and dtype, also the halves of one tensor.
        implementation: as in `gelu`.
    """
    _check_gated("swiglu", gate, up, "none")
    if torch.compiler.is_compiling():
        return swiglu_op(gate, up, implementation)
    return _run(SWIGLU, gate, None, up, "silu", implementation)


def geglu(
    gate: Tensor,
    up: Tensor,
    *,
    approximate: Approximate = "none",
    implementation: str | None = None,
) -> Tensor:
    """`F.gelu(gate, approximate=approximate) * up`.

    Args:
        gate, up: of one shape and dtype, also the halves of one tensor.
        approximate, implementation: as in `gelu`.
    """
    _check_gated("geglu", gate, up, approximate)
    if torch.compiler.is_compiling():
        return geglu_op(gate, up, approximate, implementation)
    return _run(GEGLU, gate, None, up, approximate, implementation)


def _check(name: str, x: Tensor, approximate: str) -> None:
    if approximate not in get_args(Approximate):
        choices = get_args(Approximate)
        raise ValueError(f"{name}: approximate must be one of {choices}, got {approximate!r}")
    if x.dtype not in DTYPES:
        names = ", ".join(str(known).removeprefix("torch.") for known in DTYPES)
        raise ValueError(f"{name}: expected {names}, got {x.dtype}")


def _check_alike(name: str, x: Tensor, other: Tensor) -> None:
    if x.dtype != other.dtype or x.device != other.device:
        raise ValueError(
            f"{name}: expected one dtype and device, got {x.dtype} on {x.device} and "
            f"{other.dtype} on {other.device}"
        )


def _check_gated(name: str, gate: Tensor, up: Tensor, approximate: str) -> None:
    _check(name, gate, approximate)
    if gate.shape != up.shape:
        raise ValueError(f"{name}: gate is {tuple(gate.shape)}, up is {tuple(up.shape)}")
    _check_alike(name, gate, up)


def _run(
    op: backend.Op,
    x: Tensor,
    bias: Tensor | None,
    up: Tensor | None,
    kind: Kind,
    implementation: str | None,
) -> Tensor:
    chosen = backend.select(op, [x], implementation)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, bias, up)):
        return _Activation.apply(x, bias, up, kind, chosen)
    return chosen.function(x, bias, up, kind)


class _Activation(torch.autograd.Function):
    """Eager mode: around the implementation itself, because a custom op costs 20 us more."""

    @staticmethod
    def forward(ctx, x, bias, up, kind, chosen):
        ctx.save_for_backward(x, bias, up if ctx.needs_input_grad[0] else None)
        ctx.kind, ctx.name = kind, chosen.name
        return chosen.function(x, bias, up, kind)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        run, demanded = _BACKWARDS[ctx.name], ctx.needs_input_grad[:3]
        return *run(grad, *ctx.saved_tensors, ctx.kind, demanded), None, None


@torch.library.custom_op("progtuning::gelu", mutates_args=())
def gelu_op(x: Tensor, approximate: str = "none", implementation: str | None = None) -> Tensor:
    return gelu(x, approximate=approximate, implementation=implementation)


@torch.library.custom_op("progtuning::bias_gelu", mutates_args=())
def bias_gelu_op(
    x: Tensor, bias: Tensor, approximate: str = "none", implementation: str | None = None
) -> Tensor:
    return bias_gelu(x, bias, approximate=approximate, implementation=implementation)


@torch.library.custom_op("progtuning::swiglu", mutates_args=())
def swiglu_op(gate: Tensor, up: Tensor, implementation: str | None = None) -> Tensor:
    return swiglu(gate, up, implementation=implementation)


@torch.library.custom_op("progtuning::geglu", mutates_args=())
def geglu_op(
    gate: Tensor, up: Tensor, approximate: str = "none", implementation: str | None = None
) -> Tensor:
    return geglu(gate, up, approximate=approximate, implementation=implementation)


@torch.library.custom_op("progtuning::activation_backward", mutates_args=())
def activation_backward_op(
    grad: Tensor,
    x: Tensor,
    bias: Tensor | None,
    up: Tensor | None,
    kind: str,
    demanded: Sequence[bool],
    implementation: str | None = None,
) -> list[Tensor]:
    """The demanded ones of dx, dbias and dup, in this order."""
    name = backend.select(GELU, [x], implementation).name
    gradients = _BACKWARDS[name](grad, x, bias, up, kind, demanded)
    return [gradient for gradient in gradients if gradient is not None]


@activation_backward_op.register_fake
def _(grad, x, bias, up, kind, demanded, implementation=None):
    shapes = (x, bias, x)  # up is not there if only its own gradient is demanded
    return [_contiguous_like(t) for t, wanted in zip(shapes, demanded, strict=True) if wanted]


def _contiguous_like(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _differentiate(op: torch.library.CustomOpDef, slots: Sequence[int], kind: Kind | None) -> None:
    """Registers what torch.compile asks for.

    Args:
        slots: where the op's tensors, its first arguments, stand in (x, bias, up).
        kind: None: the argument behind the tensors.
    """

    def setup_context(ctx, inputs, output):
        tensors, ctx.demanded = [None, None, None], [False, False, False]
        for i, slot in enumerate(slots):
            tensors[slot], ctx.demanded[slot] = inputs[i], ctx.needs_input_grad[i]
        x, bias, up = tensors
        ctx.save_for_backward(x, bias, up if ctx.demanded[0] else None)
        ctx.kind = inputs[len(slots)] if kind is None else kind
        ctx.implementation, ctx.others = inputs[-1], len(inputs) - len(slots)

    def backward(ctx, grad):
        arguments = (*ctx.saved_tensors, ctx.kind, ctx.demanded, ctx.implementation)
        gradients = iter(activation_backward_op(grad, *arguments))
        by_tensor = [next(gradients) if ctx.demanded[slot] else None for slot in slots]
        return *by_tensor, *[None] * ctx.others

    op.register_fake(_contiguous_like)
    op.register_autograd(backward, setup_context=setup_context)


_differentiate(gelu_op, (0,), None)
_differentiate(bias_gelu_op, (0, 1), None)
_differentiate(swiglu_op, (0, 2), "silu")
_differentiate(geglu_op, (0, 2), None)
