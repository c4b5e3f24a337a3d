"""The rows of linear_cross_entropy in Triton: one program per row; see README.md."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import backend
from .reference import RowLoss, padded

# 16 elements per thread: 32 bytes of bfloat16 in flight, with registers left for 6 programs per SM
BLOCK = 4096
# in 3.10 Triton's default for enable_fp_fusion changes, and 3.9 warns where it is not given
OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}
SCALE_BLOCK = 2048
SCALE_OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


@triton.jit
def _tanh(x):
    """tanh within 3 units in the last place; 1 - e alone would lose small x."""
    magnitude = tl.abs(x)
    e = tl.exp(-2.0 * magnitude)
    large = (1.0 - e) / (1.0 + e)
    large = tl.where(x < 0.0, -large, large)
    near = tl.where(magnitude < 0.3, x, 0.0)
    square = near * near
    series = square * (-1382.0 / 155925) + 62.0 / 2835
    series = series * square - 17.0 / 315
    series = series * square + 2.0 / 15
    series = series * square - 1.0 / 3
    return tl.where(magnitude < 0.3, near + near * square * series, large)


@triton.jit
def _slope_of_tanh(x):
    """The derivative of tanh, which 1 - tanh(x)^2 would lose for large x."""
    e = tl.exp(-2.0 * tl.abs(x))
    return 4.0 * e / ((1.0 + e) * (1.0 + e))


@triton.jit(
    do_not_specialize=["ignore_index", "label_smoothing", "softcap", "inverse_softcap", "z_loss"]
)
def rows_kernel(
    logits,
    stride,
    width,
    classes,
    labels,
    losses,
    z_losses,
    correct,
    class_weight,
    class_weight_sum,
    factor,
    ignore_index,
    label_smoothing,
    softcap,
    inverse_softcap,
    z_loss,
    SMOOTHING: tl.constexpr,
    SOFTCAP: tl.constexpr,
    Z_LOSS: tl.constexpr,
    GRADIENT: tl.constexpr,
    FACTORS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Loss of one row, and d(logits) over its logits if GRADIENT.

    Args:
        logits: (programs, classes), `stride` elements from row to row, of which the first `width`
            may be read and written: a multiple of 16 lets accesses be vectors.
        labels, losses: one per program. factor: of d(logits), one, or one per program if FACTORS.
        z_losses, correct: one per program, or None.
        class_weight, class_weight_sum: float32, or both None.
    """
    row = tl.program_id(0).to(tl.int64)
    start_of_row = logits + row * stride
    label = tl.load(labels + row).to(tl.int64)
    if label == ignore_index:
        tl.store(losses + row, 0.0)
        if z_losses is not None:
            tl.store(z_losses + row, 0.0)
        if correct is not None:
            tl.store(correct + row, 0.0)
        if GRADIENT:
            for start in range(0, classes, BLOCK):
                column = start + tl.arange(0, BLOCK)
                zeros = tl.zeros([BLOCK], logits.dtype.element_ty)
                tl.store(start_of_row + column, zeros, mask=column < width)
    else:
        valid = (label >= 0) & (label < classes)
        # before the first reduction, whose barrier keeps the second pass's writes behind it
        x_label = tl.load(start_of_row + label, mask=valid, other=0.0).to(tl.float32)
        logit_label = x_label
        if SOFTCAP:
            x_label = softcap * _tanh(x_label * inverse_softcap)

        largest = float("-inf")
        total = 0.0
        weighted = 0.0
        ahead = 0
        for start in range(0, classes, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < classes
            x = tl.load(start_of_row + column, mask=column < width, other=0.0).to(tl.float32)
            if correct is not None:
                # as argmax, which takes the first of equals, and NaN for the largest
                behind = tl.where(column < label, x < logit_label, x <= logit_label)
                ahead += tl.sum((inside & (behind == 0)).to(tl.int32), axis=0)
            if SOFTCAP:
                x = softcap * _tanh(x * inverse_softcap)
            x = tl.where(inside, x, float("-inf"))
            if SMOOTHING:
                counted = tl.where(inside, x, 0.0)
                if class_weight is not None:
                    counted = counted * tl.load(class_weight + column, mask=inside, other=0.0)
                weighted += tl.sum(counted, axis=0)
            raised = tl.maximum(largest, tl.max(x, axis=0))
            shift = tl.where(raised == float("-inf"), 0.0, raised)  # -inf - -inf would be NaN
            total = total * tl.exp(largest - shift) + tl.sum(tl.exp(x - shift), axis=0)
            largest = raised

        log_total = tl.log(total)
        of_label = 1.0
        weights = 1.0 * classes
        if class_weight is not None:
            of_label = tl.load(class_weight + label, mask=valid, other=0.0)
            weights = tl.load(class_weight_sum)
        uniform = 0.0
        if SMOOTHING:
            of_label = (1.0 - label_smoothing) * of_label
            uniform = label_smoothing / classes
        of_softmax = of_label + uniform * weights
        # log_total is added last: largest - x is exact for logits close to each other
        loss = of_label * ((largest - x_label) + log_total)
        if SMOOTHING:
            loss += uniform * ((weights * largest - weighted) + weights * log_total)
        if Z_LOSS:
            lse = largest + log_total
            of_lse = z_loss * lse * lse
            loss += of_lse
            of_softmax += 2.0 * z_loss * lse
            if z_losses is not None:
                tl.store(z_losses + row, of_lse)
        tl.store(losses + row, tl.where(valid, loss, float("nan")))
        if correct is not None:
            tl.store(correct + row, tl.where(valid & (ahead == 0), 1.0, 0.0))

        if GRADIENT:
            scale = tl.load(factor + row) if FACTORS else tl.load(factor)
            inverse_total = 1.0 / total
            for start in range(0, classes, BLOCK):
                column = start + tl.arange(0, BLOCK)
                inside = column < classes
                x = tl.load(start_of_row + column, mask=column < width, other=0.0).to(tl.float32)
                slope = 1.0
                if SOFTCAP:
                    x = x * inverse_softcap
                    slope = _slope_of_tanh(x)
                    x = softcap * _tanh(x)
                x = tl.where(inside, x, float("-inf"))
                d = tl.exp(x - largest) * inverse_total * of_softmax
                if SMOOTHING:
                    if class_weight is not None:
                        d -= uniform * tl.load(class_weight + column, mask=inside, other=0.0)
                    else:
                        d -= uniform
                d = tl.where(column == label, d - of_label, d)
                d = d * slope * scale
                tl.store(start_of_row + column, d.to(logits.dtype.element_ty), mask=column < width)


@triton.jit(do_not_specialize=["n"])
def scale_kernel(values, factor, n, BLOCK: tl.constexpr):
    """values *= factor, without touching them where it is 1."""
    by = tl.load(factor)
    if by != 1.0:
        start = tl.program_id(0).to(tl.int64) * BLOCK
        at = values + start + tl.arange(0, BLOCK)
        if start + BLOCK <= n:  # without a mask, which alone lets accesses be vectors
            tl.store(at, (tl.load(at).to(tl.float32) * by).to(values.dtype.element_ty))
        else:
            inside = start + tl.arange(0, BLOCK) < n
            x = tl.load(at, mask=inside, other=0.0).to(tl.float32)
            tl.store(at, (x * by).to(values.dtype.element_ty), mask=inside)


def rows(
    logits: Tensor,
    labels: Tensor,
    losses: Tensor,
    row_loss: RowLoss,
    *,
    gradient: bool,
    z_losses: Tensor | None = None,
    correct: Tensor | None = None,
) -> None:
    """`reference.rows`; of tensors on the CPU under Triton's interpreter.

    It overwrites what lies between rows whose stride leaves room for `padded` classes.
    """
    if not len(logits):
        return
    cap, classes, stride = row_loss.softcap, logits.shape[1], logits.stride(0)
    width = padded(classes) if stride >= padded(classes) else classes
    with backend.device_guard(logits.device):
        rows_kernel[len(logits),](
            *(logits, stride, width, classes, labels.contiguous(), losses, z_losses, correct),
            *(row_loss.class_weight, row_loss.class_weight_sum, row_loss.factor),
            *(row_loss.ignore_index, row_loss.label_smoothing),
            *((1.0, 1.0) if cap is None else (cap, 1 / cap)),
            row_loss.z_loss,
            SMOOTHING=row_loss.label_smoothing != 0,
            SOFTCAP=cap is not None,
            Z_LOSS=row_loss.z_loss != 0,
            GRADIENT=gradient,
            FACTORS=row_loss.factor.ndim == 1,
            BLOCK=BLOCK,
            **OPTIONS,
        )


def scale(gradient: Tensor, factor: Tensor) -> None:
    """`reference.scale`; of a contiguous gradient."""
    if not gradient.numel():
        return
    with backend.device_guard(gradient.device):
        programs = triton.cdiv(gradient.numel(), SCALE_BLOCK)
        scale_kernel[programs,](gradient, factor, gradient.numel(), SCALE_BLOCK, **SCALE_OPTIONS)
    torch.autograd.graph.increment_version(gradient)
