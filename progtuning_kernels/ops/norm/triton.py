"""layer_norm and rms_norm in Triton: one program per row, held in registers; see README.md."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..contract import once_differentiable, present
from ..kept_launches import launch
from ..row_partials import rounded, sum_partials
from .reference import Inputs, Norm, Result


class Dropout(NamedTuple):
    """The dropout of x as the kernels take it; without a seed there is none.

    Attributes:
        seed: (1,) int64.
        last_dropped: signed 32-bit words up to this one drop their element.
        scale: of the elements that are kept.
    """

    seed: Tensor | None = None
    last_dropped: int | None = None
    scale: float | None = None


NO_DROPOUT = Dropout()
WARPS = 2048  # of a backward that sums over rows: 16 on each of 128 multiprocessors


def draw_dropout(p: float, device: torch.device) -> Dropout:
    """Draw a new mask, with one number of torch's generator of the device; p is in (0, 1]."""
    seed = torch.randint(2**63 - 1, (1,), device=device)
    dropped = max(1, round(p * 2**32))  # of the 2**32 words
    return Dropout(seed, dropped - 1 - 2**31, 1 / (1 - p) if p < 1 else 0.0)


@functools.cache
def block_of(columns: int) -> int:
    """Columns that a program holds; a multiple of four, which one call of Philox serves."""
    return max(4, triton.next_power_of_2(columns))


