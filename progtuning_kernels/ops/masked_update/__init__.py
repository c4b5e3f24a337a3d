"""masked_update: AdamW on a bucket of active tensors, everything in one pass and one call.

    g  = grad * grad_factor
    m  = beta1*m + (1-beta1)*g                 v = beta2*v + (1-beta2)*g*g
    p -= lr*weight_decay*p + lr/(1-beta1^t) * m / (sqrt(v)/sqrt(1-beta2^t) + eps)      t = step + 1

(Loshchilov and Hutter, arXiv 1711.05101; decay acts on the old p.) `grad_factor` unscales and clips
in one; `found_inf` skips the call; gradients are zeroed on request, in a skipped call too.

- tensors: one device and one parameter dtype per bucket; any shapes, sizes and alignments,
  including empty. A gradient of None: that tensor is left out, its step count too.
- stored: p and grad in p's dtype; m and v in float32, bfloat16 (rounded stochastically), or 8-bit
  codes with one float32 per 256 elements; optionally a float32 master of a bfloat16 or float16 p;
  step as a 0-dim float32 per tensor. float64 parameters have float64 moments.
- computed: float32 (float64 for float64), each element on its own, without fused multiply-adds:
  kernels and specification give the same bits, for any number of threads. (The reference calls
  torch's fused kernel where that fits, and that rounds elsewhere.)
- random numbers: `low_precision.py`, from (seed, stream, index of the tensor, step, element).
- mutated: params, moments, scales, masters, steps; grads where zeroed. The reference, where it uses
  torch's fused kernel, leaves the grads multiplied by grad_factor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import backend
from ..bucket import (
    Bucket,
    Gradients,
    Hyper,
    Moments,
    alike,
    build_table,
    in_memory_order,
    is_dense,
    written,
)
from ..low_precision import (
    decode_exp_avg,
    decode_exp_avg_sq,
    encode_exp_avg,
    encode_exp_avg_sq,
    random_halves,
    stochastic_bfloat16,
    swapped_bytes,
)


def _one_minus_power(beta: float, steps: Tensor) -> Tensor:
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
    """Correctly rounded: torch's own on the CPU is a unit off in a fifth of all float32."""
    return x.sqrt() if x.dtype == torch.float64 else x.double().sqrt().to(x.dtype)


