"""AdamW that updates active tensors only, in one call per bucket."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..ops.masked_update.bucket import Bucket, Hyper
from .active_buckets import Member, parameters_of
from .in_backward import ClipMode
from .masked_optimizer import MaskedOptimizer, Nonfinite, StateDevice
from .moments import (
    MASTER_KEYS,
    MOMENT_KEYS,
    MasterWeights,
    StateDtype,
    check_shapes,
    copy_master,
    copy_moments,
    moments_in,
    new_master,
    new_moments,
    wide_moments,
    with_whole_scales,
)
from .state import OnFreeze

# by the names that the command line and the planner give them
STATE_DTYPES: dict[str, StateDtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "8bit": "8bit",
}
# a smaller tensor keeps float32 moments: it has few bytes to save, and one large element would
# decide for all of it
SMALLEST_8BIT = 4096

_HYPER = {"lr", "betas", "eps", "weight_decay"}
# What torch.optim.AdamW keeps in its groups beside the hyper-parameters: with these in the saved
# groups, its load_state_dict takes ours as it stands. "foreach", "fused" and "capturable" say how
# torch computes, which changes no result.
_TORCH_GROUP_KEYS = {
    "amsgrad": False,
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": None,
    "decoupled_weight_decay": True,
}
# Options of Adam's relatives that would change the result, with the only value that this one has.
_FIXED = {
    "amsgrad": False,
    "maximize": False,
    "differentiable": False,
    "correct_bias": True,
    "bias_correction": True,
}
_OWN_STATE = ("step", *MASTER_KEYS, *MOMENT_KEYS)


class MaskedAdamW(MaskedOptimizer):
    """AdamW whose frozen tensors cost nothing: no update, no decay, no state, no launch.

    The formula is that of `masked_update` (Loshchilov and Hutter, arXiv 1711.05101). State and
    `state_dict` have the layout of `torch.optim.AdamW`, and either loads the other's; moments in 8
    bits go to torch through `torch_state_dict`. Parameters are float32, bfloat16, float16 or
    float64, on any devices; a bucket of each device and dtype is updated in one call.

    Args:
        params: parameters, named parameters or groups, frozen ones included;
            `handle.param_groups(lr, weight_decay)` gives both groups.
        lr: learning rate, a float or a 0-dim tensor.
        betas: decay of both moments, each in [0, 1), as in `torch.optim.AdamW`.
        eps: added to the root of the second moment, as in `torch.optim.AdamW`.
        weight_decay: decoupled.
        max_grad_norm: clip the global L2 norm of the active gradients in the same pass, by the
            formula of `torch.nn.utils.clip_grad_norm_`; None: no clipping.
        state_dtype: of the moments: `torch.float32`, `torch.bfloat16` (rounded stochastically; half
            the bytes), or "8bit" (a quarter; tensors under 4,096 elements keep float32).
        stochastic_rounding: of bfloat16 parameters: small updates are then not lost.
        master_weights: True: a float32 copy of bfloat16 and float16 parameters, which is what is
            updated. "8bit": 8 more bits of each element of bfloat16 parameters, which are then
            updated in 24 bits, the last rounded stochastically; on a CPU, elsewhere in plain torch.
        in_backward: update inside backward, block by block, so that one block's gradients are alive
            at a time; micro-batches before the last of a step go into `accumulate`. Backward then
            raises under `GradScaler`, re-entrant checkpointing and `DistributedDataParallel`, and
            with sharded parameters unless nothing is clipped and `nonfinite` is "ignore".
        clip_mode: with `in_backward` and `max_grad_norm`: "exact" keeps all gradients to the end;
            "previous_norm" and "per_block" do not, and clip by another norm.
        on_freeze: "release" the state of a tensor that stops being active, "keep" it, or "offload"
            it to pinned CPU memory until the tensor is thawed.
        nonfinite: "skip" (and count, see `skipped_steps`) a step with a NaN or infinite gradient,
            or "ignore", which saves the norm pass where nothing is clipped.
        zero_grads: leave zeros in the gradients, in the same pass; for gradients that are kept.
        seed: of stochastic rounding, 64 bits; the same seed gives the same bits, on a resumed run
            too.
        state_device: "cpu": state of parameters on a GPU lies on the host, and the host updates;
            with `in_backward` each block while backward goes on. `host_report` counts the bytes.
            Under `in_backward`, GradScaler is then refused in every `clip_mode`. None: state lies
            with the parameters.

    Raises:
        ValueError: a hyper-parameter outside its range, options that exclude each other, a complex
            parameter or one that is there twice, or an option in a group that would be ignored
            although it changes the result (`amsgrad`, `maximize`, `max_grad_norm`, ...), also from
            `step` and `load_state_dict`; from `step`, 8-bit moments of parameters that are sharded
            along another dimension than their first, or along two, and shards on a GPU, or another
            device than CPU and CUDA, with `state_device`.

    Example:
        ```python
        optimizer = MaskedAdamW(handle.param_groups(lr=5e-5, weight_decay=0.01), max_grad_norm=1.0)
        ```
    """

    _SETTINGS = MaskedOptimizer._SETTINGS | {"state_dtype", "stochastic_rounding", "master_weights"}

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        max_grad_norm: float | None = None,
        state_dtype: StateDtype = torch.float32,
        stochastic_rounding: bool = False,
        master_weights: MasterWeights = False,
        in_backward: bool = False,
        clip_mode: ClipMode = "exact",
        on_freeze: OnFreeze = "release",
        nonfinite: Nonfinite = "skip",
        zero_grads: bool = False,
        seed: int = 0,
        state_device: StateDevice | None = None,
    ) -> None:
        if state_dtype not in STATE_DTYPES.values():
            dtypes = tuple(STATE_DTYPES.values())
            raise ValueError(f"state_dtype must be one of {dtypes}, got {state_dtype!r}")
        if master_weights not in (False, True, "8bit"):
            raise ValueError(f"master_weights must be a bool or '8bit', got {master_weights!r}")
        if stochastic_rounding and master_weights:
            raise ValueError(
                "stochastic_rounding and master_weights exclude each other: a master loses nothing"
            )
        self.state_dtype: StateDtype = state_dtype
        self.stochastic_rounding = stochastic_rounding
        self.master_weights: MasterWeights = master_weights
        defaults = dict(
            lr=lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay, **_TORCH_GROUP_KEYS
        )
        super().__init__(
            params,
            defaults,
            max_grad_norm=max_grad_norm,
            on_freeze=on_freeze,
            nonfinite=nonfinite,
            in_backward=in_backward,
            clip_mode=clip_mode,
            zero_grads=zero_grads,
            seed=seed,
            state_device=state_device,
        )

    def init_state(self, p: Tensor) -> dict[str, Tensor]:
        dtype = self.state_dtype
        if dtype == "8bit" and p.numel() < SMALLEST_8BIT:
            dtype = torch.float32
        if p.dtype == torch.float64:
            dtype = torch.float64
        device = self.state_device_of(p)
        # memory of the host that is not written to costs nothing
        like = p if device == p.device else torch.empty_like(p, device=device)
        state = {"step": torch.zeros((), dtype=torch.float32, device=device)}
        state |= new_moments(like, dtype)
        return state | new_master(p, like, self.master_weights)

    def hyper(self, group: dict[str, Any]) -> Hyper:
        return Hyper(group["lr"], group["weight_decay"], group["eps"], *group["betas"])

    def make_bucket(
        self,
        params: list[Tensor],
        states: list[dict[str, Tensor]],
        indices: list[int],
        groups: list[int],
    ) -> Bucket:
        low_precision = params[0].dtype == torch.bfloat16
        masters = [state[key] for state in states for key in MASTER_KEYS if key in state]
        return Bucket(
            params,
            [moments_in(state) for state in states],
            [state["step"] for state in states],
            masters=masters or None,
            indices=indices,
            groups=groups,
            stochastic_rounding=self.stochastic_rounding and low_precision,
        )

    def torch_state_dict(self) -> dict[str, Any]:
        """The state dict with float32 moments whatever they are stored in, for `torch.optim.AdamW`.

        Masters and residuals are left out: torch's optimizer updates the parameters themselves.

        Returns:
            State and groups as in `state_dict`; float32 moments are the optimizer's own tensors.
        """
        saved = self.state_dict()
        saved.pop("masked", None)
        for i in parameters_of(saved["param_groups"]):
            if state := saved["state"].get(i):
                m, v = wide_moments(state)
                rest = {key: value for key, value in state.items() if key not in _OWN_STATE}
                moments = {"step": state["step"], "exp_avg": m, "exp_avg_sq": v}
                saved["state"][i] = moments | rest
        return saved

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        group = {**self.defaults, **param_group}
        for name in ("lr", "eps", "weight_decay"):
            if not group[name] >= 0:
                raise ValueError(f"{name}={group[name]} is out of range")
        if len(group["betas"]) != 2 or not all(0 <= beta < 1 for beta in group["betas"]):
            raise ValueError(f"betas={group['betas']} is out of range")
        super().add_param_group(param_group)

    def check_groups(self, groups: Iterable[Mapping[str, Any]] | None = None) -> None:
        super().check_groups(groups)
        for group in self.param_groups if groups is None else groups:
            for option, value in _FIXED.items():
                if bool(group.get(option, value)) is not value:
                    raise ValueError(
                        f"a group has {option}={group[option]}, and MaskedAdamW is AdamW with "
                        f"{option}={value}: change it to that, or use the optimizer it is from"
                    )
            if "decoupled_weight_decay" in group and "amsgrad" not in group:
                kind = "NAdam" if "momentum_decay" in group else "RAdam"
                raise ValueError(
                    f"the saved groups are those of {kind}: MaskedAdamW would go on with another "
                    "formula"
                )
            if not group.keys() >= _HYPER:
                missing = min(_HYPER - group.keys())
                raise ValueError(f"a group has no {missing}: it is of another kind of optimizer")
            if not group["weight_decay"]:
                continue
            if "decoupled_weight_decay" not in group:
                warnings.warn(
                    "the saved groups do not say whether weight_decay acts on the weights (AdamW) "
                    "or on the gradients (Adam), as those of older torch: AdamW's is used",
                    stacklevel=8,
                )
            elif not group["decoupled_weight_decay"]:
                raise ValueError(
                    f"a group has Adam's weight_decay={group['weight_decay']}, which acts on the "
                    "gradients; MaskedAdamW decays the weights. To go on with that, set the "
                    "group's decoupled_weight_decay=True"
                )

    def state_from(self, saved: dict[str, Any], member: Member) -> dict[str, Any]:
        """Moments are converted to `state_dtype`; those of the same kind keep their bits."""
        p = member.parameter
        for key in ("step", "exp_avg", "exp_avg_sq"):
            if saved.get(key, saved.get(f"{key}_code")) is None:
                raise ValueError(
                    f"the saved state of {member.label} has no {key} but "
                    f"{', '.join(map(str, saved))}: it is of another kind of optimizer"
                )
        device = self.state_device_of(p)
        step = torch.as_tensor(saved["step"], dtype=torch.float32, device=device)
        step = step.reshape(()) if step.shape == (1,) else step
        saved = with_whole_scales(saved)
        check_shapes(saved | {"step": step}, p, member.label)
        state = self.init_state(p)
        state["step"].copy_(step)
        copy_moments({key: state[key] for key in state.keys() & set(MOMENT_KEYS)}, saved)
        copy_master(state, saved, p)
        rest = {key: value for key, value in saved.items() if key not in _OWN_STATE}
        return state | super().state_from(rest, member)
