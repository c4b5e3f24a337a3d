"""Tells sharded tensors (`DTensor`) from ordinary ones, without importing torch.distributed."""

from __future__ import annotations

from torch import Tensor


def is_sharded(t: Tensor | type) -> bool:
    """Whether a tensor, or a class of tensors, is a `DTensor`."""
    return hasattr(t, "to_local")


def local_of(t: Tensor) -> Tensor:
    """The shard of a `DTensor` on this rank; any other tensor itself."""
    return t.to_local() if is_sharded(t) else t
