"""dropout by csrc/dropout_cpu.cpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import backend
from . import reference

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LEAST_P = 0.001


class _KeepBelow(torch.autograd.Function):
    """Keep and scale elements whose 16 random bits are below a limit; backward does the same."""

    @staticmethod
    def forward(x: Tensor, seed: int, limit: int) -> Tensor:
        x = x.contiguous()
        out = torch.empty_like(x)
        backend.native_extension().dropout_cpu(
            x.data_ptr(),
            seed,
            limit,
            x.numel(),
            backend.dtype_code(x.dtype),
            out.data_ptr(),
            torch.get_num_threads(),
        )
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int, int], output: Tensor) -> None:
        ctx.draw = inputs[1:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _KeepBelow.apply(grad, *ctx.draw), None, None


def drop(x: Tensor, p: float) -> Tensor:
    """`reference.drop` with a mask of its own."""
    if not _LEAST_P <= p <= 1 - _LEAST_P:
        return reference.drop(x, p)
    seed = torch.randint(2**63 - 1, (), dtype=torch.int64, device="cpu").item()
    return _KeepBelow.apply(x, seed, round((1 - p) * 2**16))


def reason_against(x: Tensor) -> str | None:
    if x.device.type != "cpu":
        return f"torch's own is one kernel on {x.device.type}"
    reason = backend.native_reason(x.device)
    if reason is not None:
        return reason
    if x.dtype not in _DTYPES:
        return f"no native kernel for {x.dtype}"
    if type(x) not in (Tensor, torch.nn.Parameter) or torch._C._are_functorch_transforms_active():
        return "no plain tensor"
    return None
