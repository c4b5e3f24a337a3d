"""Random rounding and 8-bit moments in plain torch: what csrc/update_rules.h does, bit for bit."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Stream = Literal["param", "moments"]
_STREAMS: dict[Stream, int] = {"param": 0, "moments": 1}
QUANT_BLOCK = 256
_LOW = 0xFFFFFFFF
_SMALLEST_LARGEST = 1.17549435e-38  # the smallest normal float32
_ONE_BITS, _BITS_127, _BITS_255 = 0x3F800000, 0x42FE0000, 0x437F0000  # of these floats


def philox(seed: int, counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four words of 32 random bits per counter; words are int64 tensors in [0, 2**32)."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(7):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # wraps at 64 bits, which are the right ones
        c0, c1, c2, c3 = (
            ((b >> 32) & _LOW) ^ c1 ^ k0,
            b & _LOW,
            ((a >> 32) & _LOW) ^ c3 ^ k1,
            a & _LOW,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return c0, c1, c2, c3


def random_halves(n: int, seed: int, stream: Stream, index: int, step: Tensor) -> Tensor:
    """16 random bits for each of n elements of a tensor: (n,) int64 in [0, 65536).

    Args:
        seed: of the run, 64 bits.
        stream: what the bits round.
        index: of the tensor in its optimizer.
        step: 0-dim, the number of the update (from 1); its device is the result's.
    """
    eighths = torch.arange((n + 7) // 8, device=step.device)
    c1 = (eighths >> 32) | (_STREAMS[stream] << 24)
    shared = torch.full_like(eighths, index), step.to(torch.int64).expand_as(eighths)
    words = torch.stack(philox(seed, (eighths & _LOW, c1, *shared)), dim=1)  # (n / 8, 4)
    return torch.stack((words & 0xFFFF, words >> 16), dim=2).flatten()[:n]


def swapped_bytes(random: Tensor) -> Tensor:
    """16 bits with their bytes swapped: what v takes where m takes the bits as they are."""
    return ((random & 0xFF) << 8) | (random >> 8)


def stochastic_bfloat16(x: Tensor, random: Tensor) -> Tensor:
    """Round float32 to bfloat16, up where the dropped half plus `random` carries.

    x is float32 of any shape, `random` int64 in [0, 65536), as many. Infinities and NaN stay what
    they are: adding to their bits would give NaN the bits of -0.0.
    """
    bits = x.contiguous().view(torch.int32)
    rounded = ((bits.to(torch.int64) + random.view_as(bits)) >> 16 << 16).to(torch.int32)
    rounded = rounded.view(torch.float32).to(torch.bfloat16)
    return torch.where(x.isfinite(), rounded, x.to(torch.bfloat16))


def with_residual(p: Tensor, residual: Tensor) -> Tensor:
    """The float32 that a bfloat16 and its residual, int8, stand for: 24-bit weights.

    The residual counts 1/256 of a unit in p's last place. A zero is one whatever its residual.
    """
    bits = p.to(torch.float32).contiguous().view(torch.int32)
    joined = (bits + (residual.to(torch.int32) << 8)).view(torch.float32)
    return torch.where(p == 0, p.to(torch.float32), joined)


def split_24_bits(x: Tensor, random: Tensor) -> tuple[Tensor, Tensor]:
    """float32 as the nearest bfloat16 and a residual, int8; off by at most 2^-15 of itself.

    `random`, int64 in [0, 65536), decides where the last 8 bits are rounded to; with 0x80 it is the
    nearest, off by at most 2^-16.
    """
    bits = x.contiguous().view(torch.int32).to(torch.int64) & _LOW
    random = random.view_as(bits)
    rounded = (bits + ((random ^ (random >> 8)) & 0xFF)) & _LOW
    rounded = torch.where(x.isnan(), (bits & 0xFFFF0000) | 0x00400000, rounded)
    upper = ((rounded + 0x8000) & 0xFFFF0000).to(torch.int32).view(torch.float32)
    return upper.to(torch.bfloat16), ((rounded >> 8) & 0xFF).to(torch.uint8).view(torch.int8)


def residual_of(p: Tensor, master: Tensor) -> Tensor:
    """What p needs to stand for a float32 master; 0 where p is not what the master rounds to."""
    halfway = torch.full(p.shape, 0x80, dtype=torch.int64, device=p.device)
    rounded, residual = split_24_bits(master, halfway)
    # of a tie p may be the other side
    apart = rounded.view(torch.int16).int() - p.contiguous().view(torch.int16).int()
    needed = 256 * apart + residual
    near = needed.clamp(-128, 127).to(torch.int8)
    return torch.where(needed.abs() <= 128, near, torch.zeros_like(near))


def _blocks(x: Tensor) -> Tensor:
    """(number of blocks, 256), zeros behind the last element."""
    flat = x.flatten()
    return torch.nn.functional.pad(flat, (0, -flat.numel() % QUANT_BLOCK)).view(-1, QUANT_BLOCK)


def _scaled(x: Tensor) -> tuple[Tensor, Tensor]:
    """Largest magnitude of every block, and the magnitudes over it."""
    blocks = _blocks(x).abs()
    largest = blocks.amax(dim=1)
    usable = largest >= _SMALLEST_LARGEST  # its reciprocal is finite; False for NaN
    inverse = torch.where(usable, largest.reciprocal(), torch.zeros_like(largest))
    return largest, blocks * inverse[:, None]


def _root_times(x: Tensor, shift: int, unit_bits: int) -> Tensor:
    """What has the ratio x^(1 / 2^shift) to the float of `unit_bits`; x over 1, and NaN, are 1."""
    bits = (x.view(torch.int32).to(torch.int64) & _LOW).clamp(max=_ONE_BITS)
    return ((bits >> shift) + (unit_bits - (_ONE_BITS >> shift))).to(torch.int32).view(x.dtype)


def _power_of_ratio(x: Tensor, shift: int, unit_bits: int) -> Tensor:
    """(x / unit)^(2^shift) for 1 <= x <= unit, a float with `unit_bits`."""
    bits = ((x.view(torch.int32).to(torch.int64) - unit_bits) << shift) + _ONE_BITS
    return bits.to(torch.int32).view(x.dtype)


def encode_exp_avg(m: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (int8, m's shape) and largest magnitudes (float32, one per 256 elements)."""
    largest, scaled = _scaled(m)
    code = (_root_times(scaled, 2, _BITS_127) + 0.5).to(torch.int32)
    code = torch.where(_blocks(m).signbit(), -code, code)
    return _unblocked(code.to(torch.int8), m), largest


