"""A(multiplier (x + bias)) * up in Triton, in float32 and rounded once; see README.md."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..kept_launches import launch
from ..row_partials import count_partials, sum_partials
from .reference import Gradients, Inputs, Kind

# 8 elements per thread: 16 bytes of bfloat16
BLOCK = 1024
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}

ROOT_HALF = tl.constexpr(0.7071067811865476)
DENSITY_AT_0 = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2 pi)
TANH_1 = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi)
TANH_3 = tl.constexpr(0.07135481627260025)  # 0.044715 of it
TANH_SATURATED = tl.constexpr(16.0)  # logistic is 0 or 1 in float32, and the cube is finite


@triton.jit
def _logistic(z):
    """logistic(z) and logistic(-z)."""
    e = tl.exp(-tl.abs(z))
    larger = tl.div_rn(1.0, 1.0 + e)
    smaller = e * larger
    return tl.where(z < 0, smaller, larger), tl.where(z < 0, larger, smaller)


@triton.jit
def _value_and_slope(z, KIND: tl.constexpr):
    """A(z) and its derivative."""
    # z itself, not a clamped one, is a factor everywhere: NaN stays, and inf gives inf * 0
    if KIND == "none":
        below = 0.5 * (1.0 + tl.erf(z * ROOT_HALF))
        slope = below + z * (DENSITY_AT_0 * tl.exp(-0.5 * z * z))
    elif KIND == "tanh":
        c = tl.minimum(tl.maximum(z, -TANH_SATURATED), TANH_SATURATED)
        below, above = _logistic(c * (TANH_1 + TANH_3 * c * c))
        slope = below + (z * below) * (above * (TANH_1 + 3.0 * TANH_3 * c * c))
    else:
        below, above = _logistic(z)
        slope = below + (z * below) * above
    return z * below, slope


@triton.jit
def _load(pointer, offsets, inside):
    return tl.load(pointer + offsets, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store(pointer, offsets, x, inside):
    tl.store(pointer + offsets, x.to(pointer.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["cols", "blocks"])
def forward_kernel(
    out,
    x,
    bias,
    up,
    multiplier,
    cols,
    blocks,
    x_stride,
    up_stride,
    KIND: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One of `blocks` blocks of a row.

    bias, up, multiplier: or None. ALIGNED: cols is a multiple of 16.
    """
    if ALIGNED:
        cols = cols // 16 * 16
    row = (tl.program_id(0) // blocks).to(tl.int64)
    columns = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < cols
    z = _load(x + row * x_stride, columns, inside)
    if bias is not None:
        z += _load(bias, columns, inside)
    if multiplier is not None:
        z *= multiplier
    y, _ = _value_and_slope(z, KIND)
    if up is not None:
        y *= _load(up + row * up_stride, columns, inside)
    _store(out + row * cols, columns, y, inside)


@triton.jit(do_not_specialize=["rows", "cols", "blocks", "rows_of_piece"])
def backward_kernel(
    dx,
    dup,
    partials,
    grad,
    x,
    bias,
    up,
    multiplier,
    rows,
    cols,
    blocks,
    rows_of_piece,
    grad_stride,
    x_stride,
    up_stride,
    KIND: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One of `blocks` blocks of a piece of rows.

    dx, dup, partials (pieces, cols), bias, multiplier: or None.
    """
    if ALIGNED:
        cols = cols // 16 * 16
    piece = (tl.program_id(0) // blocks).to(tl.int64)
    columns = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < cols
    if bias is not None:
        b = _load(bias, columns, inside)
    if partials is not None:
        total = tl.zeros([BLOCK], tl.float32)
    first = piece * rows_of_piece
    for i in range(tl.minimum(rows_of_piece, rows - first)):
        row = first + i  # 64 bits: the interpreter counts loops in 32
        z = _load(x + row * x_stride, columns, inside)
        g = _load(grad + row * grad_stride, columns, inside)
        if bias is not None:
            z += b
        if multiplier is not None:
            z *= multiplier
        y, slope = _value_and_slope(z, KIND)
        if multiplier is not None:
            slope *= multiplier
        if dup is not None:
            _store(dup + row * cols, columns, g * y, inside)
        if up is not None:
            g *= _load(up + row * up_stride, columns, inside)
        if dx is not None:
            _store(dx + row * cols, columns, g * slope, inside)
        if partials is not None:
            total += g * slope
    if partials is not None:
        _store(partials + piece * cols, columns, total, inside)


def _as_rows(
    tensors: Sequence[Tensor | None], *, one_row: bool
) -> tuple[int, int, list[Tensor | None], list[int]]:
    """Rows, columns, the tensors as rows, not copied if those have a stride, and their strides.

    one_row: all elements are one row, if none has gaps. The stride of one row is 0: its length
    changes from batch to batch, and strides are specialised.
    """
    first = tensors[0]
    columns = first.shape[-1] if first.dim() else 1
    dense = [t is None or t.is_contiguous() for t in tensors]
    if one_row and all(dense):
        return 1, first.numel(), list(tensors), [0] * len(tensors)
    rows = first.numel() // columns
    views, strides = [], []
    for tensor, is_dense in zip(tensors, dense, strict=True):
        stride = columns
        if tensor is not None and not is_dense:
            tensor = tensor.reshape(-1, columns)
            tensor = tensor if tensor.stride(1) == 1 else tensor.contiguous()
            stride = tensor.stride(0)
        views.append(tensor)
        strides.append(0 if tensor is None or rows == 1 else stride)
    return rows, columns, views, strides


def _aligned(x: Tensor) -> bool:
    return x.dim() > 0 and x.shape[-1] % 16 == 0


def forward(inputs: Inputs, kind: Kind, multiplier: float = 1.0) -> Tensor:
    """`reference.forward`; of tensors on the CPU under Triton's interpreter."""
    x, bias, up = inputs
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if not x.numel():
        return out
    rows, cols, (x_rows, up_rows), strides = _as_rows((x, up), one_row=bias is None)
    bias = None if bias is None else bias.contiguous()
    blocks = -(-cols // BLOCK)
    launch(
        *(forward_kernel, x.device, (rows * blocks, 1, 1)),
        (out, x_rows, bias, up_rows),
        (None if multiplier == 1 else multiplier, cols, blocks, *strides),
        *((kind, _aligned(x), BLOCK), OPTIONS),
    )
    return out


def backward(
    grad: Tensor, inputs: Inputs, kind: Kind, demanded: Sequence[bool], multiplier: float = 1.0
) -> Gradients:
    """`reference.backward`; of tensors on the CPU under Triton's interpreter."""
    x, bias, up = inputs
    wants_x, wants_bias, wants_up = demanded
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if wants_x else None
    dup = torch.empty_like(x, memory_format=torch.contiguous_format) if wants_up else None
    if not x.numel():
        return dx, torch.zeros_like(bias) if wants_bias else None, dup
    rows, cols, (grad_rows, x_rows, up_rows), strides = _as_rows(
        (grad, x, up), one_row=bias is None
    )
    bias = None if bias is None else bias.contiguous()
    blocks = -(-cols // BLOCK)
    partials = dbias = None
    pieces, rows_of_piece = rows, 1
    if wants_bias:
        pieces = count_partials(rows)
        rows_of_piece = -(-rows // pieces)
        partials = torch.empty((pieces, cols), dtype=torch.float32, device=x.device)
        dbias = torch.empty_like(bias)
    launch(
        *(backward_kernel, x.device, (pieces * blocks, 1, 1)),
        (dx, dup, partials, grad_rows, x_rows, bias, up_rows),
        (None if multiplier == 1 else multiplier, rows, cols, blocks, rows_of_piece, *strides),
        *((kind, _aligned(x), BLOCK), OPTIONS),
    )
    if wants_bias:
        sum_partials(partials[None], dbias)
    return dx, dbias, dup
