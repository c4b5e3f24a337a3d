"""Puts freeze-aware ops into the instances of a model: what to swap, whether, and the way back."""

from .model_swaps import KernelReport, KernelRow, Kernels, KernelSwaps

__all__ = ["KernelReport", "KernelRow", "KernelSwaps", "Kernels"]
