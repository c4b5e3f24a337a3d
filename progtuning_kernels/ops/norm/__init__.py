"""layer_norm and rms_norm: a norm over the last dimension that computes the gradients demanded.

    h = dropout(x) + residual  (each rounded to its dtype, as torch does; h = x without a residual)
    layer_norm:  y = (h - mean(h)) / sqrt(var(h) + eps) * weight + bias
    rms_norm:    y = h / sqrt(mean(h^2) + eps) * (offset + weight)

- x, residual: any shape (..., C), any strides, one device; float32, bfloat16, float16 or float64.
  weight and bias: (C,), or None. Nothing is mutated.
- The result is y, or (y, h) with `return_sum`: a pre-norm block goes on with both, a post-norm
  encoder with y alone.
- Sums and statistics are float32 (float64 for float64). Triton keeps h and the statistics of its
  rows for backward, and of them nothing where no gradient is demanded; each gradient is computed
  and allocated only if its input requires it. h requires a gradient only if x or residual does.
- The reference is what the models compute, in their order of operations, differentiated by
  autograd; only T5 in half precision rounds the gradient of x once more. Triton differs from it
  in the order of sums, and rounds a gradient once, at its end.
- dropout, only of layer_norm and before a residual, as in post-norm encoders (BERT): zeros with
  probability p, the other elements over 1 - p. The reference draws the models' own random numbers.
  Triton draws one number, its seed, from the same generator of torch, and keeps that instead of the
  mask: checkpointing, which restores the generator, recomputes the same mask. What is dropped is 0
  even where x is not finite.
- Triton's gradients of weight and bias are sums over a number of parts that depends on the number
  of rows alone, in a fixed order: the same bits at every call, and on every GPU of one kind.
- Under torch.compile, h and its dropout are plain torch, which the compiler fuses with their
  neighbours, and the norm is one custom operator.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ... import backend

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# A program holds a row in registers; of wider ones, backward would spill.
MAX_TRITON_COLUMNS = 8192
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


def reference(h: Tensor, weight: Tensor | None, bias: Tensor | None, norm: Norm) -> Tensor:
    """Plain torch, bit for bit what the models compute."""
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


def _sum(x: Tensor, residual: Tensor | None, dropout: float = 0.0) -> Tensor:
    if dropout:
        x = torch.nn.functional.dropout(x, dropout, training=True)
    return x if residual is None else x + residual


def _reference(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: Norm,
    return_sum: bool,
    dropout: float = 0.0,
) -> Result:
    h = _sum(x, residual, dropout)
    y = reference(h, weight, bias, norm)
    return (y, h) if return_sum else y


def _triton(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: Norm,
    return_sum: bool,
    dropout: float = 0.0,
) -> Result:
    from . import triton as norm_triton

    return norm_triton.norm(x, residual, weight, bias, norm, return_sum, dropout)


def _explicit_forward(
    h: Tensor, weight: Tensor | None, bias: Tensor | None, norm: Norm
) -> tuple[Tensor, Tensor | None, Tensor]:
    """y, mean and 1 / sqrt(...) in plain torch without autograd, which an operator cannot use."""
    h = h.contiguous()  # an operator's results have the strides that its fake has promised
    wide = h.to(torch.promote_types(h.dtype, torch.float32))
    mean = wide.mean(-1) if norm.center else None
    if mean is not None:
        wide = wide - mean.unsqueeze(-1)
    rstd = torch.rsqrt(wide.square().mean(-1) + norm.eps)
    y = wide * rstd.unsqueeze(-1)
    if norm.cast_first:
        y = y.to(h.dtype)
    if weight is not None:
        y = y * (weight if norm.cast_first else weight.to(wide.dtype) + norm.offset)
    if bias is not None:
        y = y + bias
    return y.to(norm.output_dtype(h.dtype, weight)), mean, rstd


def _explicit_backward(
    dy: Tensor,
    h: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    norm: Norm,
    demanded: Sequence[bool],
) -> list[Tensor]:
    """The demanded ones of the gradients of h, weight and bias (that in the weight's dtype)."""
    h, columns = h.contiguous(), h.shape[-1]
    normalised = h.to(rstd.dtype)
    if mean is not None:
        normalised = normalised - mean.unsqueeze(-1)
    normalised = normalised * rstd.unsqueeze(-1)
    dy = dy.contiguous().to(rstd.dtype)
    gradients = []
    if demanded[0]:
        scaled = dy if weight is None else dy * (weight.to(rstd.dtype) + norm.offset)
        dh = scaled - normalised * (normalised * scaled).mean(-1, keepdim=True)
        if norm.center:
            dh = dh - scaled.mean(-1, keepdim=True)
        gradients.append((dh * rstd.unsqueeze(-1)).to(h.dtype))
    parameter_dtype = h.dtype if weight is None else weight.dtype
    if demanded[1]:
        dweight = (dy * normalised).reshape(-1, columns).sum(0)
        gradients.append(dweight.to(parameter_dtype))
    if demanded[2]:
        gradients.append(dy.reshape(-1, columns).sum(0).to(parameter_dtype))
    return gradients


def _reason_against_triton(tensors: Sequence[Tensor | None]) -> str | None:
    """Tensors: x, and what else there is of residual, weight and bias."""
    x = tensors[0]
    reason = backend.triton_reason(x.device)
    if reason is not None:
        return reason
    if x.shape[-1] > MAX_TRITON_COLUMNS:
        return f"rows of {x.shape[-1]} elements; Triton's are at most {MAX_TRITON_COLUMNS}"
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.dtype == torch.float64:
            return "no Triton kernel for torch.float64"
        if type(tensor) not in (Tensor, torch.nn.Parameter):
            return f"no Triton kernel for tensors of type {type(tensor).__name__}"
    return None


def _reason_against_triton_layer_norm(tensors: Sequence[Tensor | None]) -> str | None:
    dtypes = {tensor.dtype for tensor in tensors if tensor is not None}
    if dtypes != {torch.float32} and torch.is_autocast_enabled(tensors[0].device.type):
        return "autocast chooses the dtype of layer_norm"
    reason = _reason_against_triton(tensors)
    if reason is None and len(dtypes) > 1:
        # x and residual may differ; their sum has to have the dtype of weight and bias
        x, residual, *parameters = tensors
        h = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
        if any(p is not None and p.dtype != h for p in parameters):
            return f"weight or bias is not {h}"
    return reason


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    residual: Tensor | None = None,
    dropout: float = 0.0,
    return_sum: bool = False,
    implementation: str | None = None,
) -> Result:
    """LayerNorm over the last dimension of dropout(x) + residual.

    Args:
        x: (..., C). residual: of the same shape, or None.
        weight, bias: (C,), or None.
        eps: added to the variance.
        dropout: probability in [0, 1]: x is dropped out before the residual is added, and the
            elements that are kept are scaled by 1 / (1 - dropout). Only with a residual.
        return_sum: return (y, dropout(x) + residual).
        implementation: "triton" or "reference"; None chooses (see `backend.select`).
    """
    _check("layer_norm", x, residual, weight, bias, return_sum)
    if not 0 <= dropout <= 1:
        raise ValueError(f"layer_norm: dropout must be in [0, 1], got {dropout}")
    if dropout and residual is None:
        raise ValueError("layer_norm: dropout needs a residual")
    tensors = [x, residual, weight, bias]
    norm = Norm(eps, center=True)
    if torch.compiler.is_compiling():
        if torch.is_autocast_enabled(x.device.type):
            return _reference(*tensors, norm, return_sum, dropout)
        h = _sum(x, residual, dropout)
        y = layer_norm_op(h, weight, bias, eps, implementation)[0]
        return (y, h) if return_sum else y
    function = backend.select(LAYER_NORM, tensors, implementation).function
    return function(*tensors, norm, return_sum, dropout)


