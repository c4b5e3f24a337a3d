"""masked_update in Triton: csrc/update_rules.h in the same order of operations; see README.md."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import backend
from ..masked_norm.triton import (
    BLOCK,
    PARTIALS_OPTIONS,
    SUM_OPTIONS,
    SUMMED,
    TYPES,
    blocks_of,
    blocks_per_program,
    load,
    norm_of_partials,
    pointers,
    sum_of_squares,
)
from .bucket import Bucket, Gradients, Hyper, Step, chunk_table, record_table, written
from .low_precision_triton import (
    QUANT,
    decode_exp_avg,
    decode_exp_avg_sq,
    encode_exp_avg,
    encode_exp_avg_sq,
    inverse_of_largest,
    largest_magnitude,
    nearest_bfloat16,
    random_bits,
    spread,
    stochastic_bfloat16,
)

PIECE = tl.constexpr(256)  # of a chunk that is not full or not aligned
TENSORS = 128  # of a program of prepare_kernel, one per thread
PREPARE_OPTIONS = {"num_warps": TENSORS // 32, "enable_fp_fusion": False}

RECORD_WORDS = tl.constexpr(9)  # UpdateRecord in csrc/launchers.h
# A row of `Tables.numbers`: the members of AdamW in update_rules.h, the number of the update
NUMBERS = tl.constexpr(10)
# words of a step: 2 (the seed, and 0), and 6 per group (9 floats, and 3 zeros)
SEED_WORDS = tl.constexpr(2)
HYPER_FLOATS = tl.constexpr(12)

PARAM_STREAM, MOMENTS_STREAM = tl.constexpr(0), tl.constexpr(1)  # of random numbers


@triton.jit
def _one_minus_power(log_beta, step):
    x = log_beta * step
    done = x < -18.0  # e^-18 is below half a unit in the last place of 1
    x = tl.where(done, -1.0, x)
    # -18 needs six halvings; a fixed number, because the lanes of a program have different tensors
    doublings = tl.zeros_like(x)
    for _ in tl.static_range(6):
        again = x < -0.5
        x = tl.where(again, x * 0.5, x)
        doublings = tl.where(again, doublings + 1.0, doublings)
    y = x * (1.0 / 40320) + 1.0 / 5040
    y = y * x + 1.0 / 720
    y = y * x + 1.0 / 120
    y = y * x + 1.0 / 24
    y = y * x + 1.0 / 6
    y = y * x + 0.5
    y = y * x + 1.0
    y = -x * y
    for _ in tl.static_range(6):
        y = tl.where(doublings > 0.0, y * (2.0 - y), y)
        doublings = doublings - 1.0
    return tl.where(done, 1.0, y)


@triton.jit(do_not_specialize=["grad_factor", "found_inf", "num_tensors"])
def prepare_kernel(
    table,
    addresses,
    words,
    grad_factor,
    found_inf,
    numbers,
    num_tensors,
    TENSORS: tl.constexpr,
):
    """Write the numbers of every tensor's update (`Tables.numbers`), and count its step."""
    i = tl.program_id(0) * TENSORS + tl.arange(0, TENSORS)
    inside = i < num_tensors
    record = table + i.to(tl.int64) * RECORD_WORDS
    updated = inside & (tl.load(addresses + i, mask=inside, other=0) != 0)
    if found_inf is not None:
        # as a vector, because the interpreter cannot spread a truth value; NaN is found, too
        updated = updated & (tl.broadcast_to(tl.load(found_inf), [TENSORS]) == 0.0)
    step_address = tl.load(record + 6, mask=inside, other=0).to(tl.pointer_type(tl.float32))
    step = tl.load(step_address, mask=updated, other=0.0) + 1.0
    tl.store(step_address, step, mask=updated)

    group = tl.load(record + 8, mask=inside, other=0) >> 32
    hyper = (words + SEED_WORDS).to(tl.pointer_type(tl.float32)) + group * HYPER_FLOATS
    lr = tl.load(hyper, mask=inside, other=0.0)
    decay = lr * tl.load(hyper + 1, mask=inside, other=0.0)
    log_beta1 = tl.load(hyper + 5, mask=inside, other=-1.0)
    log_beta2 = tl.load(hyper + 8, mask=inside, other=-1.0)
    step_size = tl.div_rn(lr, _one_minus_power(log_beta1, step))
    inverse_root_bias2 = tl.div_rn(1.0, tl.sqrt_rn(_one_minus_power(log_beta2, step)))

    row = numbers + i.to(tl.int64) * NUMBERS
    tl.store(row, tl.load(hyper + 3, mask=inside, other=0.0), mask=inside)
    tl.store(row + 1, tl.load(hyper + 4, mask=inside, other=0.0), mask=inside)
    tl.store(row + 2, tl.load(hyper + 6, mask=inside, other=0.0), mask=inside)
    tl.store(row + 3, tl.load(hyper + 7, mask=inside, other=0.0), mask=inside)
    tl.store(row + 4, tl.load(hyper + 2, mask=inside, other=0.0), mask=inside)
    tl.store(row + 5, decay, mask=inside)
    tl.store(row + 6, step_size, mask=inside)
    tl.store(row + 7, inverse_root_bias2, mask=inside)
    if grad_factor is None:
        tl.store(row + 8, 1.0, mask=inside)
    else:
        tl.store(row + 8, tl.load(grad_factor), mask=inside)
    tl.store(row + 9, tl.where(updated, step, 0.0), mask=inside)


