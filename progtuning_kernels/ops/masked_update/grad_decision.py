"""One norm over all gradients of a step, and what follows from it; formulas in README.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...sharding import is_sharded, local_of
from ..masked_norm import masked_norm
from .bucket import Bucket, Gradients, in_memory_order


class GradDecision(NamedTuple):
    """All 0-dim float32 on the first bucket's device.

    Attributes:
        norm: unscaled, before clipping; None where neither clipping nor skipping needs it.
        grad_factor: what the update multiplies gradients by; None: 1.
        found_inf: 1 skips the update; None: nothing was looked for.
        counted: the step, if skipped, is counted in `control` already.
    """

    norm: Tensor | None
    grad_factor: Tensor | None
    found_inf: Tensor | None
    counted: bool = False


def decide(
    buckets: Sequence[Bucket],
    gradients: Sequence[Gradients],
    *,
    max_grad_norm: float | None,
    skip_nonfinite: bool,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    known_norm: Tensor | None = None,
    previous_norm: Tensor | None = None,
    control: Tensor | None = None,
) -> GradDecision:
    """Norm, factor and finding for the gradients of `buckets`, without a host sync.

    Args:
        gradients: per bucket; at least one is there.
        max_grad_norm: None: no clipping.
        skip_nonfinite: look for NaN and infinities; without clipping this is what costs the norm.
        grad_scale, found_inf: GradScaler's, 0-dim; None: 1 and nothing found.
        known_norm: 0-dim, the norm of the gradients as they are (scaled), if it is known.
        previous_norm: 0-dim; clip by it instead of by the norm of these gradients, if it is finite.
        control: (4,) float32 for a kernel to write norm, grad_factor and found_inf into
            and to count skipped steps in; None: a fresh one.
    """
    device = buckets[0].device
    if grad_scale is not None:
        grad_scale = grad_scale.to(device, torch.float32)
    if found_inf is not None:
        found_inf = found_inf.to(device, torch.float32)
    takes_norm = max_grad_norm is not None or skip_nonfinite
    on_device = takes_norm and known_norm is None and previous_norm is None
    if on_device and _decided_on_device(buckets):
        counted = control is not None
        if control is None:
            control = torch.zeros(4, dtype=torch.float32, device=device)
        buckets[0].implementation.decide(
            *(buckets, gradients),
            max_grad_norm=max_grad_norm,
            skip_nonfinite=skip_nonfinite,
            grad_scale=grad_scale,
            found_inf=found_inf,
            control=control,
        )
        return GradDecision(control[0], control[1], control[2], counted)
    if takes_norm and known_norm is None:
        known_norm = _norm(buckets, gradients, device)
    return decide_by(
        None if known_norm is None else known_norm.to(device),
        max_grad_norm=max_grad_norm,
        skip_nonfinite=skip_nonfinite,
        grad_scale=grad_scale,
        found_inf=found_inf,
        previous_norm=previous_norm,
    )


def decide_by(
    norm: Tensor | None,
    *,
    max_grad_norm: float | None,
    skip_nonfinite: bool,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    previous_norm: Tensor | None = None,
) -> GradDecision:
    """`decide` by a norm that is known; its tensors lie on the norm's device.

    Args:
        norm: 0-dim, of the gradients as they are (scaled); None where nothing needs it.
    """
    if norm is None or (max_grad_norm is None and not skip_nonfinite):
        factor = None if grad_scale is None else grad_scale.reciprocal()
        return GradDecision(None, factor, found_inf)
    if grad_scale is not None:
        norm = norm / grad_scale
    found = None if found_inf is None else found_inf != 0
    if skip_nonfinite:
        found = ~norm.isfinite() if found is None else found | ~norm.isfinite()
    factor = None
    if max_grad_norm is not None:
        clip_by = norm
        if previous_norm is not None:  # not finite where there was no good step yet
            previous = previous_norm.to(norm.device)
            clip_by = torch.where(previous.isfinite(), previous, norm)
        factor = (max_grad_norm / (clip_by + 1e-6)).clamp(max=1.0)
        if not factor.is_cuda and factor == 1.0:
            factor = None  # torch's own kernel would write the gradients back
    if grad_scale is not None:
        factor = grad_scale.reciprocal() if factor is None else factor / grad_scale
    return GradDecision(norm, factor, None if found is None else found.float())


def _norm(
    buckets: Sequence[Bucket], gradients: Sequence[Gradients], device: torch.device
) -> Tensor:
    norms = []
    rest: dict[torch.device, list[Tensor]] = {}
    for bucket, some in zip(buckets, gradients, strict=True):
        own = bucket.implementation.gradient_norm
        if own is not None and bucket.device.type == "cpu":
            norms.append(own(bucket, some))
        else:
            present = [in_memory_order(grad) for grad in some.ordered if grad is not None]
            rest.setdefault(bucket.device, []).extend(present)
    norms += [masked_norm(same) for same in rest.values()]
    norms = [norm.to(device) for norm in norms]
    return norms[0] if len(norms) == 1 else masked_norm(norms)


def _decided_on_device(buckets: Sequence[Bucket]) -> bool:
    device, first = buckets[0].device, buckets[0].implementation
    return (
        device.type == "cuda"
        and first.decide is not None
        and all(bucket.device == device and bucket.implementation == first for bucket in buckets)
    )


def norm_over_ranks(grads: Sequence[Tensor | None]) -> Tensor:
    """Norm over all shards of all gradients: one reduction per way of sharding.

    Every rank calls it with the gradients of the same parameters.

    Args:
        grads: DTensors and plain tensors; plain ones, and replicated dimensions, are counted once.
    """
    kinds: dict[tuple, list[Tensor]] = {}
    for grad in grads:
        if grad is None:
            continue
        groups = ()
        if is_sharded(grad):
            sharded = [i for i, p in enumerate(grad.placements) if p.is_shard()]
            groups = tuple((grad.device_mesh, i) for i in sharded)
        kinds.setdefault(groups, []).append(local_of(grad))
    total: Tensor | None = None
    for groups, locals_ in kinds.items():
        squares = masked_norm(locals_).double().square()
        for mesh, dimension in groups:
            torch.distributed.all_reduce(squares, group=mesh.get_group(dimension))
        total = squares if total is None else total + squares
    return total.sqrt().float()
