"""linear_cross_entropy over chunks of rows: the matmuls around an implementation's `rows`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ... import backend
from .reference import Options, RowLoss, padded, wide

LEAST_LOGITS_BYTES = 512 * 2**20  # of the logits that exist at a time, unless the caller says
LEAST_ROWS = 512  # below it a matmul is bound by reading the weight, not by arithmetic
ROW_MULTIPLE = 128  # a tile of the matmul


class Formed(NamedTuple):
    """Gradients are None where not demanded, else of the loss times `1 / unscale`.

    Attributes:
        loss: 0-dim; (N,) for the reduction "none".
        z_loss, token_accuracy: of the shape of loss; None where not asked for.
        gradients: of hidden, weight, bias, in `stored_dtypes`.
        unscale: 0-dim; a power of two, 1 except in float16.
    """

    loss: Tensor
    z_loss: Tensor | None
    token_accuracy: Tensor | None
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None]
    unscale: Tensor


def stored_dtypes(
    dtype: torch.dtype, accum_dtype: torch.dtype | None
) -> tuple[torch.dtype, torch.dtype, torch.dtype]:
    """Dtypes of the gradients of hidden, weight, bias between forward and backward.

    Sums over rows could leave float16's range before the loss scale is known.
    """
    return dtype, torch.float32 if dtype == torch.float16 else dtype, accum_dtype or wide(dtype)


def logits_budget(
    rows: int, classes: int, width: int, dtype: torch.dtype, accum_dtype: torch.dtype
) -> int:
    """Bytes of logits at a time, of a call that makes d(weight), from sizes alone: see README.md.

    As many as the sum of d(weight) takes, or those of all rows, where no sum is then needed and
    that saves as many bytes as the further rows take.
    """
    weights = classes * width
    summed_bytes = weights * accum_dtype.itemsize
    saved_bytes = summed_bytes - weights * stored_dtypes(dtype, accum_dtype)[1].itemsize
    budget = max(LEAST_LOGITS_BYTES, summed_bytes)
    whole_bytes = rows * classes * dtype.itemsize
    return whole_bytes if whole_bytes <= budget + saved_bytes else budget


def rows_per_chunk(rows: int, classes: int, element_bytes: int, max_logits_bytes: int) -> int:
    """How many rows of logits are computed at a time: R of README.md."""
    fitting = max_logits_bytes // max(1, classes * element_bytes)
    if rows <= max(LEAST_ROWS, fitting):
        return max(1, rows)
    most = max(LEAST_ROWS, fitting // ROW_MULTIPLE * ROW_MULTIPLE)
    even = math.ceil(rows / math.ceil(rows / most))
    return min(most, max(LEAST_ROWS, math.ceil(even / ROW_MULTIPLE) * ROW_MULTIPLE))


def _denominator(
    labels: Tensor, class_weight: Tensor | None, num_items: Tensor | None, options: Options
) -> Tensor:
    """What the sum of the rows is divided by: 0-dim float64 on the device."""
    if num_items is not None:
        return num_items.to(torch.float64)
    if options.reduction != "mean":
        return torch.ones((), dtype=torch.float64, device=labels.device)
    counted = labels != options.ignore_index
    if class_weight is None:
        return counted.sum().double()
    index = labels.masked_fill(~counted, 0).clamp(0, len(class_weight) - 1).long()
    return class_weight.gather(0, index).masked_fill(~counted, 0).sum(dtype=torch.float64)


def _factor(
    denominator: Tensor, upstream: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """What d(logits) of a row is multiplied by, 0-dim or (N,), and `Formed.unscale`."""
    unscale = torch.ones((), dtype=wide(dtype), device=denominator.device)
    factor = 1 / denominator if upstream is None else upstream.to(wide(dtype))
    if dtype == torch.float16 and factor.numel():
        # d(logits) of a mean over 8192 rows would be 0 below 5e-4: times a power of two it is not
        if upstream is None:
            exponent = torch.frexp(denominator).exponent
        else:
            exponent = 1 - torch.frexp(factor.abs().amax()).exponent
        factor = torch.ldexp(factor, exponent)
        unscale = torch.ldexp(unscale, -exponent)
    return factor.to(wide(dtype)).contiguous(), unscale


def _add_product(total: Tensor | None, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """total + a @ b, in place from the second chunk on, with sums and result in `dtype`."""
    if a.is_cuda and a.dtype != dtype:
        if total is None:
            return torch.mm(a, b, out_dtype=dtype)
        # takes a float32 total from torch 2.10 on; elsewhere than on CUDA there is no such addmm
        return torch.addmm(total, a, b, out_dtype=dtype, out=total)
    a, b = a.to(dtype), b.to(dtype)
    return torch.mm(a, b) if total is None else total.addmm_(a, b)


@torch.no_grad()
def form(
    chosen: backend.Implementation,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    class_weight: Tensor | None,
    num_items: Tensor | None,
    demand: Sequence[bool],
    options: Options,
    upstream: Tensor | None = None,
    row_ids: Tensor | None = None,
) -> Formed:
    """Loss and gradients of (N, H) hidden.

    Args:
        demand: of the gradients of hidden, weight, bias.
        upstream: (N,), of the rows' losses; None: 1 for what the reduction makes of them.
        row_ids: (k,), where the gradient of weight is (k, H), of these rows.
    """
    need_hidden, need_weight, need_bias = demand
    n, classes, dtype, device = len(hidden), len(weight), hidden.dtype, hidden.device
    accum_dtype = options.accum_dtype or wide(dtype)
    if class_weight is not None:
        class_weight = class_weight.to(wide(dtype)).contiguous()
    denominator = _denominator(labels, class_weight, num_items, options)
    factor, unscale = _factor(denominator, upstream, dtype)
    row_loss = RowLoss(
        ignore_index=options.ignore_index,
        label_smoothing=options.label_smoothing,
        softcap=options.softcap,
        z_loss=options.z_loss,
        class_weight=class_weight,
        class_weight_sum=None if class_weight is None else class_weight.sum(),
        factor=factor,
    )
    budget = options.max_logits_bytes
    if budget is None:
        budget = LEAST_LOGITS_BYTES
        # the reference takes up to twelve times the bytes of the logits for itself
        whole = need_weight and row_ids is None
        if whole and chosen is not backend.OPS["linear_cross_entropy"].reference:
            budget = logits_budget(n, *weight.shape, dtype, accum_dtype)
    chunk_rows = rows_per_chunk(n, classes, dtype.itemsize, budget)
    weight_dtype = accum_dtype if chunk_rows < n else stored_dtypes(dtype, accum_dtype)[1]
    losses = torch.empty(n, dtype=wide(dtype), device=device)
    z_losses = correct = None
    if upstream is None and options.return_z_loss:
        z_losses = torch.empty_like(losses) if options.z_loss else torch.zeros_like(losses)
    if upstream is None and options.return_token_accuracy:
        correct = torch.empty_like(losses)
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
            of_rows = replace(row_loss, factor=factor[span]) if factor.ndim else row_loss
            chosen.function(
                *(logits, labels[span], losses[span], of_rows),
                gradient=any(demand),
                z_losses=z_losses[span] if z_losses is not None and options.z_loss else None,
                correct=None if correct is None else correct[span],
            )
            if need_hidden:
                torch.mm(logits, weight, out=d_hidden[span])
            if need_weight:
                wanted = logits if row_ids is None else logits.index_select(1, row_ids)
                d_weight = _add_product(d_weight, wanted.t(), part, weight_dtype)
            if need_bias:
                sums = logits.sum(dim=0, dtype=wide(dtype))
                d_bias = sums.to(accum_dtype) if d_bias is None else d_bias.add_(sums)
        del logits, logits_buffer
        if need_weight:
            d_weight = d_weight.to(stored_dtypes(dtype, accum_dtype)[1])
        if options.reduction != "none":
            losses, z_losses = (
                None if t is None else (t.sum(dtype=torch.float64) / denominator).to(wide(dtype))
                for t in (losses, z_losses)
            )
            if correct is not None:
                correct = correct.sum() / (labels != options.ignore_index).sum()
    return Formed(losses, z_losses, correct, (d_hidden, d_weight, d_bias), unscale)
