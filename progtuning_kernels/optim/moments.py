"""How the moments of AdamW lie in the state of a parameter: one float each, or 8-bit codes."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ..ops.bucket import Moments, in_memory_order
from ..ops.low_precision import (
    QUANT_BLOCK,
    decode_exp_avg,
    decode_exp_avg_sq,
    encode_exp_avg,
    encode_exp_avg_sq,
)
from ..sharding import is_sharded

StateDtype = torch.dtype | Literal["8bit"]
# by the names that the command line and the planner give them
STATE_DTYPES: dict[str, StateDtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "8bit": "8bit",
}
_CODES = (("exp_avg", torch.int8), ("exp_avg_sq", torch.uint8))
_CODE_KEYS = ("exp_avg_code", "exp_avg_sq_code")
_SCALE_KEYS = ("exp_avg_scale", "exp_avg_sq_scale")
MOMENT_KEYS = ("exp_avg", "exp_avg_sq", *_CODE_KEYS, *_SCALE_KEYS)


def new_moments(p: Tensor, dtype: StateDtype) -> dict[str, Tensor]:
    """Zeros for one parameter.

    Raises:
        ValueError: 8 bits for a DTensor.
    """
    if dtype != "8bit":
        return {name: _zeros_like(p, dtype) for name, _ in _CODES}
    if is_sharded(p):
        raise ValueError(
            "state_dtype='8bit' with sharded parameters: blocks of 256 elements would move with "
            "the number of ranks; use torch.bfloat16"
        )
    codes = {f"{name}_code": _zeros_like(p, kind) for name, kind in _CODES}
    shape = moment_shapes(p)["exp_avg_scale"]
    scales = {key: torch.zeros(shape, dtype=torch.float32, device=p.device) for key in _SCALE_KEYS}
    return codes | scales


def moment_shapes(p: Tensor) -> dict[str, tuple[int, ...]]:
    """Of every tensor that may hold a part of the moments."""
    blocks = -(-p.numel() // QUANT_BLOCK)
    return {key: (blocks,) if key in _SCALE_KEYS else tuple(p.shape) for key in MOMENT_KEYS}


def moments_in(state: dict[str, Tensor]) -> Moments:
    if "exp_avg" in state:
        return Moments(state["exp_avg"], state["exp_avg_sq"])
    return Moments(*(state[key] for key in (*_CODE_KEYS, *_SCALE_KEYS)))


def wide_moments(state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Both moments in float32, or in float64 where they are."""
    m, v, m_scale, v_scale = moments_in(state)
    if m_scale is None or v_scale is None:
        wide = torch.promote_types(m.dtype, torch.float32)
        return m.to(wide), v.to(wide)
    decoded_m, decoded_v = (torch.empty_like(codes, dtype=torch.float32) for codes in (m, v))
    # blocks run through memory, whatever the order of the dimensions
    in_memory_order(decoded_m).copy_(decode_exp_avg(in_memory_order(m), m_scale))
    in_memory_order(decoded_v).copy_(decode_exp_avg_sq(in_memory_order(v), v_scale))
    return decoded_m, decoded_v


def copy_moments(target: dict[str, Tensor], saved: dict[str, Any]) -> None:
    """Fill `target`, which `new_moments` has made; moments of the same kind keep their bits."""
    if target.keys() <= saved.keys():
        for key, value in target.items():
            value.copy_(saved[key])
        return
    m, v = wide_moments(saved)
    if "exp_avg" in target:
        target["exp_avg"].copy_(m)
        target["exp_avg_sq"].copy_(v)
        return
    code, sq_code = target["exp_avg_code"], target["exp_avg_sq_code"]
    m = in_memory_order(torch.empty_like(code, dtype=torch.float32).copy_(m))
    v = in_memory_order(torch.empty_like(sq_code, dtype=torch.float32).copy_(v))
    # rounds to nearest: once, it is unbiased
    halfway = torch.full((v.numel(),), 2**15, dtype=torch.int64, device=v.device)
    for codes, scale, (encoded, largest) in (
        (code, target["exp_avg_scale"], encode_exp_avg(m)),
        (sq_code, target["exp_avg_sq_scale"], encode_exp_avg_sq(v, halfway)),
    ):
        in_memory_order(codes).copy_(encoded)
        scale.copy_(largest)


def _zeros_like(p: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)
