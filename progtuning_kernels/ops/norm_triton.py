"""layer_norm and rms_norm in Triton: one program per row, held in registers, read once.

Backward is one kernel for whatever is demanded. Where the gradient of weight or bias is, a program
takes every P-th row and keeps their sums in registers; P of them go to memory, and a second kernel
adds them in a fixed order. P depends on the number of rows alone, and nothing is added atomically.

Accumulation is float32. Roots and quotients are the IEEE ones: there is one per row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _backend
from .norm import Norm, Result

ROWS_PER_PARTIAL, MAX_PARTIALS = 16, 512
# Of partial sums, that a program of the second kernel adds at a time: 32 columns are 128 bytes.
SUM_ROWS, SUM_COLUMNS = 32, 32
SUM_OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}
# Triton's interpreter truncates to bfloat16 where the GPU rounds.
ROUND_BY_BITS = tl.constexpr(bool(triton.knobs.runtime.interpret))


def options(block: int) -> dict[str, int | bool]:
    """Of the kernels that hold `block` columns: more than 512 per warp would spill in backward."""
    warps = max(1, min(4, block // 128), block // 512)
    return {"num_warps": warps, "enable_fp_fusion": True}


@triton.jit
def _rounded(x, TYPE: tl.constexpr):
    """float32 to TYPE, to nearest even."""
    if ROUND_BY_BITS and TYPE == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        special = (bits & 0x7F800000) == 0x7F800000
        quiet = tl.where((bits & 0x007FFFFF) != 0, 0x00400000, 0).to(tl.uint32)
        bits = tl.where(special, bits | quiet, bits + ((bits >> 16) & 1) + 0x7FFF)
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(TYPE)


@triton.jit
def _load(pointers, inside):
    return tl.load(pointers, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store(pointers, x, inside):
    tl.store(pointers, _rounded(x, pointers.dtype.element_ty), mask=inside)


@triton.jit
def _mean(x, C: tl.constexpr):
    return tl.div_rn(tl.sum(x, axis=0), tl.full([], C, tl.float32))


@triton.jit
def forward_kernel(
    x,
    residual,
    weight,
    bias,
    y,
    h,
    mean,
    rstd,
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
        x_stride, residual_stride: elements between rows; of y and h they are C.
        SUM_TYPE: dtype of x + residual.
    """
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < C
    values = _load(x + row * x_stride + columns, inside)
    if residual is not None:
        values = values + _load(residual + row * residual_stride + columns, inside)
        values = _rounded(values, SUM_TYPE).to(tl.float32)
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
        result = _rounded(result, SUM_TYPE).to(tl.float32)
    if weight is not None:
        result = result * (_load(weight + columns, inside) + offset)
    if bias is not None:
        result = result + _load(bias + columns, inside)
    _store(y + row * C + columns, result, inside)


@triton.jit(do_not_specialize=["n_rows"])
def backward_kernel(
    dy,
    dsum,
    h,
    weight,
    mean,
    rstd,
    dh,
    dweight,
    dbias,
    n_rows,
    dy_stride,
    dsum_stride,
    h_stride,
    offset,
    CENTER: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Every P-th of the rows, P being the number of programs.

    Args:
        dsum: gradient of h from elsewhere, to be added; or None.
        h, mean, rstd: None where only dbias is demanded.
        dh, dweight, dbias: what is demanded, or None; the last two are (P, C) float32.
    """
    program = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < C
    if dweight is not None:
        weight_sum = tl.zeros([BLOCK], tl.float32)
    if dbias is not None:
        bias_sum = tl.zeros([BLOCK], tl.float32)
    programs = tl.num_programs(0)
    for i in range((n_rows - tl.program_id(0) + programs - 1) // programs):
        row = program + i * programs
        gradient = _load(dy + row * dy_stride + columns, inside)
        if dbias is not None:
            bias_sum += gradient
        if h is not None:
            row_rstd = tl.load(rstd + row)
            normalised = _load(h + row * h_stride + columns, inside)
            if CENTER:
                normalised = normalised - tl.load(mean + row)
            normalised = normalised * row_rstd  # outside the row anything finite; gradient is 0
            if dweight is not None:
                weight_sum += gradient * normalised
            if dh is not None:
                if weight is not None:
                    gradient = gradient * (_load(weight + columns, inside) + offset)
                result = gradient - normalised * _mean(gradient * normalised, C)
                if CENTER:
                    result = result - _mean(gradient, C)
                result = result * row_rstd
                if dsum is not None:
                    result = result + _load(dsum + row * dsum_stride + columns, inside)
                _store(dh + row * C + columns, result, inside)
    if dweight is not None:
        tl.store(dweight + program * C + columns, weight_sum, mask=inside)
    if dbias is not None:
        tl.store(dbias + program * C + columns, bias_sum, mask=inside)


@triton.jit(do_not_specialize=["n_partials"])
def sum_partials_kernel(
    partials,
    first,
    second,
    n_partials,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Column sums of partials, (1 or 2, n_partials, C), into first and second (or None)."""
    which = tl.program_id(1)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < C
    base = partials + which.to(tl.int64) * n_partials * C
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, n_partials, ROWS):
        rows = start + tl.arange(0, ROWS)
        pointers = base + rows.to(tl.int64)[:, None] * C + columns[None, :]
        total += tl.load(pointers, mask=(rows < n_partials)[:, None] & inside[None, :], other=0.0)
    result = tl.sum(total, axis=0)
    if which == 0:
        _store(first + columns, result, inside)
    if second is not None:
        if which == 1:
            _store(second + columns, result, inside)


