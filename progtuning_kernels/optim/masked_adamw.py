"""AdamW that updates active tensors only, in one call per bucket."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _backend
from ..ops.masked_update import OP
from .masked_optimizer import MaskedOptimizer, Nonfinite, OnFreeze

# What torch.optim.AdamW keeps in its groups beside the hyper-parameters: with these in the saved
# groups, its load_state_dict takes ours as it stands.
_TORCH_GROUP_KEYS = {
    "amsgrad": False,
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": None,
    "decoupled_weight_decay": True,
}


class MaskedAdamW(MaskedOptimizer):
    """AdamW whose frozen tensors cost nothing: no update, no decay, no state, no launch.

    The formula is that of `ops/masked_update.py`; state and `state_dict` have the layout of
    `torch.optim.AdamW`, and either loads the other's.

    Args:
        params: parameters or groups; `handle.param_groups(lr, weight_decay)` gives both groups.
        lr: learning rate, a float or a 0-dim tensor.
        betas, eps: as in `torch.optim.AdamW`.
        weight_decay: decoupled; default 0.
        max_grad_norm: clip the global L2 norm of the active gradients in the same pass.
        on_freeze: "release" or "keep" the state of a tensor that stops being active.
        nonfinite: "skip" (and count, see `skipped_steps`) a step with a NaN or infinite gradient,
            or "ignore", which saves the norm pass where nothing is clipped.

    Raises:
        ValueError: a hyper-parameter outside its range.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        max_grad_norm: float | None = None,
        on_freeze: OnFreeze = "release",
        nonfinite: Nonfinite = "skip",
    ) -> None:
        for name, value, fits in (
            ("lr", lr, lr >= 0),
            ("eps", eps, eps >= 0),
            ("weight_decay", weight_decay, weight_decay >= 0),
            ("betas", betas, all(0 <= beta < 1 for beta in betas)),
        ):
            if not fits:
                raise ValueError(f"{name}={value} is out of range")
        defaults = dict(
            lr=lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay, **_TORCH_GROUP_KEYS
        )
        super().__init__(
            params,
            defaults,
            max_grad_norm=max_grad_norm,
            on_freeze=on_freeze,
            nonfinite=nonfinite,
        )

    def init_state(self, p: Tensor) -> dict[str, Tensor]:
        # fp64 parameters keep fp64 moments, everything narrower fp32 ones
        dtype = torch.promote_types(p.dtype, torch.float32)
        return {
            "step": torch.zeros((), dtype=torch.float32, device=p.device),
            "exp_avg": torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format),
        }

    def update_bucket(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        states: list[dict[str, Tensor]],
        grad_divisor: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        beta1, beta2 = group["betas"]
        # straight to the implementation: the optimizer's own lists need no contract checks
        _backend.select(OP, params).function(
            params,
            grads,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [state["step"] for state in states],
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            grad_divisor=grad_divisor,
            found_inf=found_inf,
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of `MaskedAdamW` or `torch.optim.AdamW`, at any stage.

        Raises:
            ValueError: groups of other sizes, or an option (amsgrad, maximize) that this optimizer
                does not have.
        """
        for group in state_dict["param_groups"]:
            for option in ("amsgrad", "maximize"):
                if group.get(option):
                    raise ValueError(f"the saved optimizer has {option}=True, which is unsupported")
        super().load_state_dict(state_dict)
        # torch casts moments to the parameter's dtype: fp32 moments of a bf16 parameter would lose
        # sixteen bits, so they are taken from the saved dict once more
        saved = (i for group in state_dict["param_groups"] for i in group["params"])
        own = (p for group in self.param_groups for p in group["params"])
        for i, p in zip(saved, own, strict=True):
            for key, value in state_dict["state"].get(i, {}).items():
                dtype = (
                    value.dtype if key == "step" else torch.promote_types(p.dtype, torch.float32)
                )
                self.state[p][key] = value.detach().to(p.device, dtype, copy=True)
        self.on_flags_changed()
