"""masked_update: AdamW on a bucket of active tensors, everything in one pass and one call."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from ... import backend
from . import native, reference
from .bucket import Bucket, Hyper, Moments


def _reason_against_triton(bucket: Bucket) -> str | None:
    against = backend.triton_reason(bucket.device, bucket.dtype)
    if against is None and bucket.has_residuals:
        return "no Triton kernel for 8-bit residuals"
    return against or native.reason_against_kernels(bucket)


def _probe(device: torch.device) -> Bucket:
    p = torch.zeros(8, dtype=torch.float32, device=device)
    moments = Moments(torch.zeros_like(p), torch.zeros_like(p))
    step = torch.zeros((), dtype=torch.float32, device=device)
    return Bucket([p], [moments], [step], implementation="reference")


_triton = partial(backend.triton_function, __name__)
OP = backend.register(
    backend.Op(
        "masked_update",
        (
            backend.Implementation(
                *("native", native.update, native.reason_against),
                gradient_norm=native.gradient_norm,
                decide=native.decide,
            ),
            backend.Implementation(
                *("triton", _triton("update"), _reason_against_triton), decide=_triton("decide")
            ),
            backend.Implementation("reference", reference.update),
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
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) on a list of tensors, in place, in one pass.

        g  = grad * grad_factor                    t = step + 1
        m  = beta1*m + (1-beta1)*g                 v = beta2*v + (1-beta2)*g*g
        p -= lr*weight_decay*p
             + lr/(1-beta1^t) * m / (sqrt(v)/sqrt(1-beta2^t) + eps)

    Parameters, moments, scales, masters and steps are written to. The reference may leave grads
    multiplied by `grad_factor`. An optimizer keeps a `Bucket` for a stage instead of making one per
    call, as this does.

    Args:
        params: tensors of any shape, of one device and dtype: float32, bfloat16, float16, float64.
        grads: of the shape and dtype of their parameter; None leaves a tensor out.
        exp_avgs: m, of the parameter's shape: float32, bfloat16 (rounded stochastically), float64
            for float64, or int8 codes.
        exp_avg_sqs: v, of the dtype of m, or uint8 codes.
        steps: 0-dim float32, number of updates each tensor has had; increased by one.
        lr: float or 0-dim tensor.
        beta1: decay of m.
        beta2: decay of v.
        eps: added to the root of v.
        weight_decay: decoupled; acts on the old p.
        exp_avg_scales: float32, one per 256 elements of the codes of m; None: no codes.
        exp_avg_sq_scales: the same of v.
        masters: float32 copies of bfloat16 or float16 parameters, which are then what is updated;
            or int8 residuals of bfloat16 parameters, which are then updated in 24 bits.
        grad_factor: 0-dim float32 on the same device; None: 1.
        found_inf: 0-dim float32 on the same device, 0 or 1; 1 skips the update; None: 0.
        stochastic_rounding: of bfloat16 parameters without master.
        seed: of the random numbers, 64 bits.
        zero_grads: leave zeros in the gradients.
        implementation: "native", "triton" or "reference"; None chooses.

    Raises:
        ValueError: the tensors do not fit together, or `implementation` has no such name; in
            compiled code, an `lr` that is a tensor or a gradient that is None.
        RuntimeError: the implementation that is asked for cannot run, with its reason.
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
        lists = (params, grads, exp_avgs, exp_avg_sqs, steps)
        optional = (exp_avg_scales or (), exp_avg_sq_scales or (), masters or ())
        masked_update_op(
            *(list(tensors) for tensors in (*lists, *optional)),
            *(grad_factor, found_inf, (lr, weight_decay, eps, beta1, beta2)),
            *(stochastic_rounding, seed, zero_grads, implementation),
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
    masked_update(
        *(params, grads, exp_avgs, exp_avg_sqs, steps),
        **Hyper(*hyper)._asdict(),
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
