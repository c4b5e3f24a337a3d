"""linear_cross_entropy: a head and its loss, without the logits of all rows at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ... import backend
from ...sharding import is_sharded
from . import chunks, reference
from .reference import Options, Reduction


def _reason_against_triton(tensors: Sequence[Tensor]) -> str | None:
    return backend.triton_reason(tensors[0].device, tensors[0].dtype)


_ROWS, _SCALE = (backend.triton_function(__name__, name) for name in ("rows", "scale"))
OP = backend.register(
    backend.Op(
        "linear_cross_entropy",
        (
            backend.Implementation("triton", _ROWS, _reason_against_triton, scale=_SCALE),
            backend.Implementation("reference", reference.rows, scale=reference.scale),
        ),
    )
)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, chosen, hidden, weight, bias, labels, class_weight, num_items, options):
        demand = ctx.needs_input_grad[1:4]
        tensors = (hidden, weight, bias, labels, class_weight, num_items)
        formed = chunks.form(chosen, *tensors, demand, options)
        ctx.save_for_backward(*formed.gradients, formed.unscale)
        ctx.dtype, ctx.chosen, ctx.handed_over = hidden.dtype, chosen, False
        return formed.loss

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        if ctx.handed_over:
            raise RuntimeError(
                "linear_cross_entropy: a second backward of the same loss: its gradients were "
                "formed in the forward and are handed over; compute the loss again"
            )
        *gradients, unscale = ctx.saved_tensors
        ctx.handed_over = True
        factor = upstream * unscale
        for gradient in gradients:
            if gradient is not None:
                ctx.chosen.scale(gradient, factor)
        given = (None if gradient is None else gradient.to(ctx.dtype) for gradient in gradients)
        return None, *given, None, None, None, None


class _RowsOfLinearCrossEntropy(torch.autograd.Function):
    """The loss of every row; the backward, which knows what is upstream, forms the gradients."""

    @staticmethod
    def forward(ctx, chosen, hidden, weight, bias, labels, class_weight, options):
        tensors = (hidden, weight, bias, labels, class_weight)
        ctx.save_for_backward(*tensors)
        ctx.chosen, ctx.options = chosen, options
        return chunks.form(chosen, *tensors, None, (False, False, False), options).loss

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        tensors, demand = ctx.saved_tensors, ctx.needs_input_grad[1:4]
        formed = chunks.form(ctx.chosen, *tensors, None, demand, ctx.options, upstream)
        dtype = tensors[0].dtype
        for gradient in formed.gradients if dtype == torch.float16 else ():
            if gradient is not None:
                ctx.chosen.scale(gradient, formed.unscale)
        given = (None if gradient is None else gradient.to(dtype) for gradient in formed.gradients)
        return None, *given, None, None, None


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    class_weight: Tensor | None = None,
    reduction: Reduction = "mean",
    num_items: Tensor | int | None = None,
    max_logits_bytes: int = 512 * 2**20,
    implementation: str | None = None,
) -> Tensor:
    """Cross-entropy of `hidden @ weight.T + bias`, without the logits of all rows at once.

        x_i = softcapped(weight @ hidden_i + bias)
        lse_i = log(sum_c exp(x_i[c]))        y = labels_i
        row_i = (1 - s) w[y] (lse_i - x_i[y])
                + s / V sum_c w[c] (lse_i - x_i[c]) + z_loss lse_i^2

    s is `label_smoothing`, w `class_weight` or 1, as in `F.cross_entropy`. Gradients are formed in
    the forward, the demanded ones only, so there is one backward per call. If all rows are ignored
    the mean is NaN and the gradients are 0, as in torch. With `reduction="none"` the backward forms
    them, and computes the logits again: one matmul more, and any number of backwards.

    Args:
        hidden: (..., H); float32, bfloat16, float16 or float64, or under autocast its dtype.
        weight: (V, H), of the dtype and device of hidden.
        labels: (...), int64 or int32, not shifted.
        bias: (V,), of the dtype and device of hidden.
        ignore_index: label of the rows that do not count.
        label_smoothing: in [0, 1].
        softcap: above 0: logits become softcap * tanh(logits / softcap), as in Gemma 2.
        z_loss: times the squared log-sum-exp of each row that counts is added.
        class_weight: (V,), on the device of hidden; no gradient.
        reduction: "mean", "sum", or "none" for the loss of each row, 0 where it does not count.
        num_items: divides the sum of the rows instead, with "mean" and "sum": what the Trainer
            hands to a loss as num_items_in_batch.
        max_logits_bytes: of the logits that exist at a time; at least 512 rows do.
        implementation: "triton" or "reference"; None chooses.

    Returns:
        The loss, a 0-dim float32 (float64 for float64); of the shape of labels with "none".

    Raises:
        TypeError: an argument that is no tensor where one belongs.
        ValueError: the arguments do not fit together, a DTensor, or `implementation` has no such
            name.
        RuntimeError: the implementation that is asked for cannot run; in a second backward of the
            same loss.
    """
    given = {"hidden": hidden, "weight": weight, "labels": labels}
    optional = {"bias": bias, "class_weight": class_weight}
    given |= {name: tensor for name, tensor in optional.items() if tensor is not None}
    for name, tensor in given.items():
        if not isinstance(tensor, Tensor):
            kind = type(tensor).__name__
            raise TypeError(f"linear_cross_entropy: {name} must be a tensor, got {kind}")
        if is_sharded(type(tensor)):
            raise ValueError(
                f"linear_cross_entropy: {name} is a DTensor; pass {name}.full_tensor(), which "
                "autograd follows"
            )
    if torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != torch.float64:
        low = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(low), weight.to(low)
        bias = None if bias is None else bias.to(low)
    reference.check(hidden, weight, labels, bias, class_weight)
    options = Options(
        *(ignore_index, float(label_smoothing), None if softcap is None else float(softcap)),
        *(float(z_loss), reduction, max_logits_bytes, implementation),
    )
    options.check()
    if num_items is not None:
        if reduction == "none":
            raise ValueError("linear_cross_entropy: num_items divides a sum, and there is none")
        if not isinstance(num_items, Tensor):
            num_items = torch.full((), num_items, dtype=torch.float64, device=hidden.device)
        if num_items.numel() != 1:
            raise ValueError(f"linear_cross_entropy: num_items has {num_items.numel()} elements")
        num_items = num_items.detach().reshape(()).to(hidden.device, non_blocking=True)
    shape = labels.shape if reduction == "none" else ()
    hidden, labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    class_weight = None if class_weight is None else class_weight.detach()
    recorded = torch.is_grad_enabled()
    demand = [recorded and t is not None and t.requires_grad for t in (hidden, weight, bias)]
    tensors = (hidden, weight, bias, labels, class_weight, num_items)
    if torch.compiler.is_compiling():
        formed = demand if reduction != "none" else [False] * 3
        return linear_cross_entropy_op(*tensors, None, formed, *options)[0].view(shape)
    chosen = backend.select(OP, [hidden], implementation)
    if not any(demand):
        return chunks.form(chosen, *tensors, demand, options).loss.view(shape)
    if reduction == "none":
        return _RowsOfLinearCrossEntropy.apply(chosen, *tensors[:5], options).view(shape)
    return _LinearCrossEntropy.apply(chosen, *tensors, options)


@torch.library.custom_op("progtuning::linear_cross_entropy", mutates_args=())
def linear_cross_entropy_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    class_weight: Tensor | None,
    num_items: Tensor | None,
    upstream: Tensor | None,
    demand: Sequence[bool],
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    z_loss: float,
    reduction: str,
    max_logits_bytes: int,
    implementation: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, the three gradients (empty where not demanded) and `unscale`; see `chunks.Formed`.

    `upstream`, (N,): of the rows' losses, in the backward of the reduction "none".
    """
    options = Options(
        *(ignore_index, label_smoothing, softcap, z_loss),
        *(reduction, max_logits_bytes, implementation),
    )
    tensors = (hidden, weight, bias, labels, class_weight, num_items)
    chosen = backend.select(OP, [hidden], implementation)
    formed = chunks.form(chosen, *tensors, demand, options, upstream)
    dtypes = chunks.stored_dtypes(hidden.dtype)
    d_hidden, d_weight, d_bias = (
        hidden.new_empty(0, dtype=dtype) if gradient is None else gradient
        for gradient, dtype in zip(formed.gradients, dtypes, strict=True)
    )
    return formed.loss, d_hidden, d_weight, d_bias, formed.unscale


