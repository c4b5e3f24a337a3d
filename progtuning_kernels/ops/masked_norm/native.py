"""masked_norm by csrc/masked_norm_cpu.cpp and csrc/masked_norm.cu."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import backend
from ..contract import DTYPES

_DTYPES = {"cpu": DTYPES, "cuda": (torch.float32, torch.bfloat16, torch.float16)}


def reason_against(tensors: Sequence[Tensor]) -> str | None:
    device, dtype = tensors[0].device, tensors[0].dtype
    reason = backend.native_reason(device)
    if reason is None and dtype not in _DTYPES[device.type]:
        return f"no native kernel for {dtype} on {device.type}"
    return reason


def norm(tensors: Sequence[Tensor]) -> Tensor:
    """`reference.norm`."""
    pointers = [tensor.data_ptr() for tensor in tensors]
    sizes = [tensor.numel() for tensor in tensors]
    device, dtype = tensors[0].device, tensors[0].dtype
    if device.type == "cpu":
        return norm_at(pointers, sizes, dtype)
    extension = backend.native_extension()
    chunks = extension.masked_norm_chunks(sizes)
    out = torch.empty((), dtype=torch.float32, device=device)
    partials = torch.empty(chunks, dtype=torch.float32, device=device)
    code = backend.dtype_code(dtype)
    with backend.device_guard(device):
        stream = backend.cuda_stream(device)
        scratch = (partials.data_ptr(), chunks)
        extension.masked_norm_cuda(pointers, sizes, code, *scratch, out.data_ptr(), stream)
    return out


def norm_at(pointers: list[int], sizes: list[int], dtype: torch.dtype) -> Tensor:
    """The norm of contiguous memory of the CPU, which the caller keeps alive."""
    extension = backend.native_extension()
    out = torch.empty((), dtype=torch.float32, device="cpu")
    threads = torch.get_num_threads()
    extension.masked_norm_cpu(pointers, sizes, backend.dtype_code(dtype), out.data_ptr(), threads)
    return out
