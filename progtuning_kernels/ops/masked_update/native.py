"""masked_update by csrc/masked_update_cpu.cpp and csrc/masked_update.cu, and its gradients' norm.

No custom operator is in between: it would cost 0.3 to 0.7 ms of dispatch for hundreds of tensors.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ... import backend
from ..masked_norm.native import norm_at
from .bucket import Bucket, Gradients, Hyper, Step, chunk_table, record_table, written

# Of a thread block on CUDA, in elements: a chunk for the gradients' norm (kNormChunk in
# csrc/launchers.h), the largest one for the update, and what the latency before its first element
# costs: 1.5 us for four reads that wait for each other and for the powers of beta, beside 216
# elements of float32 in a microsecond on an H200 (4.8 TB/s, 28 bytes, 792 blocks at once).
NORM_CHUNK, LARGEST_CHUNK, LATENCY_ELEMENTS = 8192, 16384, 512
_MOMENTS = (torch.float32, torch.bfloat16, torch.int8)


class Tables(NamedTuple):
    """What stays on the bucket's device for a stage.

    Attributes:
        records: see `record_table`.
        chunks: the work of the blocks of an update on CUDA.
        chunk_elements: in each of `chunks`.
        norm_chunks: the same of the gradients' norm, whose bits depend on their size.
        ticket: how many blocks of an update are done.
    """

    records: Tensor
    chunks: Tensor | None = None
    chunk_elements: int = 0
    norm_chunks: Tensor | None = None
    ticket: Tensor | None = None

    def for_update(self) -> tuple[int, int, int, int, int]:
        """Addresses and counts, as csrc/module.cpp takes them."""
        return self._with(self.chunks, self.chunk_elements)

    def for_norm(self) -> tuple[int, int, int, int, int]:
        return self._with(self.norm_chunks, NORM_CHUNK)

    def _with(self, chunks: Tensor, elements: int) -> tuple[int, int, int, int, int]:
        counts = (len(chunks), elements)
        return self.records.data_ptr(), chunks.data_ptr(), *counts, self.ticket.data_ptr()


def chunk_elements(sizes: Sequence[int], slots: int, unit: int) -> int:
    """Elements of a chunk with which an update takes the least time; README.md of csrc has why.

    Args:
        sizes: of the tensors, in elements.
        slots: thread blocks that the device runs at once.
        unit: elements that a block updates at once.
    """
    counts = Counter(sizes).items()

    def time(elements: int) -> int:
        blocks = sum(-(-size // elements) * count for size, count in counts)
        return -(-blocks // slots) * (elements + LATENCY_ELEMENTS)

    return min(range(unit, LARGEST_CHUNK + 1, unit), key=time)


def tables_on_cuda(bucket: Bucket) -> Tables:
    """The tables for the kernels in csrc/*.cu."""
    plain = bucket.dtype == bucket.moment_dtype == torch.float32
    sizes = [p.numel() for p in bucket.params]
    with backend.device_guard(bucket.device):
        slots = backend.native_extension().masked_update_slots_cuda(_variant(bucket), len(sizes))
    elements = chunk_elements(sizes, slots, 1024 if plain else 2048)
    ticket = torch.zeros((), dtype=torch.int32, device=bucket.device)
    norm_chunks = chunk_table(bucket, NORM_CHUNK)
    chunks = norm_chunks if elements == NORM_CHUNK else chunk_table(bucket, elements)
    return Tables(record_table(bucket), chunks, elements, norm_chunks, ticket)


def tables_of(bucket: Bucket) -> Tables:
    """The bucket's tables, made at the first call."""
    if bucket.tables is None:
        on_cuda = bucket.device.type == "cuda"
        bucket.tables = tables_on_cuda(bucket) if on_cuda else Tables(record_table(bucket))
    return bucket.tables


def reason_against_kernels(bucket: Bucket) -> str | None:
    """Why neither the native nor the Triton kernels can update this bucket; None if they can."""
    if bucket.dtype == torch.float16 and bucket.masters is None:
        return "no kernel for float16 parameters without a master"
    if bucket.moment_dtype not in _MOMENTS and bucket.dtype != torch.float64:
        return f"no kernel for {bucket.moment_dtype} moments"
    if not all(bucket.flat):
        return "a tensor with gaps between its elements, or state of another order than its tensor"
    return None


def reason_against(bucket: Bucket) -> str | None:
    reason = backend.native_reason(bucket.device) or reason_against_kernels(bucket)
    if reason is None and bucket.device.type == "cuda":
        if bucket.dtype == torch.float64:
            return "no native kernel for float64 on cuda"
        if bucket.has_residuals:
            return "no native kernel for 8-bit residuals on cuda"
    return reason


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _variant(bucket: Bucket) -> tuple[int, int, int, bool]:
    """UpdateVariant in csrc/launchers.h."""
    return (
        backend.dtype_code(bucket.dtype),
        backend.dtype_code(bucket.moment_dtype),
        0 if bucket.masters is None else 2 if bucket.has_residuals else 1,
        bucket.stochastic_rounding,
    )


def launch_arguments(bucket: Bucket, hypers: Sequence[Hyper], step: Step) -> tuple:
    """Groups, variant and step as csrc/module.cpp takes them; a tensor lr is read on the device."""
    groups = [
        (0.0, *hyper[1:], hyper.lr.data_ptr()) if isinstance(hyper.lr, Tensor) else (*hyper, 0)
        for hyper in hypers
    ]
    at = (_address(step.grad_factor), _address(step.found_inf), step.seed, step.zero_grads)
    return groups, _variant(bucket), at


def update(bucket: Bucket, gradients: Gradients, hypers: Sequence[Hyper], step: Step) -> None:
    """`Bucket.update`."""
    device, extension = bucket.device, backend.native_extension()
    tables = tables_of(bucket)
    stays = [isinstance(h.lr, Tensor) and h.lr.is_cuda and device.type == "cuda" for h in hypers]
    hypers = [
        h._replace(lr=h.lr.to(device, torch.float32) if on_gpu else float(h.lr))
        for h, on_gpu in zip(hypers, stays, strict=True)
    ]
    arguments = (gradients.addresses, *launch_arguments(bucket, hypers, step))
    if device.type == "cpu":
        threads = torch.get_num_threads()
        extension.masked_update_cpu(tables.records.data_ptr(), *arguments, threads)
    else:
        with backend.device_guard(device):
            stream = backend.cuda_stream(device)
            extension.masked_update_cuda(tables.for_update(), *arguments, stream)
    written(bucket, gradients, zero_grads=step.zero_grads)


def gradient_norm(bucket: Bucket, gradients: Gradients) -> Tensor:
    """`masked_norm` of a CPU's gradients, by the addresses that are known already."""
    there = [i for i, address in enumerate(gradients.addresses) if address]
    addresses = [gradients.addresses[i] for i in there]
    return norm_at(addresses, [bucket.params[i].numel() for i in there], bucket.dtype)


def decide(
    buckets: Sequence[Bucket],
    gradients: Sequence[Gradients],
    *,
    max_grad_norm: float | None,
    skip_nonfinite: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    control: Tensor,
) -> None:
    """Write norm, grad_factor and found_inf of buckets on one GPU to control, and count skips."""
    extension, device = backend.native_extension(), buckets[0].device
    tables = [tables_of(bucket) for bucket in buckets]
    counts = [len(of_bucket.norm_chunks) for of_bucket in tables]
    partials = torch.empty(sum(counts), dtype=torch.float32, device=device)
    with backend.device_guard(device):
        stream, at = backend.cuda_stream(device), partials.data_ptr()
        for bucket, some, of_bucket in zip(buckets, gradients, tables, strict=True):
            what = (of_bucket.for_norm(), some.addresses, backend.dtype_code(bucket.dtype))
            extension.bucket_norm_partials_cuda(*what, at, stream)
            at += 4 * len(of_bucket.norm_chunks)
        scaling = (_address(grad_scale), _address(found_inf), max_grad_norm or 0.0, skip_nonfinite)
        extension.norm_decision_cuda(
            *(partials.data_ptr(), sum(counts), *scaling, control.data_ptr(), stream)
        )
