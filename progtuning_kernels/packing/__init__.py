"""Packed tokens: blocks compute on real tokens only, in an unmodified loop; see README.md."""

from .blocks import padded, unpacked
from .packer import Packer, Packing
from .report import PackingReport
from .submodules import runs_padded

__all__ = ["Packer", "Packing", "PackingReport", "padded", "runs_padded", "unpacked"]
