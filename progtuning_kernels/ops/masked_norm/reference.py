"""masked_norm, the norm over a list of tensors: contract and plain torch; see README.md."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...sharding import is_sharded
from ..contract import check_dtype

# torch's float32 norm on the CPU is a few running sums: 22 M elements in one piece come out wrong
# by 1.2e-3, in pieces of this size by 1.3e-6, in 1.2 times the time (bfloat16: in half of it). On a
# GPU torch has chunks of its own, and pieces would be 4,730 views of the gradients of Llama-1B.
_PIECE = 2**18


def checked_dtypes(tensors: Sequence[Tensor]) -> list[torch.dtype]:
    """The dtypes in the order of the list; raise if the tensors break the contract."""
    # By kind, not by tensor: a list of gradients has hundreds of tensors and two or three kinds.
    for of_tensor in {type(tensor) for tensor in tensors}:
        if not issubclass(of_tensor, Tensor):
            raise TypeError(f"masked_norm: expected tensors, got {of_tensor.__name__}")
        if is_sharded(of_tensor):
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
        check_dtype("masked_norm", dtype)
        if layout != torch.strided:
            raise ValueError(f"masked_norm: expected dense tensors, got {layout}")
    return list(dict.fromkeys(dtype for _, dtype, _ in kinds))


def norm(tensors: Sequence[Tensor]) -> Tensor:
    """The norm by `_foreach_norm`: on CUDA a loop would launch once per tensor."""
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    pieces: list[Tensor] = []
    for tensor in tensors:
        in_pieces = tensor.numel() > _PIECE and not tensor.is_cuda
        pieces += tensor.flatten().split(_PIECE) if in_pieces else [tensor]
    return norm_of_norms(torch._foreach_norm(pieces, 2, dtype=wide))


def norm_of_norms(norms: Sequence[Tensor]) -> Tensor:
    """The norm over all, 0-dim float32, from 0-dim norms of one device and any dtype."""
    return torch.linalg.vector_norm(torch.stack(list(norms)).double()).float()
