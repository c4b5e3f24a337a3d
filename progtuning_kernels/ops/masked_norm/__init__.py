"""masked_norm: the norm over all elements of a list of tensors, without waiting for the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import backend
from . import native, reference


def _reason_against_triton(tensors: Sequence[Tensor]) -> str | None:
    device = tensors[0].device
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        # at a replay it would copy the addresses from memory of the host that is gone
        return "the addresses of a list of tensors cannot be part of a captured CUDA graph"
    return backend.triton_reason(device, tensors[0].dtype)


OP = backend.register(
    backend.Op(
        "masked_norm",
        (
            backend.Implementation("native", native.norm, native.reason_against),
            backend.Implementation(
                *("triton", backend.triton_function(__name__, "norm"), _reason_against_triton)
            ),
            backend.Implementation("reference", reference.norm),
        ),
    )
)


@torch.no_grad()
def masked_norm(tensors: Sequence[Tensor], *, implementation: str | None = None) -> Tensor:
    """L2 norm over all elements of a list of tensors, without waiting for the device; no gradient.

    Args:
        tensors: dense tensors of any shape on one device, float32, bfloat16, float16 or float64.
            Non-contiguous ones are copied first.
        implementation: "native", "triton" or "reference"; None chooses.

    Returns:
        0-dim float32 on their device; of no tensors 0, on the CPU. NaN and inf come through.

    Raises:
        TypeError: one tensor, or something that is none.
        ValueError: several devices, a sparse tensor, a DTensor, another dtype, or `implementation`
            has no such name.
        RuntimeError: the implementation that is asked for cannot run, with its reason.
    """
    if isinstance(tensors, Tensor):
        raise TypeError("masked_norm: expected a list of tensors, got one tensor")
    tensors = list(tensors)
    if torch.compiler.is_compiling():
        return masked_norm_op(tensors, implementation)
    if not tensors:
        return torch.zeros((), dtype=torch.float32, device="cpu")
    dtypes = reference.checked_dtypes(tensors)
    tensors = [tensor.contiguous() for tensor in tensors]
    norms = []
    for dtype in dtypes:
        group = tensors if len(dtypes) == 1 else [t for t in tensors if t.dtype == dtype]
        norms.append(backend.select(OP, group, implementation).function(group))
    return norms[0] if len(norms) == 1 else reference.norm_of_norms(norms)


@torch.library.custom_op("progtuning::masked_norm", mutates_args=())
def masked_norm_op(tensors: Sequence[Tensor], implementation: str | None = None) -> Tensor:
    return masked_norm(tensors, implementation=implementation)


@masked_norm_op.register_fake
def _(tensors: Sequence[Tensor], implementation: str | None = None) -> Tensor:
    device = tensors[0].device if tensors else "cpu"
    return torch.empty((), dtype=torch.float32, device=device)