def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    offset: float = 0.0,
    cast: Cast = "before_weight",
    residual: Tensor | None = None,
    return_sum: bool = False,
    implementation: str | None = None,
) -> Result:
    """RMSNorm over the last dimension of x + residual.

    Args:
        x: (..., C). residual: of the same shape, or None.
        weight: (C,), or None; its dtype may differ from that of x.
        eps: added to the mean of squares.
        offset: added to the weight, in float32: 1 in Gemma. Only with cast "after_weight".
        cast: "before_weight": normalise in float32, round to the dtype of x + residual, multiply
            by the weight (Llama, Qwen, Mistral, T5): a float32 weight makes a float32 result.
            "after_weight": all in float32, rounded at the end (Gemma, OLMo 2, gpt-oss).
        return_sum: return (y, x + residual).
        implementation: "triton" or "reference"; None chooses (see `backend.select`).
    """
    _check("rms_norm", x, residual, weight, None, return_sum)
    if cast not in get_args(Cast):
        raise ValueError(f"rms_norm: cast must be one of {get_args(Cast)}, got {cast!r}")
    cast_first = cast == "before_weight"
    if offset and cast_first:
        raise ValueError('rms_norm: an offset needs cast="after_weight"')
    if torch.compiler.is_compiling():
        h = _sum(x, residual)
        y = rms_norm_op(h, weight, eps, offset, cast_first, implementation)[0]
        return (y, h) if return_sum else y
    norm = Norm(eps, center=False, offset=offset, cast_first=cast_first)
    function = backend.select(RMS_NORM, [x, residual, weight], implementation).function
    return function(x, residual, weight, None, norm, return_sum)