@triton.jit
def _store(pointers, x, inside, FULL: tl.constexpr):
    if FULL:
        tl.store(pointers, x)
    else:
        tl.store(pointers, x, mask=inside)


@triton.jit
def _update(
    param,
    grad,
    exp_avg,
    exp_avg_sq,
    master,
    scales_of_avg,
    scales_of_avg_sq,
    beta1,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    eps,
    decay,
    step_size,
    inverse_root_bias2,
    grad_factor,
    seed,
    index,
    step,
    start,
    end,
    PARAM_TYPE: tl.constexpr,
    MOMENT_TYPE: tl.constexpr,
    MASTER: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ZERO_GRADS: tl.constexpr,
    FULL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Elements `start` to `start + BLOCK` of one tensor. MOMENT_TYPE int8: 8-bit codes."""
    offsets = start + tl.arange(0, BLOCK)
    inside = offsets < end
    p_at = pointers(param, start, PARAM_TYPE, FULL, BLOCK)
    g_at = pointers(grad, start, PARAM_TYPE, FULL, BLOCK)
    m_at = pointers(exp_avg, start, MOMENT_TYPE, FULL, BLOCK)
    if MOMENT_TYPE == tl.int8:
        v_at = pointers(exp_avg_sq, start, tl.uint8, FULL, BLOCK)
    else:
        v_at = pointers(exp_avg_sq, start, MOMENT_TYPE, FULL, BLOCK)
    g = load(g_at, inside, PARAM_TYPE, FULL)
    m = load(m_at, inside, MOMENT_TYPE, FULL)
    v = load(v_at, inside, MOMENT_TYPE, FULL)
    if MASTER:
        master_at = pointers(master, start, tl.float32, FULL, BLOCK)
        p = load(master_at, inside, tl.float32, FULL)
    else:
        p = load(p_at, inside, PARAM_TYPE, FULL)
    if MOMENT_TYPE == tl.int8:
        block = start // QUANT + tl.arange(0, BLOCK // QUANT)
        has_block = block * QUANT < end
        m_scale_at = scales_of_avg.to(tl.pointer_type(tl.float32)) + block
        v_scale_at = scales_of_avg_sq.to(tl.pointer_type(tl.float32)) + block
        m_scale = load(m_scale_at, has_block, tl.float32, FULL)
        v_scale = load(v_scale_at, has_block, tl.float32, FULL)
        m = decode_exp_avg(m, spread(m_scale, BLOCK))
        v = decode_exp_avg_sq(v, spread(v_scale, BLOCK))

    g = g * grad_factor
    m = beta1 * m + one_minus_beta1 * g
    v = beta2 * v + one_minus_beta2 * (g * g)
    denominator = tl.sqrt_rn(v) * inverse_root_bias2 + eps
    p = p - (decay * p + step_size * tl.div_rn(m, denominator))

    if MASTER:
        _store(master_at, p, inside, FULL)
    if PARAM_TYPE == tl.bfloat16:
        if STOCHASTIC:
            p = stochastic_bfloat16(p, random_bits(seed, index, step, start, PARAM_STREAM, BLOCK))
        else:
            p = nearest_bfloat16(p)
    _store(p_at, p.to(p_at.dtype.element_ty), inside, FULL)
    if MOMENT_TYPE == tl.bfloat16:
        random = random_bits(seed, index, step, start, MOMENTS_STREAM, BLOCK)
        m = stochastic_bfloat16(m, random)
        v = stochastic_bfloat16(v, ((random & 0xFF) << 8) | (random >> 8))
    elif MOMENT_TYPE == tl.int8:
        m_scale = largest_magnitude(m, inside, FULL, BLOCK)
        v_scale = largest_magnitude(v, inside, FULL, BLOCK)
        _store(m_scale_at, m_scale, has_block, FULL)
        _store(v_scale_at, v_scale, has_block, FULL)
        m = encode_exp_avg(m, spread(inverse_of_largest(m_scale), BLOCK))
        random = random_bits(seed, index, step, start, MOMENTS_STREAM, BLOCK)
        v = encode_exp_avg_sq(v, spread(inverse_of_largest(v_scale), BLOCK), random)
    _store(m_at, m, inside, FULL)
    _store(v_at, v, inside, FULL)
    if ZERO_GRADS:
        _store(g_at, tl.zeros([BLOCK], g_at.dtype.element_ty), inside, FULL)


@triton.jit
def _update_chunk(
    record,
    row,
    seed,
    grad,
    start,
    end,
    PARAM_TYPE: tl.constexpr,
    MOMENT_TYPE: tl.constexpr,
    MASTER: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ZERO_GRADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Blocks in 16-byte accesses where all addresses allow them; the rest in pieces.

    What is read of the tables is kept in registers, because the compiler could not move a load past
    the stores. Without disable_licm it would keep what it computes of a thread's number as well: 30
    registers more.
    """
    param, exp_avg, exp_avg_sq = tl.load(record), tl.load(record + 1), tl.load(record + 2)
    master, avg_scale, avg_sq_scale = tl.load(record + 3), tl.load(record + 4), tl.load(record + 5)
    index = (tl.load(record + 8) & 0xFFFFFFFF).to(tl.uint32)
    beta1, one_minus_beta1 = tl.load(row), tl.load(row + 1)
    beta2, one_minus_beta2 = tl.load(row + 2), tl.load(row + 3)
    eps, decay, step_size = tl.load(row + 4), tl.load(row + 5), tl.load(row + 6)
    inverse_root_bias2, grad_factor = tl.load(row + 7), tl.load(row + 8)
    step = tl.load(row + 9).to(tl.uint32)
    aligned = ((param | grad | exp_avg | exp_avg_sq | master) & 15) == 0
    size = (end - start).to(tl.int32)
    in_blocks = tl.where(aligned, size // BLOCK * BLOCK, 0)
    for offset in tl.range(0, in_blocks, BLOCK, disable_licm=True):
        _update(
            *(param, grad, exp_avg, exp_avg_sq, master, avg_scale, avg_sq_scale),
            *(beta1, one_minus_beta1, beta2, one_minus_beta2, eps, decay, step_size),
            *(inverse_root_bias2, grad_factor, seed, index, step, start + offset, end),
            *(PARAM_TYPE, MOMENT_TYPE, MASTER, STOCHASTIC, ZERO_GRADS, True, BLOCK),
        )
    # all of BLOCK at once would keep a 64-bit address per element: 122 to 156 registers
    for offset in tl.range(in_blocks, size, PIECE, disable_licm=True):
        _update(
            *(param, grad, exp_avg, exp_avg_sq, master, avg_scale, avg_sq_scale),
            *(beta1, one_minus_beta1, beta2, one_minus_beta2, eps, decay, step_size),
            *(inverse_root_bias2, grad_factor, seed, index, step, start + offset, end),
            *(PARAM_TYPE, MOMENT_TYPE, MASTER, STOCHASTIC, ZERO_GRADS, False, PIECE),
        )


@triton.jit(do_not_specialize=["blocks"])
def masked_update_kernel(
    table,
    addresses,
    words,
    numbers,
    chunks,
    blocks,
    PARAM_TYPE: tl.constexpr,
    MOMENT_TYPE: tl.constexpr,
    MASTER: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ZERO_GRADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One chunk of `blocks` times BLOCK elements of one tensor.

    Args:
        table, numbers, chunks: see `Tables`. words: see `_step_words`.
        addresses: of the gradients; 0: no gradient.
        PARAM_TYPE, MOMENT_TYPE: as stored; int8: 8-bit codes, float32 in tensors without scales.
        MASTER, STOCHASTIC: as in `Bucket`.
    """
    program = tl.program_id(0).to(tl.int64)
    tensor = tl.load(chunks + 2 * program).to(tl.int64)
    start = tl.load(chunks + 2 * program + 1).to(tl.int64) * blocks * BLOCK
    grad = tl.load(addresses + tensor)
    if grad != 0:
        record = table + tensor * RECORD_WORDS
        row = numbers + tensor * NUMBERS
        seed = tl.load(words)
        end = tl.minimum(start + blocks * BLOCK, tl.load(record + 7))
        if tl.load(row + 9) != 0.0:
            if MOMENT_TYPE == tl.int8:
                if tl.load(record + 4) != 0:
                    _update_chunk(
                        *(record, row, seed, grad, start, end),
                        *(PARAM_TYPE, tl.int8, MASTER, STOCHASTIC, ZERO_GRADS, BLOCK),
                    )
                else:
                    _update_chunk(
                        *(record, row, seed, grad, start, end),
                        *(PARAM_TYPE, tl.float32, MASTER, STOCHASTIC, ZERO_GRADS, BLOCK),
                    )
            else:
                _update_chunk(
                    *(record, row, seed, grad, start, end),
                    *(PARAM_TYPE, MOMENT_TYPE, MASTER, STOCHASTIC, ZERO_GRADS, BLOCK),
                )
        elif ZERO_GRADS:
            for offset in range(0, (end - start).to(tl.int32), BLOCK):
                inside = start + offset + tl.arange(0, BLOCK) < end
                g_at = pointers(grad, start + offset, PARAM_TYPE, False, BLOCK)
                tl.store(g_at, tl.zeros([BLOCK], g_at.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["first_partial", "blocks"])
def gradient_partials_kernel(
    table,
    addresses,
    chunks,
    partials,
    first_partial,
    blocks,
    TYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sum of squares of one chunk of the gradients, 0 where there is none."""
    program = tl.program_id(0).to(tl.int64)
    tensor = tl.load(chunks + 2 * program).to(tl.int64)
    start = tl.load(chunks + 2 * program + 1).to(tl.int64) * blocks * BLOCK
    grad = tl.load(addresses + tensor)
    size = tl.load(table + tensor * RECORD_WORDS + 7)
    end = tl.where(grad != 0, tl.minimum(start + blocks * BLOCK, size), start)
    squares = sum_of_squares(grad, start, end, TYPE, BLOCK)
    tl.store(partials + first_partial + program, squares)


@triton.jit(do_not_specialize=["grad_scale", "found_inf", "count"])
def decision_kernel(
    partials,
    grad_scale,
    found_inf,
    control,
    count,
    max_norm,
    SKIP_NONFINITE: tl.constexpr,
    SUMMED: tl.constexpr,
):
    """Write norm, grad_factor and found_inf to control, and count what is skipped; max_norm 0: no
    clipping. As csrc/masked_norm.cu.
    """
    norm = norm_of_partials(partials, count, SUMMED)
    scale = 1.0
    if grad_scale is not None:
        scale = tl.load(grad_scale)
        norm = tl.div_rn(norm, scale)
    clip = tl.div_rn(max_norm, norm + 1e-6)
    # so that a NaN stays one
    clip = tl.where((max_norm <= 0.0) | (clip > 1.0), 1.0, clip)
    skip = ((norm != norm) | (norm == float("inf"))) & SKIP_NONFINITE
    if found_inf is not None:
        skip = skip | (tl.load(found_inf) != 0.0)
    skipped = tl.where(skip, 1.0, 0.0)
    tl.store(control, norm)
    tl.store(control + 1, tl.div_rn(clip, scale))
    tl.store(control + 2, skipped)
    tl.store(control + 3, tl.load(control + 3) + skipped)


class Tables:
    """What stays on the bucket's device for a stage.

    Attributes:
        records: (tensors, 9) int64: UpdateRecord in csrc/launchers.h.
        blocks: of BLOCK elements in a chunk.
        chunks: (programs, 2) int32: tensor, chunk of it.
        numbers: (tensors, 10) float32, written anew in each call: beta1, 1 - beta1, beta2,
            1 - beta2, eps, lr * weight_decay, lr / (1 - beta1^t), 1 / sqrt(1 - beta2^t), the
            gradients' factor, and t, which is 0 where nothing is to be updated.
        captured: the host's memory that captured graphs copy from at every replay.
    """

    def __init__(self, bucket: Bucket) -> None:
        sizes = [p.numel() for p in bucket.params]
        self.blocks = blocks_per_program(sum(blocks_of(sizes)))
        self.records, self.chunks = record_table(bucket), chunk_table(bucket, self.blocks * BLOCK)
        shape = (len(bucket.params), NUMBERS.value)
        self.numbers = torch.empty(shape, dtype=torch.float32, device=bucket.device)
        self.captured: list[Tensor] = []


def tables_of(bucket: Bucket) -> Tables:
    """The bucket's tables, made at the first call."""
    if bucket.tables is None:
        bucket.tables = Tables(bucket)
    return bucket.tables


def addresses_on_device(bucket: Bucket, gradients: Gradients) -> Tensor:
    """Of the gradients, on the bucket's device: one copy for the norm and the update."""
    if gradients.on_device is None:
        values = torch.tensor(gradients.addresses, dtype=torch.int64, device="cpu")
        gradients.on_device = backend.sent(values, bucket.device, tables_of(bucket).captured)
    return gradients.on_device


def _stays_on_gpu(lr: float | Tensor, device: torch.device) -> bool:
    """Whether reading lr would wait for the GPU."""
    return isinstance(lr, Tensor) and lr.is_cuda and device.type == "cuda"


def _hyper_words(hyper: Hyper, device: torch.device) -> tuple[int, ...]:
    """12 float32 in 6 words; lr is 0 where it stays on the GPU."""
    lr, decay, eps, beta1, beta2 = hyper
    floats = [0.0 if _stays_on_gpu(lr, device) else float(lr), decay, eps]
    for beta in (beta1, beta2):
        # in float64: 1 - 0.999 in float32 is off by 1.3e-5
        floats += [beta, 1 - beta, math.log(beta) if beta else -math.inf]
    return struct.unpack("6q", struct.pack("12f", *floats, 0.0, 0.0, 0.0))


def _step_words(bucket: Bucket, hypers: Sequence[Hyper], seed: int) -> Tensor:
    """What is new in a call beside the gradients, on the bucket's device.

    int64: the seed, 0; per group 12 float32: lr, weight_decay, eps, beta1, 1 - beta1, log(beta1),
    the same three of beta2, and 0.
    """
    values = [seed - (seed >> 63 << 64), 0]
    for hyper in hypers:
        values += _hyper_words(hyper, bucket.device)
    # a new tensor in each call: one that is kept would be overwritten before its copy ran
    values = torch.tensor(values, dtype=torch.int64, device="cpu")
    words = backend.sent(values, bucket.device, tables_of(bucket).captured)
    for group, hyper in enumerate(hypers):
        if _stays_on_gpu(hyper.lr, bucket.device):
            floats = words.view(torch.float32)
            floats[2 * SEED_WORDS.value + group * HYPER_FLOATS.value].copy_(hyper.lr)
    return words


def options(param: tl.dtype, moments: tl.dtype, master: bool, stochastic: bool) -> dict[str, Any]:
    """Of masked_update_kernel.

    maxnreg lets 8, 6 or 5 programs share a multiprocessor of 65,536 registers, and is the least of
    these at which nothing spills. Without it ptxas takes up to 123 registers, and 4 share one.
    """
    chosen: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": False}
    if torch.version.hip is None:  # the compiler for AMD has no such option, and spills nothing
        more = param == tl.bfloat16 and not master and (moments == tl.int8 or not stochastic)
        chosen["maxnreg"] = 64 if param == moments == tl.float32 else 96 if more else 80
    return chosen


def launch(bucket: Bucket, addresses: Tensor, words: Tensor, step: Step) -> None:
    """Launch both kernels of the update on the current device and stream."""
    tensors, tables = len(bucket.params), tables_of(bucket)
    prepare_kernel[triton.cdiv(tensors, TENSORS),](
        *(tables.records, addresses, words, step.grad_factor, step.found_inf, tables.numbers),
        *(tensors, TENSORS),
        **PREPARE_OPTIONS,
    )
    if len(tables.chunks):
        param, moments = TYPES[bucket.dtype], TYPES[bucket.moment_dtype]
        rounding = bucket.masters is not None, bucket.stochastic_rounding
        masked_update_kernel[len(tables.chunks),](
            *(tables.records, addresses, words, tables.numbers, tables.chunks, tables.blocks),
            *(param, moments, *rounding, step.zero_grads, BLOCK),
            **options(param, moments, *rounding),
        )


def update(bucket: Bucket, gradients: Gradients, hypers: Sequence[Hyper], step: Step) -> None:
    """`Bucket.update`; of tensors on the CPU under Triton's interpreter."""
    with backend.device_guard(bucket.device):
        words = _step_words(bucket, hypers, step.seed)
        launch(bucket, addresses_on_device(bucket, gradients), words, step)
    written(bucket, gradients, zero_grads=step.zero_grads)


def launch_partials(bucket: Bucket, addresses: Tensor, partials: Tensor, first: int = 0) -> None:
    """Write the sums of squares of the gradients' chunks to `partials`, from `first` on."""
    tables = tables_of(bucket)
    if len(tables.chunks):
        gradient_partials_kernel[len(tables.chunks),](
            *(tables.records, addresses, tables.chunks, partials, first, tables.blocks),
            *(TYPES[bucket.dtype], BLOCK),
            **PARTIALS_OPTIONS,
        )


def launch_decision(
    partials: Tensor,
    control: Tensor,
    max_grad_norm: float | None,
    skip_nonfinite: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """Write what the sums of squares mean for a step to `control`."""
    decision_kernel[1,](
        *(partials, grad_scale, found_inf, control, len(partials), float(max_grad_norm or 0.0)),
        *(skip_nonfinite, SUMMED),
        **SUM_OPTIONS,
    )


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
    """As native.decide."""
    device = buckets[0].device
    counts = [len(tables_of(bucket).chunks) for bucket in buckets]
    partials = torch.empty(sum(counts), dtype=torch.float32, device=device)
    with backend.device_guard(device):
        first = 0
        for bucket, some, count in zip(buckets, gradients, counts, strict=True):
            launch_partials(bucket, addresses_on_device(bucket, some), partials, first)
            first += count
        launch_decision(partials, control, max_grad_norm, skip_nonfinite, grad_scale, found_inf)
