"""What every masked optimizer shares: who is active, one norm, one call per bucket, release.

`p.requires_grad` alone says whether a tensor is active. `param_groups` never change, so learning
rate schedulers, checkpoints and trainers built around them keep working at every stage.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer

from .. import freeze_events
from ..ops.masked_norm import masked_norm

OnFreeze = Literal["release", "keep"]
Nonfinite = Literal["skip", "ignore"]


def release_frozen_state(optimizer: Optimizer) -> int:
    """Drop the state of every parameter that does not require grad; works on any optimizer.

    Returns:
        Bytes of state that were dropped.
    """
    dropped = 0
    for group in optimizer.param_groups:
        for p in group["params"]:
            if not p.requires_grad and p in optimizer.state:
                dropped += _bytes_of(optimizer.state.pop(p))
    return dropped


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes that the optimizer's state tensors occupy, step counters included."""
    return sum(map(_bytes_of, optimizer.state.values()))


def _bytes_of(state: dict[str, Any]) -> int:
    return sum(t.untyped_storage().nbytes() for t in state.values() if isinstance(t, Tensor))


class MaskedOptimizer(Optimizer):
    """Base of the masked optimizers; a subclass writes `init_state` and `update_bucket`.

    Args:
        params: parameters or groups, frozen ones included.
        defaults: hyper-parameters of the groups.
        max_grad_norm: clip the global L2 norm of the active gradients to this; None: no clipping.
        on_freeze: "release" drops the state of a tensor as soon as it stops being active, "keep"
            holds it for a tensor that will be thawed.
        nonfinite: "skip" leaves everything as it is in a step whose gradients hold a NaN or an
            infinity, and counts it; "ignore" saves the norm pass where nothing is clipped.
    """

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        *,
        max_grad_norm: float | None,
        on_freeze: OnFreeze,
        nonfinite: Nonfinite,
    ) -> None:
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be above 0, got {max_grad_norm}")
        for name, value, kinds in (
            ("on_freeze", on_freeze, OnFreeze),
            ("nonfinite", nonfinite, Nonfinite),
        ):
            if value not in get_args(kinds):
                raise ValueError(f"{name} must be one of {get_args(kinds)}, got {value!r}")
        super().__init__(params, defaults)
        self.max_grad_norm = max_grad_norm
        self.on_freeze = on_freeze
        self.nonfinite = nonfinite
        self.grad_norm: Tensor | None = None  # of the last step, before clipping; 0-dim
        self._skipped: Tensor | int = 0
        freeze_events.listen(self)

    def __getstate__(self) -> dict[str, Any]:
        settings = ("max_grad_norm", "on_freeze", "nonfinite", "grad_norm", "_skipped")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in settings}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        freeze_events.listen(self)

    @property
    def skipped_steps(self) -> int:
        """Steps left out because of non-finite gradients. Reading it waits for the device."""
        return int(self._skipped)

    def on_flags_changed(self) -> None:
        if self.on_freeze == "release":
            release_frozen_state(self)

    def init_state(self, p: Tensor) -> dict[str, Tensor]:
        """Fresh state of one parameter."""
        raise TypeError(f"{type(self).__name__} defines no init_state")

    def update_bucket(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        states: list[dict[str, Tensor]],
        grad_divisor: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        """Update the active tensors of one group, device and dtype in one call."""
        raise TypeError(f"{type(self).__name__} defines no update_bucket")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every active tensor that has a gradient.

        Args:
            closure: re-evaluates the model and returns the loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.on_freeze == "release":
            release_frozen_state(self)

        buckets: dict[tuple[int, torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
        for i, group in enumerate(self.param_groups):
            for p in group["params"]:
                if p.requires_grad and p.grad is not None:
                    if p.grad.is_sparse:
                        raise RuntimeError(
                            f"{type(self).__name__}: a parameter of shape {tuple(p.shape)} has a "
                            "sparse gradient; build the embedding with sparse=False"
                        )
                    buckets[i, p.device, p.dtype].append(p)

        divisor = found_inf = None
        if buckets and (self.max_grad_norm is not None or self.nonfinite == "skip"):
            self.grad_norm = masked_norm([p.grad for ps in buckets.values() for p in ps])
            finite = torch.isfinite(self.grad_norm)
            if self.nonfinite == "skip":
                if not finite.is_cuda and not finite:
                    self._skipped += 1
                    return loss
                if finite.is_cuda:  # decided on the device: the host never waits
                    found_inf = (~finite).float()
                    self._skipped = self._skipped + found_inf
            if self.max_grad_norm is not None:
                # the inverse of clip_grad_norm_'s coefficient, its 1e-6 included
                divisor = ((self.grad_norm + 1e-6) / self.max_grad_norm).clamp_(min=1.0)
                if not divisor.is_cuda and divisor == 1.0:
                    divisor = None  # saves torch's kernel the write-back of the divided gradient

        for (i, device, _), params in buckets.items():
            self.update_bucket(
                self.param_groups[i],
                params,
                [p.grad for p in params],
                [self.state[p] or self._start_state(p) for p in params],
                None if divisor is None else divisor.to(device),
                None if found_inf is None else found_inf.to(device),
            )
        return loss

    def _start_state(self, p: Tensor) -> dict[str, Tensor]:
        self.state[p].update(self.init_state(p))
        return self.state[p]
