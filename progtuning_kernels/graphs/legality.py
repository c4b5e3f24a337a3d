"""Finds what a capture cannot record before it is tried.

A read by the host within a capture of CUDA spoils more than the capture: torch can neither end it,
nor put its allocator and its stream back. So it is refused here, where module and line are known.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

_READS = frozenset(
    "_local_scalar_dense equal nonzero masked_select _unique _unique2 unique_dim "
    "unique_consecutive unique_dim_consecutive bincount is_nonzero".split()
)
_BY_INDEX = frozenset("index index_put index_put_ _index_put_impl_".split())


class NotCapturable(RuntimeError):
    """A call cannot be captured or replayed, now or, if `lasting`, ever; the message says why."""

    def __init__(self, reason: str, *, lasting: bool = False) -> None:
        super().__init__(reason)
        self.lasting = lasting


class Legality(TorchDispatchMode):
    """Refuses reads by the host, copies to and from it, and memory that may be gone at a replay.

    Args:
        known: tensors that are there for every replay.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        # by storage, with those made inside, which are not kept: memory is to be taken again
        self._known = {*map(_storage, known)}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        if name in _READS or (name in _BY_INDEX and any(map(_is_mask, _tensors(args[1])))):
            raise NotCapturable(f"the host reads a value of the device: {func}")
        given = _tensors((args, kwargs))
        if name != "lift_fresh":  # of a number that is written to a place: a constant
            for t in given:
                if _storage(t) not in self._known:
                    raise NotCapturable(
                        f"{func} takes a tensor that is no argument, parameter, buffer or attribute"
                    )
        # a tensor without dimensions is a number to most operations
        devices = {t.device.type for t in given if t.dim() or name == "_to_copy"}
        if given and kwargs.get("device") is not None:
            devices.add(torch.device(kwargs["device"]).type)
        if len(devices) > 1:
            raise NotCapturable(f"a copy between devices: {func}")
        found = func(*args, **kwargs)
        self._known.update(map(_storage, (*given, *_tensors(found))))
        return found


def _is_mask(index: Tensor) -> bool:
    """Whether the number of places depends on values."""
    return index.dtype in (torch.bool, torch.uint8)


def _storage(t: Tensor) -> int:
    return t.untyped_storage()._cdata


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)]
