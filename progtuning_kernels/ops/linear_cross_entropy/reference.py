"""The rows of linear_cross_entropy: contract and plain torch; see README.md."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ..contract import check_dtype

LABEL_DTYPES = (torch.int64, torch.int32)
Reduction = Literal["mean", "sum", "none"]
_SCALED_PIECE = 2**24  # elements that `scale` holds in float32 at once


class Options(NamedTuple):
    """The arguments that are the same in eager and compiled code; see `linear_cross_entropy`."""

    ignore_index: int
    label_smoothing: float
    softcap: float | None
    z_loss: float
    reduction: str
    accum_dtype: torch.dtype | None
    return_z_loss: bool
    return_token_accuracy: bool
    max_logits_bytes: int | None
    implementation: str | None

    def check(self, dtype: torch.dtype) -> None:
        """Raise ValueError for what is out of range, or cannot be with a hidden of `dtype`."""
        op, choices = "linear_cross_entropy", get_args(Reduction)
        if self.reduction not in choices:
            raise ValueError(f"{op}: reduction must be one of {choices}, got {self.reduction!r}")
        if not 0 <= self.label_smoothing <= 1:
            raise ValueError(f"{op}: label_smoothing {self.label_smoothing} is not in [0, 1]")
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"{op}: softcap {self.softcap} is not positive")
        if not self.z_loss >= 0:
            raise ValueError(f"{op}: z_loss {self.z_loss} is negative")
        if self.max_logits_bytes is not None and self.max_logits_bytes <= 0:
            raise ValueError(f"{op}: max_logits_bytes {self.max_logits_bytes} is not positive")
        if self.accum_dtype is not None:
            # sums over rows could leave float16's range before the loss scale is known
            dtypes = {wide(dtype), dtype} - {torch.float16}
            if self.accum_dtype not in dtypes:
                names = " or ".join(sorted(str(dtype) for dtype in dtypes))
                raise ValueError(
                    f"{op}: hidden is {dtype}: accum_dtype must be {names}, got {self.accum_dtype}"
                )


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of all arithmetic but the matmuls."""
    return torch.promote_types(dtype, torch.float32)


@dataclass(frozen=True)
class RowLoss:
    """What turns a row of logits into its loss and its gradient.

    Attributes:
        class_weight, class_weight_sum: (V,) and 0-dim in float32 (float64), or both None.
        factor: on the device, 0-dim or (R,): what a row's gradient is multiplied by.
    """

    ignore_index: int
    label_smoothing: float
    softcap: float | None
    z_loss: float
    class_weight: Tensor | None
    class_weight_sum: Tensor | None
    factor: Tensor


def check(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, class_weight: Tensor | None
) -> None:
    """Raise ValueError where the tensors do not fit together."""
    op = "linear_cross_entropy"
    if hidden.ndim == 0 or weight.ndim != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{op}: expected hidden (..., H) and weight (V, H), got "
            f"{tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if len(weight) == 0:
        raise ValueError(f"{op}: weight has no rows")
    rows = tuple(hidden.shape[:-1])
    if labels.shape != rows:
        raise ValueError(
            f"{op}: hidden {tuple(hidden.shape)} needs labels {rows}, got {tuple(labels.shape)}"
        )
    if labels.dtype not in LABEL_DTYPES:
        raise ValueError(f"{op}: labels must be int64 or int32, not {labels.dtype}")
    check_dtype(op, hidden.dtype, "hidden")
    for name, tensor in (("bias", bias), ("class_weight", class_weight)):
        if tensor is not None and tensor.shape != weight.shape[:1]:
            raise ValueError(f"{op}: {name} must be ({len(weight)},), got {tuple(tensor.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != hidden.dtype:
            raise ValueError(f"{op}: hidden is {hidden.dtype}, {name} is {tensor.dtype}")
    for tensor in (weight, labels, bias, class_weight):
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"{op}: tensors on {hidden.device} and {tensor.device}")


def padded(classes: int) -> int:
    """Elements from row to row of the logits; 50,257 would allow accesses of 2 bytes only."""
    return math.ceil(classes / 16) * 16


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
    """Write the loss of each row to `losses`, and d(logits) over the logits if `gradient`.

    Args:
        logits: (R, V), as the matmul gives them: before the softcap.
        labels: (R,). losses: (R,) in float32 (float64).
        z_losses: (R,) as losses: the part of the loss that is z-loss; None where there is none.
        correct: (R,) as losses: 1 where the label is the first of the largest logits, else 0.
    """
    smoothing, cap = row_loss.label_smoothing, row_loss.softcap
    classes = logits.shape[1]
    x = logits.to(losses.dtype)
    ignored = labels == row_loss.ignore_index
    if correct is not None:
        correct.copy_((x.argmax(dim=1) == labels) & ~ignored)
    if cap is not None:
        tanh = torch.tanh(x / cap)
        x = tanh * cap
    log_p = torch.log_softmax(x, dim=1)
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
        z_loss = row_loss.z_loss * lse.square()
        loss = loss + z_loss
        of_softmax = of_softmax + 2 * row_loss.z_loss * lse
        if z_losses is not None:
            z_losses.copy_(z_loss.masked_fill(ignored, 0))
    losses.copy_(loss.masked_fill(ignored, 0))
    if not gradient:
        return
    d = log_p.exp_().mul_(of_softmax.expand_as(losses)[:, None])
    d.scatter_add_(1, index, -of_label.expand_as(losses)[:, None])
    if smoothing:
        d -= smoothing / classes * (1 if row_loss.class_weight is None else row_loss.class_weight)
    if cap is not None:
        d.mul_(1 - tanh).mul_(1 + tanh)  # the square would round what 1 - tanh keeps
    logits.copy_(d.mul_(row_loss.factor.view(-1, 1)).masked_fill_(ignored[:, None], 0))


def scale(gradient: Tensor, factor: Tensor) -> None:
    """Multiply in place by a 0-dim tensor of a wider dtype, which `mul_` would round first."""
    for piece in gradient.view(-1).split(_SCALED_PIECE):
        piece.copy_(piece.to(factor.dtype) * factor)
