"""Tells sharded tensors (`DTensor`) from ordinary ones, without importing torch.distributed."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def is_sharded(t: Tensor | type) -> bool:
    """Whether a tensor, or a class of tensors, is a `DTensor`."""
    return hasattr(t, "to_local")


def local_of(t: Tensor) -> Tensor:
    """The shard of a `DTensor` on this rank; any other tensor itself."""
    return t.to_local() if is_sharded(t) else t


def rows_among(t: Tensor) -> tuple[int, int]:
    """Number of ranks that a tensor's rows are cut among, and which of them this one is.

    (1, 0) for a tensor that is whole. Raises `ValueError` for shards of another kind.
    """
    ranks, own = 1, 0
    if is_sharded(t):
        sharded: Any = t
        cut = [i for i, kind in enumerate(sharded.placements) if not kind.is_replicate()]
        if len(cut) > 1 or not all(sharded.placements[i].is_shard(0) for i in cut):
            raise ValueError(
                f"8-bit moments of a tensor that is sharded as {sharded.placements}: only rows, as "
                "fully_shard cuts them, have blocks that can go to another number of ranks; use "
                "state_dtype=torch.bfloat16"
            )
        for i in cut:
            ranks, own = sharded.device_mesh.size(i), sharded.device_mesh.get_local_rank(i)
    return ranks, own
