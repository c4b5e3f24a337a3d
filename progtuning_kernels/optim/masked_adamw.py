"""AdamW that updates active tensors only, in one call per bucket."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ..ops.bucket import Bucket, Hyper, Moments, in_memory_order, is_dense
from ..ops.low_precision import (
    QUANT_BLOCK,
    decode_exp_avg,
    decode_exp_avg_sq,
    encode_exp_avg,
    encode_exp_avg_sq,
)
from .frozen_state import OnFreeze
from .in_backward import ClipMode
from .masked_optimizer import MaskedOptimizer, Nonfinite

StateDtype = torch.dtype | Literal["8bit"]
_STATE_DTYPES = (torch.float32, torch.bfloat16, "8bit")
# a smaller tensor keeps float32 moments: it has few bytes to save, and one large element would
# decide for all of it
SMALLEST_8BIT = 4096

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

    The formula is that of `ops/masked_update.py`. State and `state_dict` have the layout of
    `torch.optim.AdamW`, and either loads the other's; moments in 8 bits go to torch through
    `torch_state_dict()`.

    Args:
        params: parameters, named parameters or groups; `handle.param_groups(lr, weight_decay)`
            gives both groups.
        lr: learning rate, a float or a 0-dim tensor.
        betas, eps: as in `torch.optim.AdamW`.
        weight_decay: decoupled; default 0.
        max_grad_norm: clip the global L2 norm of the active gradients in the same pass.
        state_dtype: of the moments: `torch.float32`, `torch.bfloat16` (rounded stochastically; half
            the bytes), or "8bit" (a quarter; tensors under 4,096 elements keep float32).
        stochastic_rounding: of bfloat16 parameters: small updates are then not lost.
        master_weights: a float32 copy of bfloat16 and float16 parameters, which is what is updated.
        in_backward: update inside backward, block by block, so that one block's gradients are alive
            at a time; what it excludes is in `optim/in_backward.py`.
        clip_mode: with `in_backward` and `max_grad_norm`: "exact" keeps all gradients to the end;
            "previous_norm" and "per_block" do not, and clip by another norm.
        on_freeze: "release" the state of a tensor that stops being active, "keep" it, or "offload"
            it to pinned CPU memory until the tensor is thawed.
        nonfinite: "skip" (and count, see `skipped_steps`) a step with a NaN or infinite gradient,
            or "ignore", which saves the norm pass where nothing is clipped.
        zero_grads: leave zeros in the gradients, in the same pass; for gradients that are kept.
        seed: of stochastic rounding; the same seed gives the same bits, on a resumed run too.

    Raises:
        ValueError: a hyper-parameter outside its range, or options that exclude each other.
    """

    _SETTINGS = (
        *MaskedOptimizer._SETTINGS,
        "state_dtype",
        "stochastic_rounding",
        "master_weights",
    )

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
        master_weights: bool = False,
        in_backward: bool = False,
        clip_mode: ClipMode = "exact",
        on_freeze: OnFreeze = "release",
        nonfinite: Nonfinite = "skip",
        zero_grads: bool = False,
        seed: int = 0,
    ) -> None:
        for name, value, fits in (
            ("lr", lr, lr >= 0),
            ("eps", eps, eps >= 0),
            ("weight_decay", weight_decay, weight_decay >= 0),
            ("betas", betas, all(0 <= beta < 1 for beta in betas)),
        ):
            if not fits:
                raise ValueError(f"{name}={value} is out of range")
        if state_dtype not in _STATE_DTYPES:
            raise ValueError(f"state_dtype must be one of {_STATE_DTYPES}, got {state_dtype!r}")
        if stochastic_rounding and master_weights:
            raise ValueError(
                "stochastic_rounding and master_weights exclude each other: a master loses nothing"
            )
        self.state_dtype = state_dtype
        self.stochastic_rounding = stochastic_rounding
        self.master_weights = master_weights
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
        )

    def _moment_dtype(self, p: Tensor) -> StateDtype:
        if p.dtype == torch.float64:
            return torch.float64
        if self.state_dtype == "8bit" and p.numel() < SMALLEST_8BIT:
            return torch.float32
        return self.state_dtype

    def _has_master(self, p: Tensor) -> bool:
        return self.master_weights and p.dtype in (torch.bfloat16, torch.float16)

    def init_state(self, p: Tensor) -> dict[str, Tensor]:
        dtype = self._moment_dtype(p)
        state = {"step": torch.zeros((), dtype=torch.float32, device=p.device)}
        if dtype == "8bit":
            if hasattr(p, "to_local"):
                raise ValueError(
                    "state_dtype='8bit' with sharded parameters: blocks of 256 elements would move "
                    "with the number of ranks; use torch.bfloat16"
                )
            blocks = -(-p.numel() // QUANT_BLOCK)
            for name, kind in (("exp_avg", torch.int8), ("exp_avg_sq", torch.uint8)):
                state[f"{name}_code"] = _zeros_like(p, kind)
                state[f"{name}_scale"] = torch.zeros(blocks, dtype=torch.float32, device=p.device)
        else:
            state["exp_avg"] = _zeros_like(p, dtype)
            state["exp_avg_sq"] = _zeros_like(p, dtype)
        if self._has_master(p):
            state["master"] = p.detach().to(torch.float32)
        return state

    def hyper(self, group: dict[str, Any]) -> Hyper:
        return Hyper(group["lr"], group["weight_decay"], group["eps"], *group["betas"])

    def make_bucket(
        self,
        params: list[Tensor],
        states: list[dict[str, Tensor]],
        indices: list[int],
        groups: list[int],
    ) -> Bucket:
        low = params[0].dtype
        return Bucket(
            params,
            [_moments(state) for state in states],
            [state["step"] for state in states],
            masters=[state["master"] for state in states] if self._has_master(params[0]) else None,
            indices=indices,
            groups=groups,
            stochastic_rounding=self.stochastic_rounding and low == torch.bfloat16,
        )

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with `{}` for a parameter that has no state, and the seed in "masked"."""
        saved = super().state_dict()
        for group in saved["param_groups"]:
            for i in group["params"]:
                saved["state"].setdefault(i, {})
        saved["masked"] = {"seed": self.seed, "skipped_steps": self.skipped_steps}
        if self._in_backward is not None:
            saved["masked"]["previous_norm"] = self._in_backward.previous_norm
        return saved

    def torch_state_dict(self) -> dict[str, Any]:
        """The state dict with float32 moments whatever they are stored in, for `torch.optim.AdamW`.

        Masters are left out: torch's optimizer updates the parameters themselves.
        """
        saved = self.state_dict()
        del saved["masked"]
        for i, state in saved["state"].items():
            if state:
                m, v = _wide_moments(state)
                saved["state"][i] = {"step": state["step"], "exp_avg": m, "exp_avg_sq": v}
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of `MaskedAdamW` or `torch.optim.AdamW`, at any stage.

        Moments are converted to this optimizer's `state_dtype`; those of the same kind keep their
        bits. State of parameters that are frozen now is treated as `on_freeze` says.

        Raises:
            ValueError: groups of other sizes, or an option (amsgrad, maximize) that this optimizer
                does not have.
        """
        for group in state_dict["param_groups"]:
            for option in ("amsgrad", "maximize"):
                if group.get(option):
                    raise ValueError(f"the saved optimizer has {option}=True, which is unsupported")
        # torch would cast every tensor of the state to its parameter's dtype: sixteen bits of the
        # moments of a bfloat16 parameter would be gone, and codes would be anything
        super().load_state_dict({**state_dict, "state": {}})
        saved_indices = (i for group in state_dict["param_groups"] for i in group["params"])
        for i, member in zip(saved_indices, self.members(), strict=True):
            if saved := state_dict["state"].get(i):
                self.state[member.parameter] = self._state_from(saved, member.parameter)
        if "masked" in state_dict:
            self.seed = state_dict["masked"]["seed"]
            self._skipped, self._control = state_dict["masked"]["skipped_steps"], None
            if self._in_backward is not None:
                self._in_backward.previous_norm = state_dict["masked"].get("previous_norm")
        self._refresh()

    def _state_from(self, saved: dict[str, Tensor], p: Tensor) -> dict[str, Tensor]:
        state = self.init_state(p)
        step = torch.as_tensor(saved["step"], dtype=torch.float32, device=p.device)
        state["step"].copy_(step)
        same_kind = all(
            key in saved and saved[key].dtype == state[key].dtype
            for key in state
            if key not in ("step", "master")
        )
        if same_kind:
            for key in state.keys() - {"step", "master"}:
                state[key].copy_(saved[key])
        else:
            m, v = (t.to(p.device) for t in _wide_moments(saved))
            if "exp_avg" in state:
                state["exp_avg"].copy_(m)
                state["exp_avg_sq"].copy_(v)
            else:
                _encode_into(state, m, v)
        if "master" in state and "master" in saved:
            state["master"].copy_(saved["master"])
        return state


def _zeros_like(p: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)


def _moments(state: dict[str, Tensor]) -> Moments:
    if "exp_avg" in state:
        return Moments(state["exp_avg"], state["exp_avg_sq"])
    return Moments(
        state["exp_avg_code"],
        state["exp_avg_sq_code"],
        state["exp_avg_scale"],
        state["exp_avg_sq_scale"],
    )


def _wide_moments(state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Both moments in float32, or in float64 where they are."""
    m, v, m_scale, v_scale = _moments(state)
    if m_scale is None:
        wide = torch.promote_types(m.dtype, torch.float32)
        return m.to(wide), v.to(wide)
    decoded = []
    for codes, scale, decode in (
        (m, m_scale, decode_exp_avg),
        (v, v_scale, decode_exp_avg_sq),
    ):
        wide = torch.empty_like(codes, dtype=torch.float32)
        # blocks run through memory, whatever the order of the dimensions
        _run(wide).copy_(decode(_run(codes), scale))
        decoded.append(wide)
    return decoded[0], decoded[1]


def _encode_into(state: dict[str, Tensor], m: Tensor, v: Tensor) -> None:
    code, sq_code = state["exp_avg_code"], state["exp_avg_sq_code"]
    m = torch.empty_like(code, dtype=torch.float32).copy_(m)
    v = torch.empty_like(sq_code, dtype=torch.float32).copy_(v)
    halfway = torch.full(
        (v.numel(),), 2**15, dtype=torch.int64, device=v.device
    )  # nearest: once, it is unbiased
    for target, scale, (codes, largest) in (
        (code, state["exp_avg_scale"], encode_exp_avg(_run(m))),
        (sq_code, state["exp_avg_sq_scale"], encode_exp_avg_sq(_run(v), halfway)),
    ):
        _run(target).copy_(codes)
        scale.copy_(largest)


def _run(t: Tensor) -> Tensor:
    return in_memory_order(t) if is_dense(t) else t.view(-1)
