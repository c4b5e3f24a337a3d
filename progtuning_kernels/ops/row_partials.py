"""Sums over rows in two steps, without atomics: the same bits on every GPU of one kind.

The kernel of an op writes a partial sum for each piece of the rows; the kernel here adds those in a
fixed order. How many there are depends on the shape alone.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .kept_launches import launch

ROWS_PER_PARTIAL, MAX_PARTIALS = 16, 512
# Of partial sums, that a program of the second kernel adds at a time: 32 columns are 128 bytes, and
# a thread has 8 loads of 16 bytes under way, so that 512 partial sums wait for memory twice.
SUM_ROWS, SUM_COLUMNS = 256, 32
OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}
# Triton's interpreter truncates to bfloat16 where the GPU rounds.
ROUND_BY_BITS = tl.constexpr(bool(triton.knobs.runtime.interpret))


def count_partials(rows: int) -> int:
    return max(1, min(-(-rows // ROWS_PER_PARTIAL), MAX_PARTIALS))


@triton.jit
def rounded(x, TYPE: tl.constexpr):
    """float32 to TYPE, to nearest even."""
    if ROUND_BY_BITS and TYPE == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        special = (bits & 0x7F800000) == 0x7F800000
        quiet = tl.where((bits & 0x007FFFFF) != 0, 0x00400000, 0).to(tl.uint32)
        bits = tl.where(special, bits | quiet, bits + ((bits >> 16) & 1) + 0x7FFF)
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(TYPE)


@triton.jit
def _store(pointers, x, inside):
    tl.store(pointers, rounded(x, pointers.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["n_partials"])
def sum_partials_kernel(
    partials,
    first,
    second,
    n_partials,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Column sums of partials, (1 or 2, n_partials, C), into first and second (or None)."""
    which = tl.program_id(1)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < C
    base = partials + which.to(tl.int64) * n_partials * C
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, n_partials, ROWS):
        rows = start + tl.arange(0, ROWS)
        pointers = base + rows.to(tl.int64)[:, None] * C + columns[None, :]
        total += tl.load(pointers, mask=(rows < n_partials)[:, None] & inside[None, :], other=0.0)
    result = tl.sum(total, axis=0)
    if which == 0:
        _store(first + columns, result, inside)
    if second is not None:
        if which == 1:
            _store(second + columns, result, inside)


def sum_partials(partials: Tensor, *sums: Tensor) -> None:
    """Write one or two (C,) sums of partials, (1 or 2, P, C)."""
    n_partials, width = partials.shape[1:]
    launch(
        *(sum_partials_kernel, partials.device, (-(-width // SUM_COLUMNS), len(sums), 1)),
        *((partials, *sums, None)[:3], (n_partials,), (width, SUM_ROWS, SUM_COLUMNS), OPTIONS),
    )
