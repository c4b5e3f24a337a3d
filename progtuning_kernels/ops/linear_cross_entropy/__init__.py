"""linear_cross_entropy: a head and its loss, without the logits of all rows at once.

    x_i = softcapped(weight @ hidden_i + bias),  lse_i = log(sum_c exp(x_i[c])),  y = labels_i
    softcapped(x) = softcap * tanh(x / softcap), or x
    row_i = (1 - s) w[y] (lse_i - x_i[y]) + s / V * sum_c w[c] (lse_i - x_i[c]) + z_loss lse_i^2
    loss = sum_i row_i / denominator      over the rows whose label is not ignore_index

- s is label_smoothing, w is class_weight or 1: as in torch.nn.functional.cross_entropy. The
  denominator is num_items if given; else 1 for "sum", and for "mean" the sum of w[y], all on the
  device. All rows ignored: the mean is NaN and the gradients are 0, as in torch.
- hidden (..., H), weight (V, H), bias (V,): one of float32, bfloat16, float16, float64, which under
  autocast is autocast's. labels (...): int64 or int32. Nothing is mutated.
- returns a 0-dim float32 (float64 for float64): logits are rounded to the dtype of hidden, as a
  linear layer rounds them, and everything behind them is float32.
- Gradients are formed in the forward, and only those that are demanded, in every combination: 3
  matmuls for all, 2 with hidden or weight frozen, 1 without any. d(weight) adds up over chunks in
  float32. They are handed over by the backward, so there is one backward per call, and no second
  derivative.
- Nothing waits for the device: a label outside [0, V) that is not ignored makes the loss NaN with
  triton; the reference raises on the CPU, and stops the device elsewhere.

Memory. With N rows, e bytes per element, a = 4 bytes (8 for float64), and R rows per chunk, the
largest multiple of 128 with R V e <= max_logits_bytes, but at least 512 (then evened out, and never
more than N), and U the next multiple of 16 from V, a call takes beside its inputs at most

    R U e + [hidden] N H e + [weight] V H (e, or a with more than one chunk or float16)
    + [bias] 2 V a + 64 N + 4096 bytes

[t]: where t's gradient is demanded. In bfloat16 with more than one chunk, the end of the forward
adds V H e while it rounds d(weight), and drops R U e before; in float16 the backward does. The
reference adds 6 R V a; on the CPU, a dtype narrower than float32 adds R (V + H) a. hidden is copied
where its rows do not lie evenly spaced.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ... import backend
from ...sharding import is_sharded

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LABEL_DTYPES = (torch.int64, torch.int32)
Reduction = Literal["mean", "sum"]

LEAST_ROWS = 512  # below it a matmul is bound by reading the weight, not by arithmetic
ROW_MULTIPLE = 128  # a tile of the matmul
_SCALED_PIECE = 2**24  # elements that `scale_reference` holds in float32 at once


@dataclass(frozen=True)
class RowLoss:
    """What turns a row of logits into its loss and its gradient.

    Attributes:
        class_weight, class_weight_sum: (V,) and 0-dim in float32 (float64), or both None.
        factor: 0-dim, on the device: what a row's gradient is multiplied by.
    """

    ignore_index: int
    label_smoothing: float
    softcap: float | None
    z_loss: float
    class_weight: Tensor | None
    class_weight_sum: Tensor | None
    factor: Tensor


def reference(
    logits: Tensor, labels: Tensor, losses: Tensor, row_loss: RowLoss, *, gradient: bool
) -> None:
    """Writes the loss of each row to `losses`, and d(logits) over the logits if `gradient`.

    Args:
        logits: (R, V), as the matmul gives them: before the softcap.
        labels: (R,). losses: (R,) in float32 (float64).
    """
    smoothing, cap = row_loss.label_smoothing, row_loss.softcap
    classes = logits.shape[1]
    x = logits.to(losses.dtype)
    if cap is not None:
        tanh = torch.tanh(x / cap)
        x = tanh * cap
    log_p = torch.log_softmax(x, dim=1)
    ignored = labels == row_loss.ignore_index
    index = labels.masked_fill(ignored, 0).long()[:, None]
    weight_of_label, smoothed = losses.new_ones(()), log_p
    weights_sum: Tensor | float = classes
    if row_loss.class_weight is not None:
        weight_of_label = row_loss.class_weight.gather(0, index[:, 0])
        weights_sum = row_loss.class_weight_sum
    of_label = (1 - smoothing) * weight_of_label
    loss = -of_label * log_p.gather(1, index)[:, 0]
    if smoothing:
        if row_loss.class_weight is not None:
            smoothed = log_p * row_loss.class_weight
        loss = loss - smoothing / classes * smoothed.sum(dim=1)
    of_softmax = of_label + smoothing / classes * weights_sum
    if row_loss.z_loss:
        lse = torch.logsumexp(x, dim=1)
        loss = loss + row_loss.z_loss * lse.square()
        of_softmax = of_softmax + 2 * row_loss.z_loss * lse
    losses.copy_(loss.masked_fill(ignored, 0))
    if not gradient:
        return
    d = log_p.exp_().mul_(of_softmax.expand_as(losses)[:, None])
    d.scatter_add_(1, index, -of_label.expand_as(losses)[:, None])
    if smoothing:
        d -= smoothing / classes * (1 if row_loss.class_weight is None else row_loss.class_weight)
    if cap is not None:
        d.mul_(1 - tanh).mul_(1 + tanh)  # the square would round what 1 - tanh keeps
    logits.copy_(d.mul_(row_loss.factor).masked_fill_(ignored[:, None], 0))


def scale_reference(gradient: Tensor, factor: Tensor) -> None:
    """Multiplies in place by a 0-dim tensor of a wider dtype, which `mul_` would round first."""
    for piece in gradient.view(-1).split(_SCALED_PIECE):
        piece.copy_(piece.to(factor.dtype) * factor)


def _triton(
    logits: Tensor, labels: Tensor, losses: Tensor, row_loss: RowLoss, *, gradient: bool
) -> None:
    from .triton import rows  # not before it is needed: it imports triton

    rows(logits, labels, losses, row_loss, gradient=gradient)


def _scale_triton(gradient: Tensor, factor: Tensor) -> None:
    from .triton import scale

    scale(gradient, factor)


_SCALE = {"triton": _scale_triton, "reference": scale_reference}


def _reason_against_triton(tensors: Sequence[Tensor]) -> str | None:
    reason = backend.triton_reason(tensors[0].device)
    if reason is None and tensors[0].dtype == torch.float64:
        return "no Triton kernel for float64"
    return reason


OP = backend.register(
    backend.Op(
        "linear_cross_entropy",
        (
            backend.Implementation("triton", _triton, _reason_against_triton),
            backend.Implementation("reference", reference, lambda tensors: None),
        ),
    )
)


@dataclass(frozen=True)
class _Options:
    """The arguments that are the same in eager and compiled code; see `linear_cross_entropy`."""

    ignore_index: int
    label_smoothing: float
    softcap: float | None
    z_loss: float
    reduction: str
    max_logits_bytes: int
    implementation: str | None


@dataclass(frozen=True)
class _Result:
    """Gradients are None where not demanded, else of the loss times `1 / unscale`.

    Attributes:
        gradients: of hidden, weight, bias, in `_stored_dtypes`.
        unscale: 0-dim; a power of two, 1 except in float16.
        implementation: the one that ran.
    """

    loss: Tensor
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None]
    unscale: Tensor
    implementation: str


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _stored_dtypes(dtype: torch.dtype) -> tuple[torch.dtype, torch.dtype, torch.dtype]:
    """Of the gradients of hidden, weight, bias between forward and backward.

    Sums over rows could leave float16's range before the loss scale is known.
    """
    return dtype, torch.float32 if dtype == torch.float16 else dtype, _wide(dtype)


def padded(classes: int) -> int:
    """From row to row of the logits: 50,257 or 30,522 would allow accesses of 2 bytes only."""
    return math.ceil(classes / 16) * 16


def rows_per_chunk(rows: int, classes: int, element_bytes: int, max_logits_bytes: int) -> int:
    """R of the module's docstring."""
    fitting = max_logits_bytes // max(1, classes * element_bytes) // ROW_MULTIPLE * ROW_MULTIPLE
    most = max(LEAST_ROWS, fitting)
    if rows <= most:
        return max(1, rows)
    even = math.ceil(rows / math.ceil(rows / most))
    return min(most, max(LEAST_ROWS, math.ceil(even / ROW_MULTIPLE) * ROW_MULTIPLE))


