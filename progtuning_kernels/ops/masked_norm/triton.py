"""masked_norm in Triton: sums of squares by programs, added by a last one; see README.md."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import backend

# 8 elements per thread: 16 bytes of bfloat16, and what one call of Philox serves masked_update,
# whose programs have the same chunks
BLOCK = 1024
_MOST_BLOCKS = 16
# 4 times what the 132 multiprocessors of an H200 hold of programs of masked_update. A program takes
# more than one block where there are so many all the same.
_PROGRAMS = 4 * 132 * 5
PARTIALS_OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}
SUMMED = 8192  # partial sums that are on their way to the last program at a time
SUM_OPTIONS = {"num_warps": 16, "enable_fp_fusion": True}

TYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.int8: tl.int8,
}


@triton.jit
def pointers(address, start, TYPE: tl.constexpr, FULL: tl.constexpr, BLOCK: tl.constexpr):
    """Pointers to BLOCK elements from `start`. FULL: the address is a multiple of 16.

    bfloat16 travels as its 16 bits: Triton's interpreter truncates where a GPU rounds.
    """
    if TYPE == tl.bfloat16:
        pointer = address.to(tl.pointer_type(tl.uint16))
    else:
        pointer = address.to(tl.pointer_type(TYPE))
    if FULL:
        pointer = tl.multiple_of(pointer, 16)
    return pointer + start + tl.arange(0, BLOCK)


@triton.jit
def load(pointers, inside, TYPE: tl.constexpr, FULL: tl.constexpr):
    """float32 of stored elements. FULL: without a mask, which alone lets accesses be vectors."""
    if FULL:
        x = tl.load(pointers)
    else:
        x = tl.load(pointers, mask=inside, other=0)
    if TYPE == tl.bfloat16:
        return (x.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def sum_of_squares(address, start, end, TYPE: tl.constexpr, BLOCK: tl.constexpr):
    """Of the elements from `start` to `end`, float32; the same bits at every alignment."""
    total = tl.zeros([BLOCK], tl.float32)
    size = (end - start).to(tl.int32)
    whole = tl.where((address & 15) == 0, size // BLOCK * BLOCK, 0)
    for offset in range(0, whole, BLOCK):
        x = load(pointers(address, start + offset, TYPE, True, BLOCK), None, TYPE, True)
        total += x * x
    for offset in range(whole, size, BLOCK):
        first = start + offset
        inside = first + tl.arange(0, BLOCK) < end
        x = load(pointers(address, first, TYPE, False, BLOCK), inside, TYPE, False)
        total += x * x
    return tl.sum(total, axis=0)


@triton.jit
def norm_of_partials(partials, count, SUMMED: tl.constexpr):
    """The root of their sum, float32, added in float64."""
    total = tl.zeros([SUMMED], tl.float64)
    for first in range(0, count, SUMMED):
        i = first + tl.arange(0, SUMMED)
        total += tl.load(partials + i, mask=i < count, other=0.0).to(tl.float64)
    return tl.sqrt(tl.sum(total, axis=0)).to(tl.float32)


@triton.jit(do_not_specialize=["count", "halvings", "blocks"])
def partials_kernel(
    words,
    partials,
    count,
    halvings,
    blocks,
    TYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sum of squares of one chunk of `blocks` times BLOCK elements.

    Args:
        words: (3, count) int64: addresses, sizes, and the first program of each tensor.
        halvings: of `count` tensors, until one is left.
    """
    program = tl.program_id(0).to(tl.int64)
    firsts = words + 2 * count
    tensor, behind = program * 0, program * 0 + count
    for _ in range(halvings):
        middle = (tensor + behind) // 2
        reached = tl.load(firsts + middle) <= program
        tensor = tl.where(reached, middle, tensor)
        behind = tl.where(reached, behind, middle)
    start = (program - tl.load(firsts + tensor)) * blocks * BLOCK
    end = tl.minimum(start + blocks * BLOCK, tl.load(words + count + tensor))
    address = tl.load(words + tensor)
    tl.store(partials + program, sum_of_squares(address, start, end, TYPE, BLOCK))


@triton.jit(do_not_specialize=["count"])
def sum_kernel(partials, out, count, SUMMED: tl.constexpr):
    """The norm from its partial sums."""
    tl.store(out, norm_of_partials(partials, count, SUMMED))


def blocks_of(sizes: Sequence[int]) -> list[int]:
    """Blocks of BLOCK elements of each tensor."""
    return [-(-size // BLOCK) for size in sizes]


def blocks_per_program(blocks: int) -> int:
    """How many of all blocks a program takes: more than one where a GPU is full all the same.

    It depends on nothing else, so that the order of summation is the same on every GPU.
    """
    taken = 1
    while taken < _MOST_BLOCKS and blocks >= 2 * taken * _PROGRAMS:
        taken *= 2
    return taken


def norm(tensors: Sequence[Tensor]) -> Tensor:
    """`reference.norm`; of tensors on the CPU under Triton's interpreter."""
    device, dtype = tensors[0].device, tensors[0].dtype
    sizes = [tensor.numel() for tensor in tensors]
    of_tensors = blocks_of(sizes)
    blocks = blocks_per_program(sum(of_tensors))
    addresses, counts, firsts, programs = [], [], [], 0
    for tensor, size, own in zip(tensors, sizes, of_tensors, strict=True):
        if own:
            addresses.append(tensor.data_ptr())
            counts.append(size)
            firsts.append(programs)
            programs += -(-own // blocks)
    out = torch.empty((), dtype=torch.float32, device=device)
    partials = torch.empty(programs, dtype=torch.float32, device=device)
    with backend.device_guard(device):
        if programs:
            words = torch.tensor([*addresses, *counts, *firsts], dtype=torch.int64, device="cpu")
            words = backend.sent(words, device)
            count = len(addresses)
            partials_kernel[programs,](
                *(words, partials, count, (count - 1).bit_length(), blocks, TYPES[dtype], BLOCK),
                **PARTIALS_OPTIONS,
            )
        sum_kernel[1,](partials, out, programs, SUMMED, **SUM_OPTIONS)
    return out