def _check(
    op: str,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    return_sum: bool,
) -> None:
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"{op}: expected rows of at least one element, got {tuple(x.shape)}")
    if residual is None and return_sum:
        raise ValueError(f"{op}: return_sum needs a residual")
    expected = {"x": x.shape, "residual": x.shape, "weight": x.shape[-1:], "bias": x.shape[-1:]}
    for (name, shape), tensor in zip(expected.items(), (x, residual, weight, bias), strict=True):
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(
                f"{op}: {name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}"
            )
        if tensor.dtype not in DTYPES:
            names = ", ".join(str(known).removeprefix("torch.") for known in DTYPES)
            raise ValueError(f"{op}: {name} is {tensor.dtype}, expected one of {names}")
        if tensor.device != x.device:
            raise ValueError(f"{op}: x is on {x.device}, {name} on {tensor.device}")


def _probe(device: torch.device) -> Sequence[Tensor | None]:
    return [
        torch.zeros(2, 8, dtype=torch.float32, device=device),
        None,
        torch.zeros(8, dtype=torch.float32, device=device),
    ]


LAYER_NORM = backend.register(
    backend.Op(
        "layer_norm",
        (
            backend.Implementation("triton", _triton, _reason_against_triton_layer_norm),
            backend.Implementation("reference", _reference, lambda tensors: None),
        ),
        _probe,
    )
)
RMS_NORM = backend.register(
    backend.Op(
        "rms_norm",
        (
            backend.Implementation("triton", _triton, _reason_against_triton),
            backend.Implementation("reference", _reference, lambda tensors: None),
        ),
        _probe,
    )
)


def _forward(
    op: backend.Op,
    h: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: Norm,
    implementation: str | None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    chosen = backend.select(op, [h, None, weight, bias], implementation)
    if chosen.name == "reference":
        return _explicit_forward(h, weight, bias, norm)
    from . import triton as norm_triton

    forward = norm_triton.forward(h, None, weight, bias, norm, statistics=True)
    return forward.y, forward.mean, forward.rstd


def _backward(
    op: backend.Op,
    dy: Tensor,
    h: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    norm: Norm,
    demanded: Sequence[bool],
    implementation: str | None,
) -> list[Tensor]:
    chosen = backend.select(op, [h, None, weight], implementation)
    if chosen.name == "reference":
        return _explicit_backward(dy, h, weight, mean, rstd, norm, demanded)
    from . import triton as norm_triton

    dtypes = [h.dtype, *[h.dtype if weight is None else weight.dtype] * 2]
    demanded = [False, *demanded]  # x is h
    gradients = norm_triton.backward(dy, None, h, weight, mean, rstd, norm, demanded, dtypes)
    return [gradient for gradient in gradients if gradient is not None]


def _like_gradients(h: Tensor, weight: Tensor | None, demanded: Sequence[bool]) -> list[Tensor]:
    parameter = h.new_empty(h.shape[-1:]) if weight is None else weight
    likes = zip((h, parameter, parameter), demanded, strict=True)
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x, d in likes if d]