@linear_cross_entropy_op.register_fake
def _(hidden, weight, bias, labels, class_weight, num_items, upstream, demand, *options):
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    gradients = [
        hidden.new_empty(shape if demanded else (0,), dtype=dtype)
        for shape, demanded, dtype in zip(
            shapes, demand, chunks.stored_dtypes(hidden.dtype), strict=True
        )
    ]
    scalar = hidden.new_empty((), dtype=chunks.wide(hidden.dtype))
    of_rows = Options(*options).reduction == "none"
    loss = scalar.new_empty(labels.shape) if of_rows else scalar
    return (loss, *gradients, torch.empty_like(scalar))


def _save_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.demand, ctx.dtype, ctx.options = inputs[7], inputs[0].dtype, Options(*inputs[8:])
    ctx.save_for_backward(*(inputs[:5] if ctx.options.reduction == "none" else output[1:]))


def _hand_over(ctx: Any, upstream: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
    if ctx.options.reduction == "none":
        demand = list(ctx.needs_input_grad[:3])
        formed = linear_cross_entropy_op(*ctx.saved_tensors, None, upstream, demand, *ctx.options)
        _, *gradients, factor = formed
    else:
        demand = ctx.demand
        *gradients, unscale = ctx.saved_tensors
        factor = upstream * unscale
    given = (
        (gradient.to(factor.dtype) * factor).to(ctx.dtype) if demanded else None
        for gradient, demanded in zip(gradients, demand, strict=True)
    )
    return (*given, *[None] * 12)


linear_cross_entropy_op.register_autograd(_hand_over, setup_context=_save_gradients)