def _denominator(
    labels: Tensor, class_weight: Tensor | None, num_items: Tensor | None, options: _Options
) -> Tensor:
    """0-dim float64 on the device."""
    if num_items is not None:
        return num_items.to(torch.float64)
    if options.reduction == "sum":
        return torch.ones((), dtype=torch.float64, device=labels.device)
    counted = labels != options.ignore_index
    if class_weight is None:
        return counted.sum().double()
    index = labels.masked_fill(~counted, 0).clamp(0, len(class_weight) - 1).long()
    return class_weight.gather(0, index).masked_fill(~counted, 0).sum(dtype=torch.float64)


def _add_product(total: Tensor | None, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """total + a @ b, in place from the second chunk on, with sums and result in `dtype`."""
    if a.dtype == dtype:
        return torch.mm(a, b) if total is None else total.addmm_(a, b)
    if a.is_cuda:
        if total is None:
            return torch.mm(a, b, out_dtype=dtype)
        # takes a float32 total from torch 2.10 on; elsewhere than on CUDA there is no such addmm
        return torch.addmm(total, a, b, out_dtype=dtype, out=total)
    a, b = a.to(dtype), b.to(dtype)
    return torch.mm(a, b) if total is None else total.addmm_(a, b)


@torch.no_grad()
def _run(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    num_items: Tensor | None,
    demand: Sequence[bool],
    options: _Options,
) -> _Result:
    """Forward and gradients of (N, H) hidden; demand: of hidden, weight, bias."""
    need_hidden, need_weight, need_bias = demand
    n, classes, dtype, device = len(hidden), len(weight), hidden.dtype, hidden.device
    wide = _wide(dtype)
    chosen = backend.select(OP, [hidden], options.implementation)
    if class_weight is not None:
        class_weight = class_weight.to(wide).contiguous()
    denominator = _denominator(labels, class_weight, num_items, options)
    unscale = torch.ones((), dtype=wide, device=device)
    factor = 1 / denominator
    if dtype == torch.float16:
        # d(logits) of a mean over 8192 rows would be 0 below 5e-4: times a power of two it is not
        exponent = torch.frexp(denominator).exponent
        factor = torch.ldexp(factor, exponent)
        unscale = torch.ldexp(unscale, -exponent)
    row_loss = RowLoss(
        ignore_index=options.ignore_index,
        label_smoothing=options.label_smoothing,
        softcap=options.softcap,
        z_loss=options.z_loss,
        class_weight=class_weight,
        class_weight_sum=None if class_weight is None else class_weight.sum(),
        factor=factor.to(wide),
    )
    chunk_rows = rows_per_chunk(n, classes, dtype.itemsize, options.max_logits_bytes)
    weight_dtype = wide if chunk_rows < n or dtype == torch.float16 else dtype
    losses = torch.empty(n, dtype=wide, device=device)
    logits_buffer = torch.empty((chunk_rows, padded(classes)), dtype=dtype, device=device)
    # no product may depend on the padding, but those in bfloat16 on CPUs with AMX multiply it by 0
    logits_buffer[:, classes:] = 0
    d_hidden = torch.empty(hidden.shape, dtype=dtype, device=device) if need_hidden else None
    d_weight = d_bias = None
    with torch.autocast(device.type, enabled=False):
        for start in range(0, max(n, 1), chunk_rows):
            span = slice(start, min(start + chunk_rows, n))
            part = hidden[span]
            logits = logits_buffer[: len(part), :classes]
            if bias is None:
                torch.mm(part, weight.t(), out=logits)
            else:
                torch.addmm(bias, part, weight.t(), out=logits)
            chosen.function(logits, labels[span], losses[span], row_loss, gradient=any(demand))
            if need_hidden:
                torch.mm(logits, weight, out=d_hidden[span])
            if need_weight:
                d_weight = _add_product(d_weight, logits.t(), part, weight_dtype)
            if need_bias:
                sums = logits.sum(dim=0, dtype=wide)
                d_bias = sums if d_bias is None else d_bias.add_(sums)
        del logits, logits_buffer
        if need_weight:
            d_weight = d_weight.to(_stored_dtypes(dtype)[1])
        loss = (losses.sum(dtype=torch.float64) / denominator).to(wide)
    return _Result(loss, (d_hidden, d_weight, d_bias), unscale, chosen.name)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, class_weight, num_items, options):
        demand = ctx.needs_input_grad[:3]
        result = _run(hidden, weight, labels, bias, class_weight, num_items, demand, options)
        ctx.save_for_backward(*result.gradients, result.unscale)
        ctx.dtype, ctx.implementation, ctx.handed_over = hidden.dtype, result.implementation, False
        return result.loss

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
        given = []
        for gradient in gradients:
            if gradient is not None:
                _SCALE[ctx.implementation](gradient, factor)
                gradient = gradient.to(ctx.dtype)
            given.append(gradient)
        return (*given, None, None, None, None)


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
    """Cross-entropy of `hidden @ weight.T + bias`, as a 0-dim float32 (float64 for float64).

    Args:
        hidden, weight, bias: (..., H), (V, H), (V,) of one device and dtype.
        labels: (...), int64 or int32, not shifted.
        ignore_index: label of the rows that do not count.
        label_smoothing: in [0, 1], as in torch.nn.functional.cross_entropy.
        softcap: logits become softcap * tanh(logits / softcap), as in Gemma 2.
        z_loss: times the squared log-sum-exp of each row that counts is added.
        class_weight: (V,), as torch's `weight`; no gradient.
        reduction: "mean" or "sum".
        num_items: divides the sum of the rows instead, with either reduction: what the Trainer
            hands to a loss as num_items_in_batch.
        max_logits_bytes: of the logits that exist at a time; at least 512 rows do.
        implementation: "triton" or "reference"; None chooses (see `backend.select`).

    Raises:
        TypeError, ValueError: the arguments do not fit together; says which.
        RuntimeError: at a second backward of the same loss.
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
    _check(hidden, weight, labels, bias, class_weight)
    options = _Options(
        *(ignore_index, float(label_smoothing), None if softcap is None else float(softcap)),
        *(float(z_loss), reduction, max_logits_bytes, implementation),
    )
    _check_options(options)
    if num_items is not None and not isinstance(num_items, Tensor):
        num_items = torch.full((), num_items, dtype=torch.float64, device=hidden.device)
    if num_items is not None:
        if num_items.numel() != 1:
            raise ValueError(f"linear_cross_entropy: num_items has {num_items.numel()} elements")
        num_items = num_items.detach().reshape(()).to(hidden.device, non_blocking=True)
    hidden, labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    class_weight = None if class_weight is None else class_weight.detach()
    recorded = torch.is_grad_enabled()
    demand = [recorded and t is not None and t.requires_grad for t in (hidden, weight, bias)]
    if torch.compiler.is_compiling():
        return linear_cross_entropy_op(
            *(hidden, weight, labels, bias, class_weight, num_items, demand),
            *(ignore_index, options.label_smoothing, options.softcap, options.z_loss),
            *(reduction, max_logits_bytes, implementation),
        )[0]
    others = (labels, class_weight, num_items)
    if any(demand):
        return _LinearCrossEntropy.apply(hidden, weight, bias, *others, options)
    return _run(hidden, weight, labels, bias, class_weight, num_items, demand, options).loss


def _check(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, class_weight: Tensor | None
) -> None:
    if hidden.ndim == 0 or weight.ndim != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            "linear_cross_entropy: expected hidden (..., H) and weight (V, H), got "
            f"{tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if len(weight) == 0:
        raise ValueError("linear_cross_entropy: weight has no rows")
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"linear_cross_entropy: hidden {tuple(hidden.shape)} needs labels "
            f"{tuple(hidden.shape[:-1])}, got {tuple(labels.shape)}"
        )
    if labels.dtype not in LABEL_DTYPES:
        raise ValueError(f"linear_cross_entropy: labels must be int64 or int32, not {labels.dtype}")
    for name, tensor in (("bias", bias), ("class_weight", class_weight)):
        if tensor is not None and tensor.shape != weight.shape[:1]:
            raise ValueError(
                f"linear_cross_entropy: {name} must be ({len(weight)},), got {tuple(tensor.shape)}"
            )
    if hidden.dtype not in DTYPES:
        raise ValueError(f"linear_cross_entropy: no implementation for {hidden.dtype}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != hidden.dtype:
            raise ValueError(
                f"linear_cross_entropy: hidden is {hidden.dtype}, {name} is {tensor.dtype}"
            )
    for tensor in (weight, labels, bias, class_weight):
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(
                f"linear_cross_entropy: tensors on {hidden.device} and {tensor.device}"
            )


def _check_options(options: _Options) -> None:
    if options.reduction not in get_args(Reduction):
        raise ValueError(
            f"linear_cross_entropy: reduction must be one of {get_args(Reduction)}, "
            f"got {options.reduction!r}"
        )
    if not 0 <= options.label_smoothing <= 1:
        raise ValueError(
            f"linear_cross_entropy: label_smoothing {options.label_smoothing} is not in [0, 1]"
        )
    if options.softcap is not None and not options.softcap > 0:
        raise ValueError(f"linear_cross_entropy: softcap {options.softcap} is not positive")
    if not options.z_loss >= 0:
        raise ValueError(f"linear_cross_entropy: z_loss {options.z_loss} is negative")
    if options.max_logits_bytes <= 0:
        raise ValueError(
            f"linear_cross_entropy: max_logits_bytes {options.max_logits_bytes} is not positive"
        )


@torch.library.custom_op("progtuning::linear_cross_entropy", mutates_args=())
def linear_cross_entropy_op(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    num_items: Tensor | None,
    demand: Sequence[bool],
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    z_loss: float,
    reduction: str,
    max_logits_bytes: int,
    implementation: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, the three gradients (empty where not demanded) and `unscale`; see `_Result`."""
    options = _Options(
        *(ignore_index, label_smoothing, softcap, z_loss),
        *(reduction, max_logits_bytes, implementation),
    )
    result = _run(hidden, weight, labels, bias, class_weight, num_items, demand, options)
    gradients = [
        torch.empty(0, dtype=dtype, device=hidden.device) if gradient is None else gradient
        for gradient, dtype in zip(result.gradients, _stored_dtypes(hidden.dtype), strict=True)
    ]
    return (result.loss, *gradients, result.unscale)


@linear_cross_entropy_op.register_fake
def _(hidden, weight, labels, bias, class_weight, num_items, demand, *options):
    wide = _wide(hidden.dtype)
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    gradients = [
        hidden.new_empty(shape if demanded else (0,), dtype=dtype)
        for shape, demanded, dtype in zip(shapes, demand, _stored_dtypes(hidden.dtype), strict=True)
    ]
    return (hidden.new_empty((), dtype=wide), *gradients, hidden.new_empty((), dtype=wide))


def _save_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.demand, ctx.dtype = inputs[6], inputs[0].dtype
    ctx.save_for_backward(*output[1:])


def _hand_over(ctx: Any, upstream: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
    *gradients, unscale = ctx.saved_tensors
    factor = upstream * unscale
    d_hidden, d_weight, d_bias = (
        (gradient.to(factor.dtype) * factor).to(ctx.dtype) if demanded else None
        for gradient, demanded in zip(gradients, ctx.demand, strict=True)
    )
    return (d_hidden, d_weight, None, d_bias, *[None] * 10)


linear_cross_entropy_op.register_autograd(_hand_over, setup_context=_save_gradients)
