"""Random rounding and 8-bit moments in Triton: csrc/update_rules.h in the same order of steps."""

from __future__ import annotations

import triton
import triton.language as tl

from .low_precision import QUANT_BLOCK

QUANT = tl.constexpr(QUANT_BLOCK)
SMALLEST_LARGEST = tl.constexpr(2.0**-126)
ONE_BITS = tl.constexpr(0x3F800000)
BITS_127, BITS_255 = tl.constexpr(0x42FE0000), tl.constexpr(0x437F0000)  # of these floats
TIMES_65536 = tl.constexpr(16 << 23)  # what a product with 2^16 adds to the bits


@triton.jit
def random_bits(seed, index, step, start, STREAM: tl.constexpr, BLOCK: tl.constexpr):
    """(BLOCK,) uint32 below 2**16, for the elements from `start`, a multiple of 8."""
    eighth = start // 8 + tl.arange(0, BLOCK // 8)
    c0 = eighth.to(tl.uint32)
    c1 = (eighth >> 32).to(tl.uint32) | (STREAM << 24)
    zero = c0 * 0
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, zero + index, zero + step, n_rounds=7)
    # element i of the eight: half i % 2 of word i // 2; join adds the innermost dimension
    word = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    return tl.reshape(tl.join(word & 0xFFFF, word >> 16), [BLOCK])


@triton.jit
def _drop_low_half(bits, added):
    special = (bits & 0x7F800000) == 0x7F800000  # adding to the bits of a NaN would give -0.0
    quiet = tl.where((bits & 0x007FFFFF) != 0, 0x00400000, 0).to(tl.uint32)
    return (tl.where(special, bits | quiet, bits + added) >> 16).to(tl.uint16)


@triton.jit
def nearest_bfloat16(x):
    bits = x.to(tl.uint32, bitcast=True)
    return _drop_low_half(bits, ((bits >> 16) & 1) + 0x7FFF)


@triton.jit
def stochastic_bfloat16(x, random):
    return _drop_low_half(x.to(tl.uint32, bitcast=True), random)


@triton.jit
def largest_magnitude(x, inside, FULL: tl.constexpr, BLOCK: tl.constexpr):
    """Largest magnitude in each block of 256, as bits: they order alike, and NaN stays on top."""
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    if not FULL:
        bits = tl.where(inside, bits, 0)
    return tl.max(tl.reshape(bits, [BLOCK // QUANT, QUANT]), axis=1).to(tl.float32, bitcast=True)


@triton.jit
def spread(per_block, BLOCK: tl.constexpr):
    """(BLOCK,) from one value per block of 256."""
    wide = tl.broadcast_to(tl.expand_dims(per_block, 1), [BLOCK // QUANT, QUANT])
    return tl.reshape(wide, [BLOCK])


@triton.jit
def inverse_of_largest(largest):
    usable = largest >= SMALLEST_LARGEST  # its reciprocal is finite; False for NaN
    return tl.where(usable, tl.div_rn(1.0, tl.where(usable, largest, 1.0)), 0.0)


@triton.jit
def _root_times(x, SHIFT: tl.constexpr, UNIT: tl.constexpr):
    """What has the ratio x^(1 / 2^SHIFT) to the float with bits UNIT; x above 1, and NaN, is 1."""
    bits = tl.minimum(x.to(tl.uint32, bitcast=True), ONE_BITS)
    return ((bits >> SHIFT) + (UNIT - (ONE_BITS >> SHIFT))).to(tl.float32, bitcast=True)


@triton.jit
def _power_of_ratio(x, SHIFT: tl.constexpr, UNIT: tl.constexpr):
    """(x / unit)^(2^SHIFT), with exponent + mantissa in log2's place; unit has bits UNIT."""
    # 32 bits of a difference that lies above 32 bits; as a sum of such, nothing overflows
    ones: tl.constexpr = (ONE_BITS - (UNIT << SHIFT)) & 0xFFFFFFFF
    bits = tl.add(x.to(tl.uint32, bitcast=True) << SHIFT, ones, sanitize_overflow=False)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def decode_exp_avg(code, largest):
    power = tl.where(code == 0.0, 0.0, _power_of_ratio(tl.abs(code), 2, BITS_127))
    return tl.where(code < 0.0, -power, power) * largest


@triton.jit
def decode_exp_avg_sq(code, largest):
    return _power_of_ratio(code, 3, BITS_255) * largest


@triton.jit
def encode_exp_avg(m, inverse):
    code = (_root_times(tl.abs(m) * inverse, 2, BITS_127) + 0.5).to(tl.int32)
    return tl.where(m.to(tl.int32, bitcast=True) < 0, -code, code).to(tl.int8)


@triton.jit
def encode_exp_avg_sq(v, inverse, random):
    fixed = _root_times(v * inverse, 3, BITS_255 + TIMES_65536).to(tl.uint32)
    code = (fixed + random) >> 16
    return tl.where(code < 1, 1, code).to(tl.uint8)
