"""`RowStore`: boundary activations by level and key, in GPU memory, CPU memory and on disk.

A *row* is what the frozen prefix made of one sample: (tokens, C), without padding. In memory it is
a tensor of its own, which torch's allocators give back when it is dropped.

Nothing is evicted to make room. Every epoch reads every sample once; a store with room for a tenth
of them that evicts the least recently used finds next to none, one that keeps what came first a
tenth. Room comes from `drop` and `bind`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from .disk_rows import DTYPES, DiskRow, DiskRows, DiskUnavailable

StoreDevice = Literal["auto", "cuda", "cpu", "disk"]

_GPU_SHARE, _CPU_SHARE = 0.25, 0.5  # of free memory, where the caller leaves the choice to us
_FREE_BYTES_UNKNOWN = 4 << 30  # where the system does not say: macOS, Windows
_CPU = torch.device("cpu")


def stored_dtype(asked: torch.dtype | None, activation: torch.dtype) -> torch.dtype:
    """Dtype of stored rows: the one asked for if it has fewer bytes than the activation's."""
    if activation not in DTYPES:
        raise TypeError(f"hidden states must be of a floating dtype, got {activation}")
    return activation if asked is None or asked.itemsize >= activation.itemsize else asked


def free_cpu_bytes() -> int:
    """Memory that can be had without swapping: the machine's, or what the control group leaves.

    4 GiB where neither can be read.
    """
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        kilobytes = next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))
        free = int(kilobytes) << 10
    except (OSError, StopIteration):
        return _FREE_BYTES_UNKNOWN
    try:
        group = Path("/sys/fs/cgroup")
        limit = int(group.joinpath("memory.max").read_text())  # ValueError for "max"
        stat = dict(line.split() for line in group.joinpath("memory.stat").open())
        used = int(group.joinpath("memory.current").read_text()) - int(stat["inactive_file"])
    except (OSError, ValueError, KeyError):
        return free
    return min(free, max(0, limit - used))


def free_gpu_bytes(device: torch.device) -> int:
    """What the driver says is free; what torch keeps cached counts as taken."""
    return torch.cuda.mem_get_info(device)[0]


