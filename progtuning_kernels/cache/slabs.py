"""Rows in GPU or CPU memory: appended to large slabs, whose holes are used again.

An allocation per row would be 100,000 of them for 100,000 rows, and leave as many holes in the heap
when a level is dropped. A slab that is empty is given back at once.
"""

from __future__ import annotations

import sys
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .free_space import FreeSpace

ALIGNMENT = 64  # bytes; rows begin at its multiples, and take up a whole number of it
_FIRST_SLAB, _LARGEST_SLAB = 1 << 20, 64 << 20  # bytes; a slab is as large as all before it
_GUARD = ALIGNMENT  # bytes between slabs' addresses that are never free: holes end at a slab's end
_RETRY_SECONDS = 10.0  # between two questions for more memory than there was


def aligned(nbytes: int) -> int:
    """The space that a row of `nbytes` bytes takes; one without tokens takes some, too."""
    return max(ALIGNMENT, -(-nbytes // ALIGNMENT) * ALIGNMENT)


def free_gpu_bytes(device: torch.device) -> int:
    """What the driver says is free; what torch keeps cached counts as taken."""
    return torch.cuda.mem_get_info(device)[0]


def free_cpu_bytes(_: torch.device | None = None) -> int:
    """Memory that can be had without swapping: the machine's, or what the control group leaves."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        kilobytes = next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))
        free = int(kilobytes) << 10
    except (OSError, StopIteration):
        return sys.maxsize
    try:
        group = Path("/sys/fs/cgroup")
        limit = int(group.joinpath("memory.max").read_text())  # ValueError for "max"
        stat = dict(line.split() for line in group.joinpath("memory.stat").open())
        used = int(group.joinpath("memory.current").read_text()) - int(stat["inactive_file"])
    except (OSError, ValueError, KeyError):
        return free
    return min(free, max(0, limit - used))


@dataclass(slots=True, eq=False)
class _Slab:
    base: int  # its first address
    data: Tensor  # (bytes,) uint8
    used: int = 0  # bytes
    copied: torch.cuda.Event | None = None  # behind the last copy that was queued on a stream


class SlabTier:
    """Rows in the memory of one device. Addresses are bytes, and run through all slabs.

    Args:
        device: of the slabs.
        pinned: CPU memory that the GPU reads and writes itself.
        share: of the free memory, slabs included, that slabs may take; None leaves it to the
            budget.
        free_bytes: asked for that memory, once per new slab.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        pinned: bool,
        share: float | None,
        free_bytes: Callable[[torch.device], int],
    ) -> None:
        self.device = device
        self.allocated = 0  # bytes of all slabs
        self.used = 0  # bytes of rows
        self._pinned = pinned
        self._share = share
        self._free_bytes = free_bytes
        self._refused_until = 0.0
        self._space = FreeSpace()
        self._slabs: list[_Slab] = []  # by address
        self._bases: list[int] = []
        self._end = 0
        self._side_streams: dict[torch.device, torch.cuda.Stream] = {}

    def take(self, nbytes: int, left: int) -> int | None:
        """The address of `nbytes` bytes (a multiple of 64), None if there is no room.

        Args:
            left: bytes by which the slabs may grow.
        """
        address = self._space.take(nbytes)
        if address is None and self._grow(nbytes, left):
            address = self._space.take(nbytes)
        if address is not None:
            self.used += nbytes
            self._slab(address).used += nbytes
        return address

    def give(self, address: int, nbytes: int) -> None:
        """Take back what `take` gave."""
        slab = self._slab(address)
        self.used -= nbytes
        slab.used -= nbytes
        self._space.give(address, nbytes)
        if not slab.used:
            self._space.remove(slab.base)
            at = self._slabs.index(slab)
            del self._slabs[at], self._bases[at]
            self.allocated -= slab.data.numel()

    def fill(self, addresses: Sequence[int], sources: Sequence[Tensor]) -> None:
        """Copy `sources`, (n,) uint8 of one device, to their addresses.

        Sources on a GPU must not be written to again: their copies to the CPU run on a stream of
        their own beside the computation, and nothing waits for them.
        """
        rows = [self._view(a, s.numel()) for a, s in zip(addresses, sources, strict=True)]
        if sources[0].is_cuda and self.device.type == "cpu":
            stream = self.side_stream(sources[0].device)
            stream.wait_stream(torch.cuda.current_stream(stream.device))
            for source in sources:
                source.record_stream(stream)
        else:
            stream = self._current_stream(sources[0])
        self._copy(addresses, sources, rows, stream)

    def copy_to(self, addresses: Sequence[int], targets: Sequence[Tensor]) -> None:
        """Copy the bytes at `addresses` to `targets`, (n,) uint8 of one device each.

        They are there for what is queued on the current stream from now on.
        """
        rows = [self._view(a, t.numel()) for a, t in zip(addresses, targets, strict=True)]
        self._copy(addresses, rows, targets, self._current_stream(targets[0]))

    def prefetch(
        self, addresses: Sequence[int], sizes: Sequence[int], device: torch.device
    ) -> tuple[list[Tensor], torch.cuda.Event]:
        """Copies of rows on a GPU, (n,) uint8 each, made beside the computation.

        Returns:
            The copies, and the event to wait for before they are read.
        """
        stream = self.side_stream(device)
        rows = [self._view(a, n) for a, n in zip(addresses, sizes, strict=True)]
        with torch.cuda.stream(stream):  # the memory belongs to this stream: it waits for no other
            copies = list(torch.empty(sum(sizes), dtype=torch.uint8, device=device).split(sizes))
        self._copy(addresses, rows, copies, stream)
        done = torch.cuda.Event()
        done.record(stream)
        return copies, done

    def side_stream(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self._side_streams:
            self._side_streams[device] = torch.cuda.Stream(device)
        return self._side_streams[device]

    def _current_stream(self, other: Tensor) -> torch.cuda.Stream | None:
        """The stream on which a copy between slab and `other` runs; None without a GPU."""
        if self.device.type == "cuda":
            return torch.cuda.current_stream(self.device)
        return torch.cuda.current_stream(other.device) if other.is_cuda else None

    def _copy(
        self,
        addresses: Sequence[int],
        sources: Sequence[Tensor],
        targets: Sequence[Tensor],
        stream: torch.cuda.Stream | None,
    ) -> None:
        """Every use of a slab comes after the one before it, whatever streams they are on."""
        slabs = {self._slab(address) for address in addresses}
        if stream is None:
            for slab in slabs:
                if slab.copied is not None:
                    slab.copied.synchronize()
                    slab.copied = None
            for source, target in zip(sources, targets, strict=True):
                target.copy_(source)
            return
        for slab in slabs:
            if slab.copied is not None:
                stream.wait_event(slab.copied)
        with torch.cuda.stream(stream):
            for source, target in zip(sources, targets, strict=True):
                # a copy to pageable CPU memory must have ended when it is read here
                target.copy_(source, non_blocking=target.is_cuda or target.is_pinned())
        for slab in slabs:
            slab.copied = torch.cuda.Event()
            slab.copied.record(stream)
            if slab.data.is_cuda:
                slab.data.record_stream(stream)

    def _grow(self, nbytes: int, left: int) -> bool:
        size = min(max(nbytes, _FIRST_SLAB, min(self.allocated, _LARGEST_SLAB)), left)
        if self._pinned:
            # torch's allocator rounds pinned memory up to a power of two
            size = 1 << (size.bit_length() - 1) if size > 0 else 0
            if size < nbytes:
                size = 1 << (nbytes - 1).bit_length()
        if not nbytes <= size <= left or time.monotonic() < self._refused_until:
            return False
        try:
            if self._share is not None:
                free = self._free_bytes(self.device)
                if self.allocated + size > self._share * (self.allocated + free):
                    raise MemoryError
            data = torch.empty(size, dtype=torch.uint8, device=self.device, pin_memory=self._pinned)
        except (RuntimeError, MemoryError):  # RuntimeError: torch's OutOfMemoryError among others
            self._refused_until = time.monotonic() + _RETRY_SECONDS
            return False
        self._slabs.append(_Slab(self._end, data))
        self._bases.append(self._end)
        self._space.give(self._end, size)
        self._end += size + _GUARD
        self.allocated += size
        return True

    def _slab(self, address: int) -> _Slab:
        return self._slabs[bisect_right(self._bases, address) - 1]

    def _view(self, address: int, nbytes: int) -> Tensor:
        slab = self._slab(address)
        return slab.data[address - slab.base : address - slab.base + nbytes]