def encode_exp_avg_sq(v: Tensor, random: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (uint8 in 1..255, v's shape) and largest values (float32, one per 256 elements)."""
    largest, scaled = _scaled(v)
    fixed = (_root_times(scaled, 3, _BITS_255) * 65536.0).to(torch.int32)
    code = ((fixed + _blocks(random)) >> 16).clamp(min=1)
    return _unblocked(code.to(torch.uint8), v), largest


def decode_exp_avg(code: Tensor, largest: Tensor) -> Tensor:
    """The float32 that the codes stand for."""
    q = _blocks(code).to(torch.float32)
    power = _power_of_ratio(q.abs().clamp(min=1.0), 2, _BITS_127)
    power = torch.where(q == 0, torch.zeros_like(q), power)
    return _unblocked(torch.where(q < 0, -power, power) * largest[:, None], code)


def decode_exp_avg_sq(code: Tensor, largest: Tensor) -> Tensor:
    """The float32 that the codes stand for; code 0, of a fresh state, has a largest of 0."""
    q = _blocks(code).to(torch.float32).clamp(min=1.0)
    return _unblocked(_power_of_ratio(q, 3, _BITS_255) * largest[:, None], code)


def _unblocked(blocks: Tensor, like: Tensor) -> Tensor:
    return blocks.flatten()[: like.numel()].view(like.shape)
