"""dropout: `F.dropout` in training, with the random numbers of torch, in less time and memory.

    out = x * noise, noise = 1 / (1 - p) with probability 1 - p, else 0

- x: any shape, one device; float32, bfloat16 or float16 (others run the reference). Not mutated.
- Native, on a CPU: bit for bit what torch computes, gradients included, and the generator is left
  as torch leaves it. Where torch's own Bernoulli numbers come from differs between processors;
  which of the known ways it is, is found by trying once per process. Where it is none of them, the
  reference runs. Non-contiguous x run the reference: torch then draws in an order of its own.
- Saved for backward is a bit per element, where torch saves the noise in the dtype of x.
- The generator's state is read, moved on and put back: another thread that draws from torch's
  default generator at that moment draws the same numbers.
- Compiled code keeps `F.dropout`, which the compiler fuses with its neighbours.
- May be differentiated any number of times.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backend

NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def reference(x: Tensor, p: float) -> Tensor:
    """Plain torch."""
    return F.dropout(x, p, training=True)


@functools.cache
def _scale(p: float, dtype: torch.dtype) -> float:
    """1 / (1 - p) as torch rounds it in a dtype."""
    return torch.ones(1, dtype=dtype, device="cpu").div_(1 - p).item()


def _bits(generator: torch.Generator, source: int, count: int, keep: float) -> Tensor:
    """`count` numbers of `bernoulli_(keep)`, one bit each; moves the generator on as it does."""
    extension = backend.native_extension()
    state = generator.get_state()
    bits = torch.empty((count + 7) // 8, dtype=torch.uint8, device="cpu")
    extension.bernoulli_bits_cpu(
        state.data_ptr(),
        state.numel(),
        source,
        count,
        keep,
        bits.data_ptr(),
        torch.get_num_threads(),
    )
    generator.set_state(state)
    return bits


@functools.cache
def _random_source() -> int | None:
    """The code of the way in which this torch draws on this processor; None for an unknown one."""
    extension = backend.native_extension()
    generator, keep, count = torch.Generator().manual_seed(2506_21119), 0.9, 5000
    start = generator.get_state()
    expected = torch.empty(count, dtype=torch.float32, device="cpu")
    expected = expected.bernoulli_(keep, generator=generator).bool()
    end = generator.get_state()
    if start.numel() != extension.generator_bytes:
        return None
    for source in extension.random_sources.values():
        generator.set_state(start)
        bits = _bits(generator, source, count, keep)
        found = (bits[:, None] >> torch.arange(8, dtype=torch.uint8, device="cpu")) & 1
        if torch.equal(found.flatten()[:count].bool(), expected):
            if torch.equal(generator.get_state(), end):
                return source
    return None


class _MaskedProduct(torch.autograd.Function):
    """x * (bit ? scale : 0); linear, so that backward is the same."""

    @staticmethod
    def forward(x: Tensor, bits: Tensor, scale: float) -> Tensor:
        x = x.contiguous()
        out = torch.empty_like(x)
        backend.native_extension().masked_product_cpu(
            x.data_ptr(),
            bits.data_ptr(),
            scale,
            x.numel(),
            backend.dtype_code(x.dtype),
            out.data_ptr(),
            torch.get_num_threads(),
        )
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.scale = inputs[2]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (bits,) = ctx.saved_tensors
        return _MaskedProduct.apply(grad, bits, ctx.scale), None, None


def _native(x: Tensor, p: float) -> Tensor:
    bits = _bits(torch.default_generator, _random_source(), x.numel(), 1 - p)
    return _MaskedProduct.apply(x, bits, _scale(p, x.dtype))


def _reason_against_native(x: Tensor) -> str | None:
    if x.device.type != "cpu":
        return f"torch's own is one kernel on {x.device.type}"
    reason = backend.native_reason(x.device)
    if reason is not None:
        return reason
    if x.dtype not in NATIVE_DTYPES:
        return f"no native kernel for {x.dtype}"
    if type(x) not in (Tensor, torch.nn.Parameter) or torch._C._are_functorch_transforms_active():
        return "no plain tensor"
    if not x.is_contiguous():
        return "torch draws for a tensor that is not contiguous in an order of its own"
    if _random_source() is None:
        return "torch's random numbers on this processor come from an unknown generator"
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
    """`F.dropout(x, p, training)`, with the same result and the same random numbers.

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
