"""Masks on a GPU whose values the host has read already.

transformers asks a mask in every forward whether it masks anything (`all()`), and the host waits
for the GPU to answer. Packing has read the whole mask by then: the model gets one that answers from
the host, so that a packed forward reads no more often than a padded one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


class KnownMask(Tensor):
    """A mask, and what the host knows of it.

    Whether all or any of it is set comes from the host, as a CPU tensor of one value. Everything
    else runs on the mask's device, and gives plain tensors.
    """

    _on: Tensor  # `mask != 0`, on the host
    _read_at: int  # version of the mask that was read

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        on, mask = None, args[0] if args else None
        with torch._C.DisableTorchFunctionSubclass():
            if func in _ON_HOST and isinstance(mask, KnownMask):
                # written into since it was read, it is a mask like any other
                if mask._version == mask._read_at and (not kwargs or func is Tensor.to):
                    on = _ON_HOST[func](mask, *args[1:])
            if on is not None and not on.ndim:
                return on
            found = func(*args, **kwargs)
            if on is None or found is mask or found.dtype not in (torch.bool, mask.dtype):
                return found
            return found if found.device != mask.device else known_mask(found, on)


def known_mask(mask: Tensor, on: Tensor) -> Tensor:
    """The same mask, with `on`, bool, its `mask != 0` on the host."""
    made = mask.as_subclass(KnownMask)
    made._on, made._read_at = on, mask._version
    return made


def _all(mask: KnownMask, *dims: Any) -> Tensor | None:
    return None if dims else mask._on.all()


def _any(mask: KnownMask, *dims: Any) -> Tensor | None:
    return None if dims else mask._on.any()


def _sum(mask: KnownMask, *dims: Any) -> Tensor | None:
    return None if dims or mask.dtype is not torch.bool else mask._on.sum()


def _contains(mask: KnownMask, value: Any) -> Tensor | None:
    return (~mask._on).any() if _is_zero(value) else None


def _equal(mask: KnownMask, value: Any) -> Tensor | None:
    return ~mask._on if _is_zero(value) else None


def _unequal(mask: KnownMask, value: Any) -> Tensor | None:
    return mask._on if _is_zero(value) else None


def _is_zero(value: Any) -> bool:
    return isinstance(value, int | float) and value == 0


def _not(mask: KnownMask) -> Tensor | None:
    return ~mask._on if mask.dtype is torch.bool else None


def _part(mask: KnownMask, index: Any) -> Tensor | None:
    entries = index if isinstance(index, tuple) else (index,)
    return mask._on[index] if all(isinstance(entry, slice) for entry in entries) else None


def _viewed(mask: KnownMask, *shape: Any) -> Tensor | None:
    if len(shape) == 1 and isinstance(shape[0], Sequence):
        shape = tuple(shape[0])
    return mask._on.reshape(shape) if shape and all(type(size) is int for size in shape) else None


def _same(mask: KnownMask, *target: Any) -> Tensor:
    return mask._on


# What the host knows of the result, None for nothing; a single value is the result itself.
_ON_HOST: dict[Callable[..., Any], Callable[..., Tensor | None]] = {
    Tensor.all: _all,
    torch.all: _all,
    Tensor.any: _any,
    torch.any: _any,
    Tensor.sum: _sum,
    torch.sum: _sum,
    Tensor.__contains__: _contains,
    Tensor.__eq__: _equal,
    Tensor.ne: _unequal,
    Tensor.__invert__: _not,
    Tensor.__getitem__: _part,
    Tensor.view: _viewed,
    Tensor.reshape: _viewed,
    Tensor.to: _same,
    Tensor.bool: _same,
}