@functools.cache
def options(block: int) -> dict[str, int | bool]:
    """Options of a launch with `block` columns: more than 512 a warp would spill in backward."""
    warps = max(1, min(4, block // 256), block // 512)
    return {"num_warps": warps, "enable_fp_fusion": True}


def groups_of(n_rows: int, block: int) -> tuple[int, int]:
    """Rows that a program of backward has at once where it sums over rows, and the programs.

    16 elements per thread, or 8 rows, are what fits into 128 registers. All programs together have
    at most `WARPS` warps, which an H200's multiprocessors hold at once; README.md has the times.
    """
    warps = options(block)["num_warps"]
    rows = max(1, min(8, 512 * warps // block))
    return rows, max(1, min(-(-n_rows // rows), WARPS // warps))


@triton.jit
def _load(pointers, inside):
    return tl.load(pointers, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store(pointers, x, inside):
    tl.store(pointers, rounded(x, pointers.dtype.element_ty), mask=inside)


@triton.jit
def _mean(x, C: tl.constexpr):
    """Of a row (BLOCK,); of rows (ROWS, BLOCK): (ROWS, 1)."""
    total = tl.sum(x, axis=-1, keep_dims=len(x.shape) > 1)
    return tl.div_rn(total, tl.full(total.shape, C, tl.float32))


@triton.jit
def _dropped_out(x, seed, last_dropped, scale, row, BLOCK: tl.constexpr):
    """Of rows whose numbers are below 2**31; row: a number for (BLOCK,), (ROWS, 1) of them."""
    # counters of 64 bits would choose another generator
    rows = row.to(tl.int32) + tl.arange(0, BLOCK // 4) * 0
    zero = rows * 0
    fours = zero + tl.arange(0, BLOCK // 4)
    w0, w1, w2, w3 = tl.philox(tl.load(seed), fours, rows, zero, zero, n_rounds=7)
    # column i of the four: word i; join adds the innermost dimension
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), x.shape)
    return tl.where(words.to(tl.int32, bitcast=True) > last_dropped, x * scale, 0.0)


@triton.jit(do_not_specialize=["last_dropped"])
def dropout_kernel(x, y, seed, last_dropped, scale, x_stride, C: tl.constexpr, BLOCK: tl.constexpr):
    """One row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < C
    values = _load(x + row * x_stride + columns, inside)
    values = _dropped_out(values, seed, last_dropped, scale, row, BLOCK)
    _store(y + row * C + columns, values, inside)


@triton.jit(do_not_specialize=["last_dropped"])
def forward_kernel(
    x,
    residual,
    weight,
    bias,
    y,
    h,
    mean,
    rstd,
    seed,
    last_dropped,
    scale,
    x_stride,
    residual_stride,
    eps,
    offset,
    CENTER: tl.constexpr,
    CAST_FIRST: tl.constexpr,
    SUM_TYPE: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row. residual, weight, bias, h, mean, rstd: None where there is none.

    Args:
        seed, last_dropped, scale: see `Dropout`; of x.
        x_stride, residual_stride: elements between rows; of y and h they are C.
        SUM_TYPE: dtype of h.
    """
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < C
    values = _load(x + row * x_stride + columns, inside)
    if seed is not None:
        values = _dropped_out(values, seed, last_dropped, scale, row, BLOCK)
        values = rounded(values, x.dtype.element_ty).to(tl.float32)
    if residual is not None:
        values = values + _load(residual + row * residual_stride + columns, inside)
        values = rounded(values, SUM_TYPE).to(tl.float32)
        if h is not None:
            _store(h + row * C + columns, values, inside)
    if CENTER:
        row_mean = _mean(values, C)
        values = tl.where(inside, values - row_mean, 0.0)
        if mean is not None:
            tl.store(mean + row, row_mean)
    row_rstd = tl.div_rn(1.0, tl.sqrt_rn(_mean(values * values, C) + eps))
    if rstd is not None:
        tl.store(rstd + row, row_rstd)
    result = values * row_rstd
    if CAST_FIRST:
        result = rounded(result, SUM_TYPE).to(tl.float32)
    if weight is not None:
        result = result * (_load(weight + columns, inside) + offset)
    if bias is not None:
        result = result + _load(bias + columns, inside)
    _store(y + row * C + columns, result, inside)


@triton.jit(do_not_specialize=["n_rows", "last_dropped"])
def backward_kernel(
    dy,
    dsum,
    h,
    weight,
    mean,
    rstd,
    dx,
    dh,
    dweight,
    dbias,
    seed,
    last_dropped,
    scale,
    n_rows,
    dy_stride,
    dsum_stride,
    h_stride,
    offset,
    CENTER: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """ROWS rows at a time, every P-th such group, P being the number of programs.

    Args:
        dsum: gradient of h from elsewhere, to be added; or None.
        h, mean, rstd: None where only dbias is demanded.
        dx: gradient of x where x was dropped out; elsewhere it is dh.
        dx, dh, dweight, dbias: what is demanded, or None; the last two are (P, C) float32.
        seed, last_dropped, scale: see `Dropout`; None without dx.
    """
    program = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)[None, :]
    inside = columns < C
    if dweight is not None:
        weight_sum = tl.zeros([BLOCK], tl.float32)
    if dbias is not None:
        bias_sum = tl.zeros([BLOCK], tl.float32)
    programs = tl.num_programs(0)
    groups = (n_rows + ROWS - 1) // ROWS
    for i in range((groups - tl.program_id(0) + programs - 1) // programs):
        row = (program + i * programs) * ROWS + tl.arange(0, ROWS)[:, None]
        there = row < n_rows
        at = there & inside
        gradient = _load(dy + row * dy_stride + columns, at)
        if dbias is not None:
            bias_sum += tl.sum(gradient, axis=0)
        if h is not None:
            row_rstd = tl.load(rstd + row, mask=there, other=0.0)
            normalised = _load(h + row * h_stride + columns, at)
            if CENTER:
                normalised = normalised - tl.load(mean + row, mask=there, other=0.0)
            normalised = normalised * row_rstd  # outside the rows anything finite; gradient is 0
            if dweight is not None:
                weight_sum += tl.sum(gradient * normalised, axis=0)
            if dx is not None or dh is not None:
                if weight is not None:
                    gradient = gradient * (_load(weight + columns, inside) + offset)
                result = gradient - normalised * _mean(gradient * normalised, C)
                if CENTER:
                    result = result - _mean(gradient, C)
                result = result * row_rstd
                if dsum is not None:
                    result = result + _load(dsum + row * dsum_stride + columns, at)
                if dh is not None:
                    _store(dh + row * C + columns, result, at)
                if dx is not None:
                    result = _dropped_out(result, seed, last_dropped, scale, row, BLOCK)
                    _store(dx + row * C + columns, result, at)
    columns, inside = tl.arange(0, BLOCK), tl.arange(0, BLOCK) < C
    if dweight is not None:
        tl.store(dweight + program * C + columns, weight_sum, mask=inside)
    if dbias is not None:
        tl.store(dbias + program * C + columns, bias_sum, mask=inside)


_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def _rows(x: Tensor) -> tuple[Tensor, int]:
    """x as rows, each dense, and the elements from one to the next; no view where x has no gaps.

    A copy where the strides do not allow a view.
    """
    columns = x.shape[-1]
    if x.is_contiguous():
        return x, columns
    rows = x.reshape(-1, columns)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    return rows, rows.stride(0)


def _empty_like(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def forward(
    inputs: Inputs, norm: Norm, *, statistics: bool, keep_sum: bool, dropout: Dropout
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """y, h if `keep_sum`, and mean and rstd (rows,) if `statistics`; without autograd."""
    x, residual, weight, bias = inputs
    columns, device = x.shape[-1], x.device
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    n_rows = x.numel() // columns
    y = _empty_like(x, norm.output_dtype(dtype, weight))
    h = _empty_like(x, dtype) if keep_sum else None
    mean = rstd = None
    if statistics:
        rstd = torch.empty(n_rows, dtype=torch.float32, device=device)
        mean = torch.empty_like(rstd) if norm.center else None
    if n_rows == 0:
        return y, h, mean, rstd
    x, x_stride = _rows(x)
    residual, residual_stride = (None, 0) if residual is None else _rows(residual)
    weight = None if weight is None else weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    seed, last_dropped, scale = dropout
    block = block_of(columns)
    launch(
        *(forward_kernel, device, (n_rows, 1, 1)),
        (x, residual, weight, bias, y, h, mean, rstd, seed),
        (last_dropped, scale, x_stride, residual_stride, norm.eps, norm.offset),
        (norm.center, norm.cast_first, _TYPES[dtype], columns, block),
        options(block),
    )
    return y, h, mean, rstd


def backward(
    dy: Tensor,
    dsum: Tensor | None,
    h: Tensor | None,
    weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    norm: Norm,
    demanded: Sequence[bool],
    dtypes: Sequence[torch.dtype | None],
    dropout: Dropout,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, h, weight and bias that are demanded, None for the others.

    Args:
        dsum: gradient of h that is to be added; None: none.
        h, mean, rstd: may be None where only the gradient of bias is demanded.
        demanded: that of x only where it differs from that of h, by dropout.
        dtypes: of x, weight and bias.
    """
    wants_x, wants_h, wants_weight, wants_bias = demanded
    columns, device = dy.shape[-1], dy.device
    n_rows, block = dy.numel() // columns, block_of(columns)
    dx = _empty_like(h, dtypes[0]) if wants_x else None
    dh = _empty_like(h, h.dtype) if wants_h else None
    wanted = wants_weight + wants_bias
    rows_at_once, programs = groups_of(n_rows, block) if wanted else (1, n_rows)
    if programs == 0:
        return dx, dh, None, None
    partials = of_weight = of_bias = dweight = dbias = None
    if wanted:
        partials = torch.empty((wanted, programs, columns), dtype=torch.float32, device=device)
        if wants_weight:
            of_weight = partials  # the first of them
            dweight = torch.empty(columns, dtype=dtypes[1], device=device)
        if wants_bias:
            of_bias = partials[1] if wants_weight else partials
            dbias = torch.empty(columns, dtype=dtypes[2], device=device)
    dy, dy_stride = _rows(dy)
    dsum, dsum_stride = (None, 0) if dsum is None else _rows(dsum)
    h, h_stride = (None, 0) if h is None else _rows(h)
    weight = None if weight is None else weight.contiguous()
    seed, last_dropped, scale = dropout if wants_x else NO_DROPOUT
    launch(
        *(backward_kernel, device, (programs, 1, 1)),
        (dy, dsum, h, weight, mean, rstd, dx, dh, of_weight, of_bias, seed),
        (last_dropped, scale, n_rows, dy_stride, dsum_stride, h_stride, norm.offset),
        (norm.center, columns, rows_at_once, block),
        options(block),
    )
    if wanted:
        sum_partials(partials, *present((dweight, dbias)))
    return dx, dh, dweight, dbias


def dropped_out(x: Tensor, dropout: Dropout, dtype: torch.dtype) -> Tensor:
    """x without the elements that `dropout` drops, in that dtype."""
    y = _empty_like(x, dtype)
    if x.numel() == 0:
        return y
    rows, stride = _rows(x)
    seed, *numbers = dropout
    columns = x.shape[-1]
    block = block_of(columns)
    launch(
        *(dropout_kernel, x.device, (x.numel() // columns, 1, 1)),
        *((rows, y, seed), (*numbers, stride), (columns, block), options(block)),
    )
    return y


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, bias, norm, return_sum, dropout):
        demands_x, demands_residual, demands_weight, _ = ctx.needs_input_grad[:4]
        demands_h = demands_x or demands_residual
        # the gradient of bias needs no rows
        statistics = demands_h or demands_weight
        keep_sum = residual is not None and (return_sum or statistics)
        inputs = Inputs(x, residual, weight, bias)
        y, h, mean, rstd = forward(
            inputs, norm, statistics=statistics, keep_sum=keep_sum, dropout=dropout
        )
        ctx.norm = norm
        ctx.dtypes = [None if t is None else t.dtype for t in inputs]
        saved = (x if residual is None else h) if statistics else None
        seed, ctx.last_dropped, ctx.scale = dropout if demands_x else NO_DROPOUT
        ctx.save_for_backward(saved, weight if demands_h else None, mean, rstd, seed)
        ctx.set_materialize_grads(False)
        if not return_sum:
            return y
        if not demands_h:
            ctx.mark_non_differentiable(h)
        return y, h

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dsum=None):
        demands_x, demands_residual, *demands_parameters = ctx.needs_input_grad[:4]
        x_dtype, residual_dtype, *dtypes = ctx.dtypes
        drops = ctx.scale is not None
        if dy is None:
            dx, dh, dweight, dbias = None, dsum, None, None
            if drops and dsum is not None:
                dropout = Dropout(ctx.saved_tensors[-1], ctx.last_dropped, ctx.scale)
                dx = dropped_out(dsum, dropout, x_dtype)
        else:
            h, weight, mean, rstd, seed = ctx.saved_tensors
            dropout = Dropout(seed, ctx.last_dropped, ctx.scale) if drops else NO_DROPOUT
            dsum = dsum if demands_x or demands_residual else None
            demands_h = demands_residual or (demands_x and not drops)
            demanded = (drops, demands_h, *demands_parameters)
            dx, dh, dweight, dbias = backward(
                *(dy, dsum, h, weight, mean, rstd, ctx.norm, demanded, (x_dtype, *dtypes), dropout)
            )
        if demands_x and not drops and dh is not None:
            dx = _cast(dh, x_dtype)
        dresidual = _cast(dh, residual_dtype) if demands_residual and dh is not None else None
        return dx, dresidual, dweight, dbias, None, None, None


def _cast(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    # `to` takes a microsecond to find that there is nothing to do
    return gradient if gradient.dtype == dtype else gradient.to(dtype)


def run(inputs: Inputs, norm: Norm, return_sum: bool, dropout: float = 0.0) -> Result:
    """y, or (y, dropout(x) + residual), with autograd where something requires a gradient."""
    drop = draw_dropout(dropout, inputs.x.device) if dropout else NO_DROPOUT
    if torch.is_grad_enabled() and any([t is not None and t.requires_grad for t in inputs]):
        return _Norm.apply(*inputs, norm, return_sum, drop)
    y, h, *_ = forward(inputs, norm, statistics=False, keep_sum=return_sum, dropout=drop)
    return (y, h) if return_sum else y
