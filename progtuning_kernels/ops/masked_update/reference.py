"""masked_update, AdamW on a bucket of active tensors, in plain torch; see README.md."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .bucket import Bucket, Gradients, Hyper, Moments, Step, alike, in_memory_order, is_dense
from .low_precision import (
    decode_exp_avg,
    decode_exp_avg_sq,
    encode_exp_avg,
    encode_exp_avg_sq,
    random_halves,
    split_24_bits,
    stochastic_bfloat16,
    swapped_bytes,
    with_residual,
)


def one_minus_power(beta: float, steps: Tensor) -> Tensor:
    """1 - beta^step as update_rules.h computes it. steps: (n,) float32 or float64."""
    x = steps * (math.log(beta) if beta else -math.inf)
    if steps.dtype == torch.float64:
        return -torch.expm1(x)
    done, halved = x < -18.0, []
    for _ in range(6):
        halved.append(x < -0.5)
        x = torch.where(halved[-1], x * 0.5, x)
    y = torch.full_like(x, 1.0 / 40320)
    for term in (1.0 / 5040, 1.0 / 720, 1.0 / 120, 1.0 / 24, 1.0 / 6, 0.5, 1.0):
        y = y * x + term
    y = -x * y
    for again in reversed(halved):
        y = torch.where(again, y * (2.0 - y), y)
    return torch.where(done, torch.ones_like(y), y)


def _root(x: Tensor) -> Tensor:
    """The correctly rounded root: torch's on the CPU is a unit off in a fifth of all float32."""
    return x.sqrt() if x.dtype == torch.float64 else x.double().sqrt().to(x.dtype)


def update_plain(
    bucket: Bucket, grads: Sequence[Tensor | None], hypers: Sequence[Hyper], step: Step
) -> None:
    """Update one tensor after the other: the specification, without a host sync."""
    grad_factor, found_inf, seed, _ = step
    wide = torch.float64 if bucket.dtype == torch.float64 else torch.float32
    steps = torch.stack(bucket.steps).to(wide) + 1
    corrections = [
        (one_minus_power(h.beta1, steps), _root(one_minus_power(h.beta2, steps))) for h in hypers
    ]
    for i, grad in enumerate(grads):
        if grad is None:
            continue
        hyper, moments = hypers[bucket.groups[i]], bucket.moments[i]
        bias1, root_bias2 = (c[i] for c in corrections[bucket.groups[i]])
        order = in_memory_order if bucket.flat[i] else torch.Tensor.detach
        p, m, v = map(order, (bucket.params[i], moments.exp_avg, moments.exp_avg_sq))
        master = None if bucket.masters is None else order(bucket.masters[i])
        g = order(alike(grad, bucket.params[i])).to(wide)

        def draw(stream, i=i, p=p):
            t = bucket.steps[i] + 1
            return random_halves(p.numel(), seed, stream, bucket.indices[i], t).view(p.shape)

        lr = hyper.lr
        if isinstance(lr, Tensor):
            lr = lr.to(bucket.device, wide)
        else:  # filled in on the device: a copy of a number would wait for it
            lr = torch.full((), lr, dtype=wide, device=bucket.device)
        decay = lr * torch.tensor(hyper.weight_decay, dtype=wide, device="cpu")
        if grad_factor is not None:
            g = g * grad_factor.to(wide)
        if moments.exp_avg_scale is None:
            m_old, v_old = m.to(wide), v.to(wide)
        else:
            m_old = decode_exp_avg(m, moments.exp_avg_scale)
            v_old = decode_exp_avg_sq(v, moments.exp_avg_sq_scale)
        m_new = hyper.beta1 * m_old + (1 - hyper.beta1) * g
        v_new = hyper.beta2 * v_old + (1 - hyper.beta2) * (g * g)
        denominator = _root(v_new) * root_bias2.reciprocal() + hyper.eps
        if master is None:
            p_old = p.to(wide)
        else:
            p_old = with_residual(p, master) if bucket.has_residuals else master
        p_new = p_old - (decay * p_old + (lr / bias1) * (m_new / denominator))

        stored = [(bucket.steps[i], bucket.steps[i] + 1)]
        if bucket.has_residuals:
            p_new, residual = split_24_bits(p_new, draw("moments"))
            stored.append((master, residual))
        elif master is not None:
            stored.append((master, p_new))
        if bucket.stochastic_rounding:
            p_new = stochastic_bfloat16(p_new, draw("param"))
        stored.append((p, p_new))
        if moments.exp_avg_scale is not None:
            m_new, m_scale = encode_exp_avg(m_new)
            v_new, v_scale = encode_exp_avg_sq(v_new, draw("moments"))
            stored += [(moments.exp_avg_scale, m_scale), (moments.exp_avg_sq_scale, v_scale)]
        elif m.dtype == torch.bfloat16:
            random = draw("moments")
            m_new = stochastic_bfloat16(m_new, random)
            v_new = stochastic_bfloat16(v_new, swapped_bytes(random))
        stored += [(m, m_new), (v, v_new)]
        for target, value in stored:
            if found_inf is not None:
                value = torch.where(found_inf == 0, value, target.to(value.dtype))
            target.copy_(value)


