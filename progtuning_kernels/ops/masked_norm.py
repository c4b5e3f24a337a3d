"""masked_norm: the norm over all elements of a list of tensors.

    "l2": norm = sqrt(sum_i sum_j x_i[j]^2)        "inf": norm = max_i max_j |x_i[j]|

- tensors: any shapes, one device; float32, bfloat16, float16 or float64, also mixed. Nothing is
  mutated, and there is no gradient.
- returns a 0-dim float32 on the tensors' device, without waiting for it; 0 (on the CPU) for an
  empty list. NaN and inf come through: the caller decides what a non-finite gradient means.
- Native on the CPU computes in float64; on CUDA in float32 within a chunk of 8192 elements. The
  reference computes in float32 (float64 for float64) within 2**18. Beyond these it is float64.
- Native is deterministic: fixed chunks summed in a fixed order, so the same bits for any number of
  threads, any instruction set and any alignment.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from .. import backend
from ..sharding import is_sharded

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
Kind = Literal["l2", "inf"]
_NATIVE_DTYPES = {
    "cpu": DTYPES,
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}
# torch's float32 norm on the CPU is a few running sums: 22 M elements in one piece come out wrong
# by 1.2e-3, in pieces of this size by 1.3e-6, in 1.2 times the time (bfloat16: in half of it).
_PIECE = 2**18


def reference(tensors: Sequence[Tensor], kind: Kind) -> Tensor:
    """Plain torch; `_foreach_norm` because on CUDA a loop would launch once per tensor."""
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    if kind == "inf":
        some = [tensor for tensor in tensors if tensor.numel()]
        norms = torch._foreach_norm(some, math.inf, dtype=wide) if some else []
        return _norm_of_norms(norms, kind, tensors[0])
    pieces: list[Tensor] = []
    for tensor in tensors:
        pieces += tensor.flatten().split(_PIECE) if tensor.numel() > _PIECE else [tensor]
    return _norm_of_norms(torch._foreach_norm(pieces, 2, dtype=wide), kind, tensors[0])


def _norm_of_norms(norms: Sequence[Tensor], kind: Kind, like: Tensor) -> Tensor:
    if not norms:
        return torch.zeros((), dtype=torch.float32, device=like.device)
    stacked = torch.stack(list(norms)).double()
    return (torch.linalg.vector_norm(stacked) if kind == "l2" else stacked.amax()).float()


def _native(tensors: Sequence[Tensor], kind: Kind) -> Tensor:
    extension = backend.native_extension()
    device, dtype = tensors[0].device, backend.dtype_code(tensors[0].dtype)
    pointers = [tensor.data_ptr() for tensor in tensors]
    sizes = [tensor.numel() for tensor in tensors]
    code = extension.norm_kinds[kind]
    out = torch.empty((), dtype=torch.float32, device=device)
    if device.type == "cpu":
        threads = torch.get_num_threads()
        extension.masked_norm_cpu(pointers, sizes, dtype, code, out.data_ptr(), threads)
        return out
    chunks = extension.masked_norm_chunks(sizes)
    partials = torch.empty(chunks, dtype=torch.float32, device=device)
    scratch, result = partials.data_ptr(), out.data_ptr()
    with backend.device_guard(device):
        stream = backend.cuda_stream(device)
        extension.masked_norm_cuda(pointers, sizes, dtype, code, scratch, chunks, result, stream)
    return out


def _reason_against_native(tensors: Sequence[Tensor]) -> str | None:
    device, dtype = tensors[0].device, tensors[0].dtype
    reason = backend.native_reason(device)
    if reason is None and dtype not in _NATIVE_DTYPES[device.type]:
        return f"no native kernel for {dtype} on {device.type}"
    return reason


@torch.no_grad()
def masked_norm(
    tensors: Sequence[Tensor], *, kind: Kind = "l2", implementation: str | None = None
) -> Tensor:
    """Norm over a list of tensors, as a 0-dim float32 on their device.

    Args:
        tensors: dense tensors of any shape on one device, float32, bfloat16, float16 or float64.
            Non-contiguous ones are copied first.
        kind: "l2", or "inf" for the largest magnitude.
        implementation: "native" or "reference"; None chooses (see `backend.select`).
    """
    if isinstance(tensors, Tensor):
        raise TypeError("masked_norm: expected a list of tensors, got one tensor")
    tensors = list(tensors)
    if torch.compiler.is_compiling():
        return masked_norm_op(tensors, kind, implementation)
    if kind not in get_args(Kind):
        raise ValueError(f"masked_norm: kind must be one of {get_args(Kind)}, got {kind!r}")
    if not tensors:
        return torch.zeros((), dtype=torch.float32, device="cpu")
    dtypes = _checked_dtypes(tensors)
    tensors = [tensor.contiguous() for tensor in tensors]
    norms = []
    for dtype in dtypes:
        group = tensors if len(dtypes) == 1 else [t for t in tensors if t.dtype == dtype]
        norms.append(backend.select(OP, group, implementation).function(group, kind))
    return norms[0] if len(norms) == 1 else _norm_of_norms(norms, kind, norms[0])


def _checked_dtypes(tensors: Sequence[Tensor]) -> list[torch.dtype]:
    # By kind, not by tensor: a list of gradients has hundreds of tensors and two or three kinds.
    for kind in {type(tensor) for tensor in tensors}:
        if not issubclass(kind, Tensor):
            raise TypeError(f"masked_norm: expected tensors, got {kind.__name__}")
        if is_sharded(kind):
            raise ValueError(
                "masked_norm: got a DTensor; pass tensor.to_local() and add the squares over ranks"
            )
    # A dict keeps the order of the list: mixed dtypes are then always summed in the same order.
    kinds = dict.fromkeys((tensor.device, tensor.dtype, tensor.layout) for tensor in tensors)
    devices = sorted({str(device) for device, _, _ in kinds})
    if len(devices) > 1:
        raise ValueError(
            f"masked_norm: tensors on {' and '.join(devices)}; call it once per device"
        )
    for _, dtype, layout in kinds:
        if dtype not in DTYPES:
            names = ", ".join(str(known).removeprefix("torch.") for known in DTYPES)
            raise ValueError(f"masked_norm: expected {names}, got {dtype}")
        if layout != torch.strided:
            raise ValueError(f"masked_norm: expected dense tensors, got {layout}")
    return [dtype for _, dtype, _ in kinds]


OP = backend.register(
    backend.Op(
        "masked_norm",
        (
            backend.Implementation("native", _native, _reason_against_native),
            backend.Implementation("reference", reference, lambda tensors: None),
        ),
    )
)


@torch.library.custom_op("progtuning::masked_norm", mutates_args=())
def masked_norm_op(
    tensors: Sequence[Tensor], kind: str = "l2", implementation: str | None = None
) -> Tensor:
    return masked_norm(tensors, kind=kind, implementation=implementation)


@masked_norm_op.register_fake
def _(tensors: Sequence[Tensor], kind: str = "l2", implementation: str | None = None) -> Tensor:
    device = tensors[0].device if tensors else "cpu"
    return torch.empty((), dtype=torch.float32, device=device)
