"""Packed tokens: blocks compute on real tokens only, in an unmodified loop; see README.md."""

from .blocks import padded, unpacked
from .packer import Packer, Packing
from .padding_reads import PADDING_READ, looks, padding_read
from .report import PackingReport
from .submodules import runs_padded

__all__ = [
    "PADDING_READ",
    "Packer",
    "Packing",
    "PackingReport",
    "looks",
    "padded",
    "padding_read",
    "runs_padded",
    "unpacked",
]