def _fits_torch_fused(p: Tensor, grad: Tensor, moments: Moments) -> bool:
    """Whether torch's fused kernel may be called for this tensor.

    That kernel takes every tensor for one flat run of memory: it writes outside a view with gaps,
    and reads a gradient of other strides in the wrong order (both seen in torch 2.13, silently).
    """
    tensors = (p, grad, moments.exp_avg, moments.exp_avg_sq)
    return (
        p.device.type in ("cpu", "cuda")
        and p.dtype in (torch.float32, torch.float64)
        and len({t.dtype for t in tensors}) == 1
        and len({t.stride() for t in tensors}) == 1
        and is_dense(p)
    )


@torch.no_grad()
def update(bucket: Bucket, gradients: Gradients, hypers: Sequence[Hyper], step: Step) -> None:
    """Update by torch's fused kernel where it may be called, by plain torch elsewhere."""
    grads, (grad_factor, found_inf, _, zero_grads) = gradients.given, step
    plain: list[Tensor | None] = [None] * len(grads)
    fused: list[list[int]] = [[] for _ in hypers]
    for i, (p, grad, moments) in enumerate(zip(bucket.params, grads, bucket.moments, strict=True)):
        if grad is None:
            continue
        if _fits_torch_fused(p, grad, moments):
            fused[bucket.groups[i]].append(i)
        else:
            plain[i] = grad
    if any(grad is not None for grad in plain):
        update_plain(bucket, plain, hypers, step)
    # as the kernels do: of all tensors of a bucket the version is one more after an update
    left_out = [p for p, grad in zip(bucket.params, grads, strict=True) if grad is None]
    torch.autograd.graph.increment_version(left_out)
    for hyper, members in zip(hypers, fused, strict=True):
        if not members:
            continue
        steps = [bucket.steps[i] for i in members]
        torch._foreach_add_(steps, 1)
        torch._fused_adamw_(
            [bucket.params[i] for i in members],
            [grads[i] for i in members],
            [bucket.moments[i].exp_avg for i in members],
            [bucket.moments[i].exp_avg_sq for i in members],
            [],
            steps,
            lr=hyper.lr,
            beta1=hyper.beta1,
            beta2=hyper.beta2,
            weight_decay=hyper.weight_decay,
            eps=hyper.eps,
            amsgrad=False,
            maximize=False,
            grad_scale=None if grad_factor is None else grad_factor.reciprocal(),
            found_inf=found_inf,
        )
        if found_inf is not None:
            torch._foreach_sub_(steps, [found_inf] * len(steps))
    if zero_grads and (there := [grad for grad in grads if grad is not None]):
        torch._foreach_zero_(there)
