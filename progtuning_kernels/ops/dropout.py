"""dropout: `F.dropout` in training, from random numbers of our own, in less time and memory.

    out = x * noise, noise = 1 / (1 - p) with probability 1 - p, else 0

- x: any shape, one device; float32, bfloat16 or float16 (others run the reference). Not mutated.
- Native, on a CPU: the mask is a function of a seed and an element's index (Philox, 16 bits each;
  csrc/dropout_cpu.cpp). The seed is one number of torch's default generator per call, so that
  `torch.manual_seed`, a generator state that was kept, and checkpointing draw the same mask again;
  the mask itself is another one than torch's. Nothing is saved for backward.
- 1 - p is rounded to a multiple of 2**-16, and the scale is its inverse, so that the mean of out is
  x. From 0.001 of 0 or 1 on, where that changes p by more than a hundredth, the reference runs.
- Compiled code keeps `F.dropout`, which the compiler fuses with its neighbours.
- May be differentiated any number of times.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backend

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LEAST_P = 0.001


def reference(x: Tensor, p: float) -> Tensor:
    """Plain torch."""
    return F.dropout(x, p, training=True)


class _KeepBelow(torch.autograd.Function):
    """x where an element's 16 random bits are below a limit, scaled; linear, so backward is too."""

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


def _native(x: Tensor, p: float) -> Tensor:
    if not _LEAST_P <= p <= 1 - _LEAST_P:
        return reference(x, p)
    seed = torch.randint(2**63 - 1, (), dtype=torch.int64, device="cpu").item()
    return _KeepBelow.apply(x, seed, round((1 - p) * 2**16))


def _reason_against_native(x: Tensor) -> str | None:
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


OP = backend.register(
    backend.Op(
        "dropout",
        (
            backend.Implementation("native", _native, _reason_against_native),
            backend.Implementation("reference", reference, lambda x: None),
        ),
        probe=lambda device: torch.zeros(8, dtype=torch.float32, device=device),
    )
)


def dropout(
    x: Tensor, p: float = 0.5, training: bool = True, *, implementation: str | None = None
) -> Tensor:
    """`F.dropout(x, p, training)` with a mask of its own, a function of torch's generator.

    Args:
        x: any shape and dtype that `F.dropout` takes.
        p: probability of an element to become 0.
        training: without it, x comes back as it is.
        implementation: "native" or "reference"; None chooses (see `backend.select`).

    Raises:
        ValueError: p is not between 0 and 1.
    """
    if not 0 <= p <= 1:
        raise ValueError(f"dropout: p must be between 0 and 1, got {p}")
    if not training or p in (0, 1) or not x.numel() or torch.compiler.is_compiling():
        return F.dropout(x, p, training)
    return backend.select(OP, x, implementation).function(x, p)