class RowStore:
    """Rows of boundary activations by (level, key), under one byte budget over all tiers.

    For one thread. A fork (a data loader's worker) finds no row on disk and writes none.

    Args:
        max_bytes, device, dtype, path: as in `PrefixCache`. "auto": up to a quarter of the free GPU
            memory if the activations are on a GPU, then up to half of the free CPU memory, then
            disk. The index (500 bytes of Python objects a row) and the pages of a file come on top
            of the budget. A folder that cannot be used is replaced by memory, as in "auto".

    Attributes:
        warnings: what went wrong, once per kind; each was given to `warnings.warn` too.
    """

    def __init__(
        self,
        max_bytes: int,
        *,
        device: StoreDevice = "auto",
        dtype: torch.dtype | None = None,
        path: str | os.PathLike[str] | None = None,
    ) -> None:
        self.warnings: list[str] = []
        self._max_bytes = max_bytes
        self._device = device
        self._dtype = dtype
        self._path = path if device in ("auto", "disk") else None
        self._fingerprint: str | None = None
        self._levels: dict[int, dict[bytes, Tensor | DiskRow]] = {}
        self._memory = {"cuda": 0, "cpu": 0}  # bytes of rows
        self._disk: DiskRows | None = None

    def bind(self, fingerprint: str) -> None:
        """Drop the rows of any other fingerprint; those of this one are found again on disk."""
        if fingerprint == self._fingerprint:
            return
        self._forget_all()
        self._fingerprint = fingerprint
        if self._path is None:
            return
        try:
            if self._disk is None:
                name = str(self._dtype or "own").removeprefix("torch.")
                self._disk = DiskRows(self._path, name, self._warn)
            for row in self._disk.bind(fingerprint, self._max_bytes):
                self._levels.setdefault(row.level, {})[row.key] = row
        except DiskUnavailable as error:
            if self._disk is not None:
                self._disk.close()
            self._warn(f"rows are kept in memory, not in {self._path}: {error}")
            self._disk = self._path = None

    def contains(self, level: int, keys: Sequence[bytes]) -> list[bool]:
        """Whether each row is there. One on disk may be damaged, which `read` finds out."""
        stored = self._levels.get(level, {})
        return [key in stored for key in keys]

    @torch.no_grad()
    def write(
        self, level: int, keys: Sequence[bytes], hidden: Tensor, spans: Sequence[tuple[int, int]]
    ) -> int:
        """Store the rows of a batch that are not there, as far as there is room; how many were.

        A row with values that the dtype cannot hold (overflow, NaN) is not.

        Args:
            level: the rows are the output of the prefix below this block.
            keys: B times 16 bytes.
            hidden: (B, T, C), floating, CPU or GPU.
            spans: row i is hidden[i, start:end].
        """
        self._require_bound()
        stored = self._levels.get(level, {})
        dtype = stored_dtype(self._dtype, hidden.dtype)
        fresh = {key: (i, *spans[i]) for i, key in enumerate(keys) if key not in stored}
        token_bytes = hidden.shape[2] * dtype.itemsize
        sizes = {key: (end - start) * token_bytes for key, (_, start, end) in fresh.items()}
        homes = self._homes(sizes, hidden.device)
        new: dict[bytes, Tensor | DiskRow] = {}
        for home in dict.fromkeys(homes.values()):
            own = {key: fresh[key] for key in homes if homes[key] == home}
            try:
                there = hidden.to(home or _CPU)
                rows = {k: there[i, s:e].to(dtype, copy=True) for k, (i, s, e) in own.items()}
            except (RuntimeError, MemoryError):  # torch has no other error where memory ends
                continue
            if dtype != hidden.dtype:
                rows = self._without_overflow(rows)
            if home is None:
                new.update((row.key, row) for row in self._disk.write(level, rows))
            else:
                new.update(rows)
                self._memory[home.type] += sum(row.nbytes for row in rows.values())
        if new:
            self._levels.setdefault(level, {}).update(new)
        return len(new)

    @torch.no_grad()
    def read(
        self,
        level: int,
        keys: Sequence[bytes],
        shape: tuple[int, int, int],
        spans: Sequence[tuple[int, int]],
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> Tensor:
        """The hidden states of a batch, (B, T, C) = `shape`, zeros outside the spans.

        A row may lie elsewhere in its batch than it did when it was written.

        Raises:
            KeyError: a row is not there, has not the length and width asked for, or is damaged
                on disk, and so is there no more.
        """
        self._require_bound()
        stored = self._levels.get(level, {})
        out = torch.zeros(shape, dtype=dtype, device=device)
        for i, (key, (start, end)) in enumerate(zip(keys, spans, strict=True)):
            row = stored.get(key)
            if row is None or row.shape != (end - start, shape[2]):
                raise KeyError(f"no row {key.hex()} of {end - start} tokens at level {level}")
            target = out[i, start:end]
            if isinstance(row, DiskRow):
                direct = not out.is_cuda and row.dtype == dtype
                content = target
                if not direct:
                    content = torch.empty(row.shape, dtype=row.dtype, device="cpu")
                if not self._disk.read(row, content):
                    self.drop(level, [key])
                    raise KeyError(f"row {key.hex()} of level {level} is damaged")
                row = content
            if out.is_cuda and not row.is_cuda:  # the GPU reads pinned memory: nothing waits
                row = row.pin_memory().to(out.device, non_blocking=True)
            if row is not target:
                target.copy_(row)
        return out

    def drop(self, level: int, keys: Sequence[bytes] | None = None) -> None:
        """Forget these rows, or the whole level; their space is used again."""
        stored = self._levels.get(level, {})
        chosen = list(stored) if keys is None else keys
        rows = [stored.pop(key) for key in chosen if key in stored]
        if not stored:
            self._levels.pop(level, None)
        if on_disk := [row for row in rows if isinstance(row, DiskRow)]:
            self._disk.drop(on_disk)
        for row in rows:
            if isinstance(row, Tensor):
                self._memory[row.device.type] -= row.nbytes

    def levels(self) -> tuple[int, ...]:
        """Levels that have rows, ascending."""
        return tuple(sorted(self._levels))

    def rows(self, level: int) -> int:
        """Number of rows at a level."""
        return len(self._levels.get(level, {}))

    @property
    def nbytes(self) -> int:
        """Bytes of the rows over all tiers; at most `max_bytes`."""
        return sum(self.nbytes_by_tier.values())

    @property
    def nbytes_by_tier(self) -> dict[str, int]:
        """The same by "cuda", "cpu" and "disk"."""
        return {**self._memory, "disk": self._disk.used if self._disk else 0}

    def close(self) -> None:
        """Give all memory back and let another store have the folder. Rows on disk stay."""
        self._forget_all()
        self._fingerprint = None
        if self._disk is not None:
            self._disk.close()
            self._disk = None

    def _require_bound(self) -> None:
        if self._fingerprint is None:
            raise RuntimeError("bind the store to a fingerprint first")

    def _forget_all(self) -> None:
        self._levels.clear()
        self._memory = {"cuda": 0, "cpu": 0}

    def _homes(
        self, sizes: Mapping[bytes, int], device: torch.device
    ) -> dict[bytes, torch.device | None]:
        """Where the rows go for which there is room: a device's memory, or None for the disk."""
        left = self._max_bytes - self.nbytes
        if not sizes or left < min(sizes.values()):
            return {}
        rooms, choice, on_gpu = {}, self._device, device.type == "cuda"
        if choice == "cuda" or (choice == "auto" and on_gpu):
            gpu = device if on_gpu else torch.device("cuda", torch.cuda.current_device())
            rooms[gpu] = left if choice == "cuda" else self._share(gpu)
        if choice in ("auto", "cpu") or (choice == "disk" and self._disk is None):
            rooms[_CPU] = left if choice == "cpu" else self._share(_CPU)
        if self._disk is not None:
            rooms[None] = left
        homes: dict[bytes, torch.device | None] = {}
        for key, nbytes in sizes.items():
            for home, room in rooms.items():
                if nbytes <= min(room, left):
                    homes[key] = home
                    rooms[home] -= nbytes
                    left -= nbytes
                    break
        return homes

    def _share(self, device: torch.device) -> int:
        """Bytes by which rows in the memory of `device` may grow; others keep their part."""
        used = self._memory[device.type]
        if device.type == "cuda":
            return int(_GPU_SHARE * (used + free_gpu_bytes(device))) - used
        return int(_CPU_SHARE * (used + free_cpu_bytes())) - used

    def _without_overflow(self, rows: dict[bytes, Tensor]) -> dict[bytes, Tensor]:
        finite = torch.stack([row.isfinite().all() for row in rows.values()]).tolist()
        if not all(finite):
            self._warn(f"rows with values that {self._dtype} cannot hold, or NaN, are not stored")
        return {key: row for (key, row), fits in zip(rows.items(), finite, strict=True) if fits}

    def _warn(self, text: str) -> None:
        if text not in self.warnings:
            self.warnings.append(text)
            warnings.warn(text, stacklevel=3)
