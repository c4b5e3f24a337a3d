"""What the host has read of the tensors of one forward, and what it sends without waiting."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def waits_for(device: torch.device) -> bool:
    """Whether the host waits where it reads a value of a tensor on this device."""
    return device.type != "cpu"


class HostCopies:
    """Copies on the host of tensors that one forward is called with, by tensor.

    A tensor of the host is its own copy. One that is written into after it was read has none.
    """

    def __init__(self) -> None:
        # by id of the tensor, which is kept for it, with its version when it was read
        self._read: dict[int, tuple[Tensor, int | None, Tensor]] = {}

    def read(self, tensors: Iterable[Tensor]) -> None:
        """Read what is not known yet: the host waits once for each device."""
        by_device: dict[torch.device, list[Tensor]] = defaultdict(list)
        for tensor in tensors:
            if self.known(tensor) is None:
                by_device[tensor.device].append(tensor)
        for unread in by_device.values():
            for tensor, copy in zip(unread, _copies(unread), strict=True):
                self._read[id(tensor)] = tensor, _version(tensor), copy

    def known(self, tensor: Tensor) -> Tensor | None:
        """Its values on the host, without reading any."""
        if not waits_for(tensor.device):
            return tensor.detach()
        found = self._read.get(id(tensor))
        return found[2] if found is not None and found[1] == _version(tensor) else None

    def of(self, tensor: Tensor) -> Tensor:
        """Its values on the host, read where they are not known."""
        self.read([tensor])
        return self.known(tensor)

    def made(self, tensor: Tensor, source: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        """`tensor`, which is `change(source)`: where the source is known, it is too."""
        copy = self.known(source) if waits_for(tensor.device) else None
        if copy is not None:
            self._read[id(tensor)] = tensor, _version(tensor), change(copy)
        return tensor

    def clear(self) -> None:
        self._read.clear()


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version  # such a tensor has none


def _copies(tensors: list[Tensor]) -> list[Tensor]:
    """Copies of tensors of one device, which leave it as bytes of one tensor."""
    if len(tensors) == 1:
        return [tensors[0].detach().cpu()]
    # by falling size of their elements, so that each begins at a multiple of its own
    order = sorted(range(len(tensors)), key=lambda i: -tensors[i].element_size())
    flat = [tensors[i].detach().reshape(-1).contiguous().view(torch.uint8) for i in order]
    parts = torch.cat(flat).cpu().split([part.numel() for part in flat])
    copies = {
        i: part.view(tensors[i].dtype).view(tensors[i].shape)
        for i, part in zip(order, parts, strict=True)
    }
    return [copies[i] for i in range(len(tensors))]
