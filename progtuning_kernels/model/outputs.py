"""Compares what a model returns when parts of it run in another way."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .forward_hooks import tensors_in

# Largest difference, relative to the largest value, between a served forward and a plain one. The
# kernels above the boundary get the same input, so that on CPU there is none.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9, torch.float16: 2e-3, torch.bfloat16: 2e-2}
# Between a stored row and the same row computed anew, in another batch and another precision.
STORED_TOLERANCE = {None: 1e-3, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}
_KEYS_AND_VALUES = ("past_key_values", "cache_params", "mems")


def difference(one: Tensor, other: Tensor) -> float:
    """Largest difference relative to the largest value; infinite where only one is finite."""
    if not one.numel():
        return 0.0
    one, other = one.double(), other.double()
    same = (one == other) | (one.isnan() & other.isnan())
    error = torch.where(same, 0.0, (one - other).abs())
    scale = one[one.isfinite()].abs().max().clamp_min(1e-30) if one.isfinite().any() else 1.0
    worst = float((error / scale).max())
    return math.inf if math.isnan(worst) else worst


def close_rows(
    one: Tensor, other: Tensor, spans: Sequence[tuple[int, int]] | None, tolerance: float
) -> bool:
    """Whether rows (B, T, C) are the same within their spans, all of them if None."""
    if spans is None:
        return difference(one, other) <= tolerance
    pairs = zip(one, other, spans, strict=True)
    return all(difference(a[s:e], b[s:e]) <= tolerance for a, b, (s, e) in pairs)


def outputs_problem(
    expected: tuple[Any, list[Tensor]], found: tuple[Any, list[Tensor]], real: Tensor | None
) -> str | None:
    """What differs between a forward with its prefix and one without; None where they agree.

    Args:
        expected, found: what the model returned and the tensors that it has kept.
        real: (B, T), where tokens are no padding; None compares all.
    """
    expected, found = compared(*expected), compared(*found)
    if not expected:
        return "its output shows no tensor that could be compared"
    if [t.shape for t in expected] != [t.shape for t in found]:
        return "without the prefix its outputs have other shapes"
    for one, other in zip(expected, found, strict=True):
        if real is not None and one.shape[:2] == real.shape:
            one, other = one[real], other[real]  # nothing reads the rest
        if (error := difference(one, other)) > TOLERANCE.get(one.dtype, 0.0):
            return (
                f"an output differs by {error:.1e} without the prefix: something above "
                "the boundary reads more than the hidden states"
            )
    return None


def has_keys_and_values(output: Any) -> bool:
    """Whether an output holds keys and values of all blocks."""
    # as a plain dict: outputs of transformers 5.24 warn when they are asked for this older name
    if isinstance(output, Mapping) and dict(output).get("past_key_values") is not None:
        return True
    return any(map(_is_past, pytree.tree_leaves(output, is_leaf=_is_past)))


def _is_past(value: Any) -> bool:
    return hasattr(value, "get_seq_length")


def compared(output: Any, kept: Sequence[Tensor] = ()) -> list[Tensor]:
    """All tensors in an output but keys and values, and those that the model has kept."""
    if isinstance(output, Mapping):
        output = {k: v for k, v in output.items() if k not in _KEYS_AND_VALUES}
    leaves = pytree.tree_leaves(output, is_leaf=_is_past)
    return [*tensors_in([leaf for leaf in leaves if not _is_past(leaf)]), *kept]