def _placed(gradients: list[Tensor], demanded: Sequence[bool]) -> list[Tensor | None]:
    present = iter(gradients)
    return [next(present) if d else None for d in demanded]


@torch.library.custom_op("progtuning::layer_norm", mutates_args=())
def layer_norm_op(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, and per row the mean and 1 / sqrt(var + eps)."""
    return _forward(LAYER_NORM, x, weight, bias, Norm(eps, center=True), implementation)


@layer_norm_op.register_fake
def _(x, weight, bias, eps, implementation=None):
    statistics = x.new_empty(x.shape[:-1], dtype=torch.promote_types(x.dtype, torch.float32))
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, statistics, torch.empty_like(statistics)


@torch.library.custom_op("progtuning::layer_norm_backward", mutates_args=())
def layer_norm_backward_op(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    demanded: Sequence[bool],
    implementation: str | None = None,
) -> list[Tensor]:
    """The demanded ones of the gradients of x, weight and bias."""
    norm = Norm(0.0, center=True)
    return _backward(LAYER_NORM, dy, x, weight, mean, rstd, norm, demanded, implementation)


@layer_norm_backward_op.register_fake
def _(dy, x, weight, mean, rstd, demanded, implementation=None):
    return _like_gradients(x, weight, demanded)


def _layer_norm_context(ctx, inputs, output) -> None:
    x, weight, _, _, ctx.implementation = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, weight, mean, rstd)


def _layer_norm_gradients(ctx, dy, dmean, drstd):
    demanded = list(ctx.needs_input_grad[:3])
    gradients = layer_norm_backward_op(dy, *ctx.saved_tensors, demanded, ctx.implementation)
    return *_placed(gradients, demanded), None, None


layer_norm_op.register_autograd(_layer_norm_gradients, setup_context=_layer_norm_context)


@torch.library.custom_op("progtuning::rms_norm", mutates_args=())
def rms_norm_op(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    offset: float = 0.0,
    cast_first: bool = True,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """y, and per row 1 / sqrt(mean of squares + eps)."""
    norm = Norm(eps, center=False, offset=offset, cast_first=cast_first)
    y, _, rstd = _forward(RMS_NORM, x, weight, None, norm, implementation)
    return y, rstd


@rms_norm_op.register_fake
def _(x, weight, eps, offset=0.0, cast_first=True, implementation=None):
    norm = Norm(eps, center=False, offset=offset, cast_first=cast_first)
    y = x.new_empty(x.shape, dtype=norm.output_dtype(x.dtype, weight))
    return y, x.new_empty(x.shape[:-1], dtype=torch.promote_types(x.dtype, torch.float32))


@torch.library.custom_op("progtuning::rms_norm_backward", mutates_args=())
def rms_norm_backward_op(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    offset: float,
    demanded: Sequence[bool],
    implementation: str | None = None,
) -> list[Tensor]:
    """The demanded ones of the gradients of x and weight."""
    norm = Norm(0.0, center=False, offset=offset)
    demanded = [*demanded, False]
    return _backward(RMS_NORM, dy, x, weight, None, rstd, norm, demanded, implementation)


@rms_norm_backward_op.register_fake
def _(dy, x, weight, rstd, offset, demanded, implementation=None):
    return _like_gradients(x, weight, [*demanded, False])


def _rms_norm_context(ctx, inputs, output) -> None:
    x, weight, _, ctx.offset, _, ctx.implementation = inputs
    _, rstd = output
    ctx.mark_non_differentiable(rstd)
    ctx.save_for_backward(x, weight, rstd)


def _rms_norm_gradients(ctx, dy, drstd):
    demanded = list(ctx.needs_input_grad[:2])
    saved = ctx.saved_tensors
    gradients = rms_norm_backward_op(dy, *saved, ctx.offset, demanded, ctx.implementation)
    return *_placed(gradients, demanded), None, None, None, None


rms_norm_op.register_autograd(_rms_norm_gradients, setup_context=_rms_norm_context)
