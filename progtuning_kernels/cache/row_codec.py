"""How the hidden states of one token become the bytes that are stored, and back.

A stored token is `token_bytes` bytes, wherever it lies: the values in the stored dtype, or, under
"8bit", one float32 scale per 128 channels followed by one int8 code per channel,

    scale = max |x| / 127 over the group,  code = round(x / scale),  x' = code * scale,

so that no channel is off by more than half a code. README.md has the errors on real activations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

StoredDtype = torch.dtype | Literal["8bit"] | None

GROUP = 128  # channels that share a scale
# a dtype's number on disk is its place here: append only
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, "8bit")


@dataclass(frozen=True, slots=True)
class RowFormat:
    """What the bytes of a stored token of C = `width` channels mean."""

    dtype: torch.dtype | Literal["8bit"]
    width: int

    @property
    def groups(self) -> int:
        return -(-self.width // GROUP)

    @property
    def token_bytes(self) -> int:
        if self.dtype == "8bit":
            # a multiple of 4, so that the scales of every token can be viewed as float32
            return 4 * self.groups + -(-self.width // 4) * 4
        return self.width * self.dtype.itemsize

    def encode(self, tokens: Tensor) -> Tensor:
        """Bytes of `tokens`, (N, C) of any floating dtype: (N, token_bytes) uint8."""
        if self.dtype != "8bit":
            flat = tokens.to(self.dtype).flatten()  # a last dimension of 1 has any stride
            return flat.view(torch.uint8).view(len(tokens), self.token_bytes)
        groups = self._grouped(tokens.to(torch.float32))  # (N, G, 128)
        scale = groups.abs().amax(dim=2) / 127.0
        # a group of zeros (and of values below 127 * 2**-149) has a scale of 0, and codes of 0
        codes = (groups / scale.masked_fill(scale == 0, 1.0)[:, :, None]).round_()
        packed = tokens.new_zeros((len(tokens), self.token_bytes), dtype=torch.uint8)
        first = 4 * self.groups
        packed.view(torch.float32)[:, : self.groups] = scale
        codes = codes.view(len(tokens), self.groups * GROUP)[:, : self.width]
        packed[:, first : first + self.width] = codes.to(torch.int8).view(torch.uint8)
        return packed

    def decode(self, packed: Tensor, dtype: torch.dtype) -> Tensor:
        """What `encode` packed, (N, token_bytes) uint8, contiguous: (N, C) of `dtype`."""
        if self.dtype != "8bit":
            return packed.flatten().view(self.dtype).view(len(packed), self.width).to(dtype)
        first = 4 * self.groups
        scale = packed.view(torch.float32)[:, : self.groups]
        codes = packed[:, first : first + self.width].view(torch.int8)
        groups = self._grouped(codes.to(torch.float32)).mul_(scale[:, :, None])
        return groups.view(len(packed), self.groups * GROUP)[:, : self.width].to(dtype)

    def _grouped(self, tokens: Tensor) -> Tensor:
        """(N, G, 128), zeros behind the last channel."""
        if missing := self.groups * GROUP - self.width:
            tokens = torch.nn.functional.pad(tokens, (0, missing))
        return tokens.view(len(tokens), self.groups, GROUP)


def row_format(stored: StoredDtype, activation: torch.dtype, width: int) -> RowFormat:
    """How rows of `activation` dtype are stored where `stored` is asked for.

    An activation is never stored in more bytes than it has, nor in another dtype of as many.

    Raises:
        TypeError: no activation is of that dtype.
    """
    if activation not in DTYPES:
        raise TypeError(f"hidden states must be of a floating dtype, got {activation}")
    if stored is None or (stored != "8bit" and stored.itemsize >= activation.itemsize):
        return RowFormat(activation, width)
    return RowFormat(stored, width)


@dataclass(frozen=True)
class CodecError:
    """What a lossy dtype changed in the rows that were written.

    Attributes:
        rms: root mean square of the change, relative to that of the hidden states.
        largest: the same of the single token that changed most.
        tokens: how many were measured.
    """

    rms: float
    largest: float
    tokens: int


class ErrorMeter:
    """Sums the errors of written rows."""

    def __init__(self) -> None:
        self._error = self._signal = self._largest = 0.0
        self._tokens = 0

    def measure(self, row_format: RowFormat, tokens: Tensor, packed: Tensor) -> Tensor:
        """Squared error, squared norm and their ratio for every token: (3, N) float64.

        A token that the dtype cannot hold (float16 ends at 65,504), or that is not finite itself,
        has an error that is not finite.

        Args:
            tokens: (N, C), what was encoded. packed: (N, token_bytes) uint8, what came out.
        """
        exact = torch.promote_types(tokens.dtype, torch.float32)
        tokens, read = tokens.to(exact), row_format.decode(packed, tokens.dtype).to(exact)
        # norms are summed in float64: the square of 1e20, which bfloat16 holds, is no float32
        error = torch.linalg.vector_norm(read - tokens, dim=1, dtype=torch.float64).square_()
        signal = torch.linalg.vector_norm(tokens, dim=1, dtype=torch.float64).square_()
        return torch.stack((error, signal, error / signal.masked_fill(signal == 0, 1.0)))

    def add(self, measured: Tensor) -> None:
        """Count the (3, N) that `measure` returned; all finite."""
        if measured.shape[1]:
            error, signal = measured[:2].sum(dim=1).tolist()
            self._error += error
            self._signal += signal
            self._largest = max(self._largest, float(measured[2].max()))
            self._tokens += measured.shape[1]

    @property
    def error(self) -> CodecError | None:
        """None before a row was measured."""
        if not self._tokens:
            return None
        rms = (self._error / self._signal) ** 0.5 if self._signal else 0.0
        return CodecError(rms, self._largest**0.5, self._tokens)