def _update_plain(
    bucket: Bucket,
    grads: Sequence[Tensor | None],
    hypers: Sequence[Hyper],
    *,
    grad_factor: Tensor | None,
    found_inf: Tensor | None,
    seed: int,
) -> None:
    """The specification, one tensor at a time; no host sync."""
    wide = torch.float64 if bucket.dtype == torch.float64 else torch.float32
    steps = torch.stack(bucket.steps).to(wide) + 1
    corrections = [
        (_one_minus_power(h.beta1, steps), _root(_one_minus_power(h.beta2, steps))) for h in hypers
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
            step = bucket.steps[i] + 1
            return random_halves(p.numel(), seed, stream, bucket.indices[i], step).view(p.shape)

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
        p_old = p.to(wide) if master is None else master
        p_new = p_old - (decay * p_old + (lr / bias1) * (m_new / denominator))

        stored = [(bucket.steps[i], bucket.steps[i] + 1)]
        if master is not None:
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

    It walks every tensor as one flat run of memory: a view with gaps is written outside itself and
    a gradient of other strides is read in the wrong order (both seen in torch 2.13, silently).
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
def reference(
    bucket: Bucket,
    gradients: Gradients,
    hypers: Sequence[Hyper],
    *,
    grad_factor: Tensor | None,
    found_inf: Tensor | None,
    seed: int,
    zero_grads: bool,
) -> None:
    """Torch's own fused kernel where it may be called, plain torch for the other tensors."""
    grads = gradients.given
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
        _update_plain(
            bucket, plain, hypers, grad_factor=grad_factor, found_inf=found_inf, seed=seed
        )
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
    if zero_grads:
        torch._foreach_zero_([grad for grad in grads if grad is not None])


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _native(
    bucket: Bucket,
    gradients: Gradients,
    hypers: Sequence[Hyper],
    *,
    grad_factor: Tensor | None,
    found_inf: Tensor | None,
    seed: int,
    zero_grads: bool,
) -> None:
    if bucket.table is None:
        build_table(bucket)
    on_cuda = bucket.device.type == "cuda"
    lrs = [
        hyper.lr.to(bucket.device, torch.float32)
        if on_cuda and isinstance(hyper.lr, Tensor) and hyper.lr.is_cuda
        else float(hyper.lr)
        for hyper in hypers
    ]
    groups = [
        (0.0, *hyper[1:], lr.data_ptr()) if isinstance(lr, Tensor) else (lr, *hyper[1:], 0)
        for lr, hyper in zip(lrs, hypers, strict=True)
    ]
    common = (
        backend.dtype_code(bucket.dtype),
        backend.dtype_code(bucket.moment_dtype),
        bucket.masters is not None,
        bucket.stochastic_rounding,
        _address(grad_factor),
        _address(found_inf),
        seed,
        zero_grads,
    )
    extension, table = backend.native_extension(), bucket.table.data_ptr()
    if on_cuda:
        chunks, ticket = bucket.chunks, bucket.ticket.data_ptr()
        where = (table, chunks.data_ptr(), len(chunks), ticket)
        with backend.device_guard(bucket.device):
            stream = backend.cuda_stream(bucket.device)
            extension.masked_update_cuda(*where, gradients.addresses, groups, *common, stream)
    else:
        threads = torch.get_num_threads()
        extension.masked_update_cpu(table, gradients.addresses, groups, *common, threads)
    written(bucket, gradients, zero_grads=zero_grads)


_NATIVE_MOMENTS = (torch.float32, torch.bfloat16, torch.int8)


def _reason_against_kernels(bucket: Bucket) -> str | None:
    """What neither the native nor the Triton kernels have."""
    if bucket.dtype == torch.float16 and bucket.masters is None:
        return "no kernel for float16 parameters without a master"
    if bucket.moment_dtype not in _NATIVE_MOMENTS and bucket.dtype != torch.float64:
        return f"no kernel for {bucket.moment_dtype} moments"
    if not all(bucket.flat):
        return "a tensor with gaps between its elements, or state of another order than its tensor"
    return None


def _reason_against_native(bucket: Bucket) -> str | None:
    reason = backend.native_reason(bucket.device) or _reason_against_kernels(bucket)
    if reason is None and bucket.device.type == "cuda" and bucket.dtype == torch.float64:
        return "no native kernel for float64 on cuda"
    return reason


def _triton(bucket: Bucket, gradients: Gradients, hypers: Sequence[Hyper], **step: Any) -> None:
    from .triton import update  # not before it is needed: triton need not be there

    update(bucket, gradients, hypers, **step)


def _reason_against_triton(bucket: Bucket) -> str | None:
    reason = backend.triton_reason(bucket.device) or _reason_against_kernels(bucket)
    if reason is None and bucket.dtype == torch.float64:
        return "no Triton kernel for float64"
    return reason


def _probe(device: torch.device) -> Bucket:
    p = torch.zeros(8, dtype=torch.float32, device=device)
    moments = Moments(torch.zeros_like(p), torch.zeros_like(p))
    step = torch.zeros((), dtype=torch.float32, device=device)
    return Bucket([p], [moments], [step], implementation="reference")


OP = backend.register(
    backend.Op(
        "masked_update",
        (
            backend.Implementation("native", _native, _reason_against_native),
            backend.Implementation("triton", _triton, _reason_against_triton),
            backend.Implementation("reference", reference, lambda bucket: None),
        ),
        _probe,
    )
)


@torch.no_grad()
def masked_update(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    exp_avg_scales: Sequence[Tensor] | None = None,
    exp_avg_sq_scales: Sequence[Tensor] | None = None,
    masters: Sequence[Tensor] | None = None,
    grad_factor: Tensor | None = None,
    found_inf: Tensor | None = None,
    stochastic_rounding: bool = False,
    seed: int = 0,
    zero_grads: bool = False,
    implementation: str | None = None,
) -> None:
    """One update of a list of tensors; the formula and the storage are at the top of this file.

    An optimizer keeps a `Bucket` for a stage instead of making one per call, as this does.

    Args:
        params, grads, exp_avgs, exp_avg_sqs: tensors of any shape, equal within an entry.
        steps: 0-dim float32, number of updates each tensor has had; increased by one.
        lr: float or 0-dim tensor. weight_decay: decoupled.
        exp_avg_scales, exp_avg_sq_scales: of 8-bit moments. masters: float32.
        grad_factor, found_inf: 0-dim float32 on the same device; None: 1 and 0.
        stochastic_rounding: of bfloat16 parameters without master.
        seed: of the random numbers. zero_grads: leave zeros in the gradients.
        implementation: force one instead of the first that can run.

    Raises:
        ValueError: a contract at the top of this file is broken.
        RuntimeError: a forced implementation that cannot run, with its reason.
    """
    if not len(params) == len(grads) == len(exp_avgs) == len(exp_avg_sqs) == len(steps):
        raise ValueError("masked_update: the lists differ in length")
    for p, grad in zip(params, grads, strict=True):
        if grad is not None and (grad.shape != p.shape or grad.dtype != p.dtype):
            raise ValueError(
                f"masked_update: a gradient of {tuple(grad.shape)} in {grad.dtype} for a parameter "
                f"of {tuple(p.shape)} in {p.dtype}"
            )
    if not params:
        return
    if torch.compiler.is_compiling():
        if isinstance(lr, Tensor) or any(grad is None for grad in grads):
            raise ValueError("masked_update: compiled code needs lr as a float and every gradient")
        masked_update_op(
            list(params),
            list(grads),
            list(exp_avgs),
            list(exp_avg_sqs),
            list(steps),
            list(exp_avg_scales or ()),
            list(exp_avg_sq_scales or ()),
            list(masters or ()),
            grad_factor,
            found_inf,
            (lr, weight_decay, eps, beta1, beta2),
            stochastic_rounding,
            seed,
            zero_grads,
            implementation,
        )
        return
    none = [None] * len(params)
    scales = (exp_avg_scales or none, exp_avg_sq_scales or none)
    moments = [Moments(*m) for m in zip(exp_avgs, exp_avg_sqs, *scales, strict=True)]
    bucket = Bucket(
        params,
        moments,
        steps,
        masters=masters,
        stochastic_rounding=stochastic_rounding,
        implementation=implementation,
    )
    bucket.update(
        grads,
        [Hyper(lr, weight_decay, eps, beta1, beta2)],
        grad_factor=grad_factor,
        found_inf=found_inf,
        seed=seed,
        zero_grads=zero_grads,
    )


_MUTATED = ("params", "grads", "exp_avgs", "exp_avg_sqs", "steps")
_MUTATED += ("exp_avg_scales", "exp_avg_sq_scales", "masters")


@torch.library.custom_op("progtuning::masked_update", mutates_args=_MUTATED)
def masked_update_op(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    exp_avg_scales: Sequence[Tensor],
    exp_avg_sq_scales: Sequence[Tensor],
    masters: Sequence[Tensor],
    grad_factor: Tensor | None,
    found_inf: Tensor | None,
    hyper: Sequence[float],
    stochastic_rounding: bool = False,
    seed: int = 0,
    zero_grads: bool = False,
    implementation: str | None = None,
) -> None:
    """`masked_update` for compiled code and for callers from outside; hyper as in `Hyper`.

    It costs 0.3 to 0.7 ms of dispatch for hundreds of tensors, which `Bucket.update` does not.
    """
    lr, weight_decay, eps, beta1, beta2 = hyper
    masked_update(
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
        exp_avg_scales=exp_avg_scales or None,
        exp_avg_sq_scales=exp_avg_sq_scales or None,
        masters=masters or None,
        grad_factor=grad_factor,
        found_inf=found_inf,
        stochastic_rounding=stochastic_rounding,
        seed=seed,
        zero_grads=zero_grads,
        implementation=implementation,
    )


@masked_update_op.register_fake
def _(params: Sequence[Tensor], *others: object, **options: object) -> None:
    return None