_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Forward(NamedTuple):
    """y; x + residual if there is one and it was asked for; statistics of the rows if asked for."""

    y: Tensor
    h: Tensor | None
    mean: Tensor | None
    rstd: Tensor | None


def _rows(x: Tensor) -> Tensor:
    """(rows, C), each row dense; a copy only where the strides do not allow a view."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: Norm,
    *,
    statistics: bool,
    keep_sum: bool = False,
) -> Forward:
    """Without autograd. keep_sum: h is stored."""
    columns, device = x.shape[-1], x.device
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    y = torch.empty(x.shape, dtype=norm.output_dtype(dtype, weight), device=device)
    h = torch.empty(x.shape, dtype=dtype, device=device) if keep_sum else None
    mean = rstd = None
    if statistics:
        rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=device)
        mean = torch.empty_like(rstd) if norm.center else None
    if x.numel() == 0:
        return Forward(y, h, mean, rstd)
    x = _rows(x)
    residual = None if residual is None else _rows(residual)
    weight = None if weight is None else weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    block = triton.next_power_of_2(columns)
    with _backend.device_guard(device):
        forward_kernel[len(x),](
            *(x, residual, weight, bias, y, h, mean, rstd),
            *(x.stride(0), 0 if residual is None else residual.stride(0), norm.eps, norm.offset),
            *(norm.center, norm.cast_first, _TYPES[dtype], columns, block),
            **options(block),
        )
    return Forward(y, h, mean, rstd)


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
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of h, weight and bias that are demanded, None for the others.

    Args:
        dsum: gradient of h that is to be added; None: none.
        h, mean, rstd: may be None where only the gradient of bias is demanded.
        dtypes: of weight and bias.
    """
    wants_h, *wants_parameters = demanded
    columns, device = dy.shape[-1], dy.device
    dy_rows = _rows(dy)
    n_rows, block = len(dy_rows), triton.next_power_of_2(columns)
    dh = torch.empty(h.shape, dtype=h.dtype, device=device) if wants_h else None
    sums: list[Tensor | None] = [None, None]
    if any(wants_parameters):
        programs = max(1, min(triton.cdiv(n_rows, ROWS_PER_PARTIAL), MAX_PARTIALS))
        partials = torch.empty((sum(wants_parameters), programs, columns), device=device)
        unused = iter(partials)
        sums = [next(unused) if wanted else None for wanted in wants_parameters]
    else:
        programs = n_rows
    if programs == 0:
        return dh, None, None
    h_rows = None if h is None else _rows(h)
    dsum = None if dsum is None else _rows(dsum)
    weight = None if weight is None else weight.contiguous()
    gradients = [
        torch.empty(columns, dtype=dtype, device=device) if wanted else None
        for wanted, dtype in zip(wants_parameters, dtypes, strict=True)
    ]
    with _backend.device_guard(device):
        backward_kernel[programs,](
            *(dy_rows, dsum, h_rows, weight, mean, rstd, dh, *sums, n_rows, dy_rows.stride(0)),
            *(0 if rows is None else rows.stride(0) for rows in (dsum, h_rows)),
            *(norm.offset, norm.center, columns, block),
            **options(block),
        )
        if any(wants_parameters):
            present = [gradient for gradient in gradients if gradient is not None]
            sum_partials_kernel[triton.cdiv(columns, SUM_COLUMNS), len(present)](
                *(partials, *(present + [None])[:2], programs, columns, SUM_ROWS, SUM_COLUMNS),
                **SUM_OPTIONS,
            )
    return dh, *gradients


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, bias, norm, return_sum):
        demands_x, demands_residual, demands_weight, _ = ctx.needs_input_grad[:4]
        demands_h = demands_x or demands_residual
        # the gradient of bias needs no rows
        statistics = demands_h or demands_weight
        keep_sum = residual is not None and (return_sum or statistics)
        y, h, mean, rstd = forward(
            x, residual, weight, bias, norm, statistics=statistics, keep_sum=keep_sum
        )
        ctx.norm = norm
        ctx.dtypes = [None if t is None else t.dtype for t in (x, residual, weight, bias)]
        saved = (x if residual is None else h) if statistics else None
        ctx.save_for_backward(saved, weight if demands_h else None, mean, rstd)
        ctx.set_materialize_grads(False)
        if not return_sum:
            return y
        if not demands_h:
            ctx.mark_non_differentiable(h)
        return y, h

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dsum=None):
        demands_x, demands_residual, *demands_parameters = ctx.needs_input_grad[:4]
        x_dtype, residual_dtype, *dtypes = ctx.dtypes
        demanded = [demands_x or demands_residual, *demands_parameters]
        if dy is None:
            dh, dweight, dbias = dsum, None, None
        else:
            h, weight, mean, rstd = ctx.saved_tensors
            dsum = dsum if demanded[0] else None
            dh, dweight, dbias = backward(
                dy, dsum, h, weight, mean, rstd, ctx.norm, demanded, dtypes
            )
        dx = dh.to(x_dtype) if demands_x and dh is not None else None
        dresidual = dh.to(residual_dtype) if demands_residual and dh is not None else None
        return dx, dresidual, dweight, dbias, None, None


def norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: Norm,
    return_sum: bool,
) -> Result:
    """y, or (y, x + residual), with autograd where something requires a gradient."""
    tensors = (x, residual, weight, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return _Norm.apply(*tensors, norm, return_sum)
    done = forward(*tensors, norm, statistics=False, keep_sum=return_sum)
    return (done.y, done.h) if return_sum else done.y
