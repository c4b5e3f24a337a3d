"""AdamW on a list of active tensors: unscale or clip, moments, decay and write-back in one call.

    g  = grad / grad_divisor
    m  = beta1*m + (1-beta1)*g                 v = beta2*v + (1-beta2)*g*g
    p -= lr*weight_decay*p + lr/(1-beta1^t) * m / (sqrt(v/(1-beta2^t)) + eps)      t = step + 1

(Loshchilov and Hutter, arXiv 1711.05101; decay acts on the old p.) Lists are parallel, one entry
per tensor, all of one device and one parameter dtype; sizes are free, including zero. Stored: p and
grad in their dtype, m and v in fp32 or in p's dtype, step as a 0-dim fp32 tensor. Computed: fp32,
or fp64 for fp64 parameters. Mutated: params, exp_avgs, exp_avg_sqs, steps; grads may come back
divided. Every element is its own, so the result does not depend on threads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _backend

Hyper = float | Tensor


def _is_dense(t: Tensor) -> bool:
    """Whether the elements fill one run of memory, in whatever order of dimensions."""
    if t.is_contiguous():
        return True
    return t.permute(sorted(range(t.ndim), key=t.stride, reverse=True)).is_contiguous()


def _fits_torch_fused(p: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor) -> bool:
    """Whether torch's fused kernel may be called for this tensor.

    It walks every tensor as one flat run of memory: a view with gaps is written outside itself and
    a gradient of other strides is read in the wrong order (both seen in torch 2.13, silently).
    """
    return (
        p.device.type in ("cpu", "cuda")
        and p.dtype == grad.dtype == exp_avg.dtype == exp_avg_sq.dtype
        and p.stride() == grad.stride() == exp_avg.stride() == exp_avg_sq.stride()
        and _is_dense(p)
    )


def _all_fit_torch_fused(*lists: list[Tensor]) -> bool:
    """The ordinary case, asked of 4 x 100 tensors in 47 us where one by one takes 118 us."""
    tensors = [tensor for tensors in lists for tensor in tensors]
    return (
        tensors[0].device.type in ("cpu", "cuda")
        and len({tensor.dtype for tensor in tensors}) == 1
        and all(map(Tensor.is_contiguous, tensors))
    )


def _update_plain(
    p: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    *,
    lr: Hyper,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    grad_divisor: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """The specification, one tensor at a time; no host sync."""
    compute = torch.float64 if p.dtype == torch.float64 else torch.float32
    g = grad.to(compute)
    if grad_divisor is not None:
        g = g / grad_divisor
    t = step.to(p.device, torch.float64) + 1
    m = beta1 * exp_avg.to(compute) + (1 - beta1) * g
    v = beta2 * exp_avg_sq.to(compute) + (1 - beta2) * g * g
    # bias corrections in fp64: in fp32 their relative error is 1e-5 in the first hundred steps
    step_size = (lr / (1 - beta1**t)).to(compute)
    denom = v.sqrt() / (1 - beta2**t).sqrt().to(compute) + eps
    old = p.to(compute)
    new = old - (lr * weight_decay * old + step_size * (m / denom))
    for target, value in ((exp_avg, m), (exp_avg_sq, v), (p, new), (step, step + 1)):
        if found_inf is not None:
            value = torch.where(found_inf.to(value.device) == 0, value, target.to(value.dtype))
        target.copy_(value)


@torch.no_grad()
def reference(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: Hyper,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    grad_divisor: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """Torch's own fused kernel where it may be called, plain torch for the other tensors."""
    lists = [list(tensors) for tensors in (params, grads, exp_avgs, exp_avg_sqs, steps)]
    if not _all_fit_torch_fused(*lists[:4]):
        fused: list[tuple[Tensor, ...]] = []
        for tensors in zip(*lists, strict=True):
            if _fits_torch_fused(*tensors[:4]):
                fused.append(tensors)
                continue
            _update_plain(
                *tensors,
                lr=lr,
                beta1=beta1,
                beta2=beta2,
                eps=eps,
                weight_decay=weight_decay,
                grad_divisor=grad_divisor,
                found_inf=found_inf,
            )
        if not fused:
            return
        lists = [list(tensors) for tensors in zip(*fused, strict=True)]
    t = lists[4]
    torch._foreach_add_(t, 1)
    torch._fused_adamw_(
        *lists[:4],
        [],
        t,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=False,
        maximize=False,
        grad_scale=grad_divisor,
        found_inf=found_inf,
    )
    if found_inf is not None:
        torch._foreach_sub_(t, [found_inf] * len(t))


OP = _backend.register(
    _backend.Op(
        "masked_update",
        (_backend.Implementation("reference", reference, lambda tensors: None),),
    )
)


def masked_update(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: Hyper,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    grad_divisor: Tensor | None = None,
    found_inf: Tensor | None = None,
    implementation: str | None = None,
) -> None:
    """Update every tensor of a bucket; the formula is at the top of this file.

    Args:
        params, grads, exp_avgs, exp_avg_sqs: tensors of any shape, equal within an entry.
        steps: 0-dim fp32, number of updates each tensor has had; increased by one.
        lr: float or 0-dim tensor. weight_decay: decoupled, per call.
        grad_divisor: 0-dim fp32 on the same device; gradients are divided by it (loss scale, or
            norm / max_norm for clipping). None: 1.
        found_inf: 0-dim fp32 on the same device; non-zero: nothing is changed.
        implementation: force one instead of the first that can run.

    Raises:
        ValueError: lists of different lengths, or shapes that differ within an entry.
        RuntimeError: a forced implementation that cannot run, with its reason.
    """
    if not len(params) == len(grads) == len(exp_avgs) == len(exp_avg_sqs) == len(steps):
        raise ValueError("masked_update: the lists differ in length")
    for p, *others in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
        if any(other.shape != p.shape for other in others):
            raise ValueError(f"masked_update: shapes differ from the parameter's {tuple(p.shape)}")
    if not params:
        return
    _backend.select(OP, params, implementation).function(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        steps,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        grad_divisor=grad_divisor,
        found_inf=found_inf,
    )
