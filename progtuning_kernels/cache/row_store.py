"""`RowStore`: boundary activations by level and key, in GPU memory, CPU memory and on disk.

A *row* is what the frozen prefix made of one sample: (tokens, C), without padding. In memory it is
a tensor of bytes of its own, which torch's allocators give back when it is dropped; on disk a
record (`disk_rows.py`). `row_codec.py` knows what the bytes mean.

Nothing is evicted to make room. Every epoch reads every sample once; a store with room for a tenth
of them that evicts the least recently used finds next to none, one that keeps what came first a
tenth. Room comes from `drop` and `bind`.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from .disk_rows import DiskRow, DiskRows, DiskUnavailable
from .row_codec import CodecError, ErrorMeter, RowFormat, StoredDtype, row_format

StoreDevice = Literal["auto", "cuda", "cpu", "disk"]

KEY_BYTES = 16
_GPU_SHARE, _CPU_SHARE = 0.25, 0.5  # of free memory, where the caller leaves the choice to us
_STORED = (None, torch.float32, torch.bfloat16, torch.float16, "8bit")
_CPU = torch.device("cpu")


def free_cpu_bytes() -> int:
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


def free_gpu_bytes(device: torch.device) -> int:
    """What the driver says is free; what torch keeps cached counts as taken."""
    return torch.cuda.mem_get_info(device)[0]


@dataclass(slots=True)
class _Row:
    format: RowFormat
    tokens: int
    place: Tensor | DiskRow  # (nbytes,) uint8 in memory

    @property
    def nbytes(self) -> int:
        return self.tokens * self.format.token_bytes


class RowStore:
    """Rows of boundary activations by (level, key), under one byte budget over all tiers.

    For one thread. A fork (a data loader's worker) finds no row on disk and writes none.

    Args:
        max_bytes: budget of the rows' bytes over all tiers; the index (400 bytes of Python objects
            a row) and the pages of a file (a tenth at most) come on top.
        device: "cuda", "cpu", "disk": only there. "auto": up to a quarter of the free GPU memory if
            the activations are on a GPU, then up to half of the free CPU memory, then disk if there
            is a `path`.
        dtype: of stored rows. None keeps that of the activations, and every bit; "8bit" is
            described in `row_codec.py`. A row that the dtype cannot hold (overflow, NaN) is not
            stored, activations of no more bytes than `dtype` are stored as they are.
        path: folder for "disk" and "auto", made where it is missing. One store at a time uses it;
            where it cannot be used rows stay in CPU memory, up to half of what is free.

    Attributes:
        warnings: what went wrong, once per kind; each was given to `warnings.warn` too.

    Raises:
        ValueError: unknown device or dtype, negative budget, "disk" without a path, "cuda" without
            a GPU.
    """

    def __init__(
        self,
        max_bytes: int,
        *,
        device: StoreDevice = "auto",
        dtype: StoredDtype = None,
        path: str | os.PathLike[str] | None = None,
    ) -> None:
        if max_bytes < 0:
            raise ValueError(f"max_bytes must not be negative, got {max_bytes}")
        if device not in get_args(StoreDevice):
            raise ValueError(f"device must be one of {get_args(StoreDevice)}, got {device!r}")
        if dtype not in _STORED:
            raise ValueError(f"dtype must be one of {_STORED}, got {dtype!r}")
        if device == "disk" and path is None:
            raise ValueError("device='disk' needs a path")
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device='cuda' needs a GPU")
        self.warnings: list[str] = []
        self._max_bytes = max_bytes
        self._device = device
        self._dtype = dtype
        self._path = path if device in ("auto", "disk") else None
        self._fingerprint: str | None = None
        self._levels: dict[int, dict[bytes, _Row]] = {}
        self._memory = {"cuda": 0, "cpu": 0}  # bytes of rows
        self._disk: DiskRows | None = None
        self._meter = ErrorMeter()
        self._warned: set[str] = set()

    def bind(self, fingerprint: str) -> None:
        """Say which function the prefix is; rows of any other one are dropped.

        Call it before the first read or write, and whenever weights of the prefix have changed. On
        disk, rows that were stored under this fingerprint are found again, all others are replaced.
        """
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
                self._levels.setdefault(row.level, {})[row.key] = _Row(row.format, row.tokens, row)
        except DiskUnavailable as error:
            if self._disk is not None:
                self._disk.close()
            self._warn("unavailable", f"rows are kept in memory, not in {self._path}: {error}")
            self._disk = self._path = None

    def contains(self, level: int, keys: Sequence[bytes]) -> list[bool]:
        """Whether each row is there. One on disk may be damaged, which `read` finds out."""
        stored = self._levels.get(level, {})
        return [key in stored for key in keys]

    @torch.no_grad()
    def write(
        self, level: int, keys: Sequence[bytes], hidden: Tensor, spans: Sequence[tuple[int, int]]
    ) -> int:
        """Store the rows of a batch that are not there and for which there is room.

        Args:
            level: what the rows are the output of: the prefix below this block.
            keys: B times 16 bytes.
            hidden: (B, T, C), floating, CPU or GPU.
            spans: row i is hidden[i, start:end].

        Returns:
            The number of rows that were stored.

        Raises:
            ValueError: keys, spans and shape do not fit each other. RuntimeError: not bound.
        """
        self._check(level, keys, tuple(hidden.shape), spans)
        stored = self._levels.get(level, {})
        format_ = row_format(self._dtype, hidden.dtype, hidden.shape[2])
        fresh = {key: i for i, key in enumerate(keys) if key not in stored}
        tokens = {key: spans[i][1] - spans[i][0] for key, i in fresh.items()}
        homes = self._homes({k: n * format_.token_bytes for k, n in tokens.items()}, hidden.device)
        if not homes:
            return 0
        counts = [tokens[key] for key in homes]
        parts = [hidden[fresh[key], slice(*spans[fresh[key]])] for key in homes]
        values = torch.cat(parts)  # (N, C)
        packed = format_.encode(values)
        kept = [True] * len(homes)
        if format_.dtype != hidden.dtype:
            kept = self._fitting(format_, values, packed, counts)
        new: dict[bytes, _Row] = {}
        for home in dict.fromkeys(homes.values()):
            contents = packed.to(home or _CPU).split(counts)
            own = {
                key: content.flatten()
                for key, content, keep in zip(homes, contents, kept, strict=True)
                if keep and homes[key] == home
            }
            if home is None:
                rows = [(level, key, format_, tokens[key]) for key in own]
                views = [memoryview(content.numpy()) for content in own.values()]
                places = self._disk.write(rows, views)
            else:
                places = _copies(list(own.values()))
                self._memory[home.type] += sum(place.numel() for place in places)
            # none where the disk is full or memory cannot be had
            pairs = zip(own, places, strict=False)
            new.update((key, _Row(format_, tokens[key], place)) for key, place in pairs)
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
        """The hidden states of a batch, zeros outside the spans.

        Args:
            level, keys, spans: as in `write`; a row may lie elsewhere in its batch than it did.
            shape: (B, T, C).

        Returns:
            (B, T, C) of `dtype` on `device`, ready for the current stream.

        Raises:
            KeyError: a row is not there, has not the length and width asked for, or is damaged
                on disk, and so is there no more.
            ValueError, RuntimeError: as `write`.
        """
        self._check(level, keys, shape, spans)
        stored = self._levels.get(level, {})
        by_format: dict[RowFormat, list[int]] = {}
        for i, (key, (start, end)) in enumerate(zip(keys, spans, strict=True)):
            row = stored.get(key)
            if row is None or (row.tokens, row.format.width) != (end - start, shape[2]):
                raise KeyError(f"no row {key.hex()} of {end - start} tokens at level {level}")
            by_format.setdefault(row.format, []).append(i)
        device = torch.device(device)
        out = torch.zeros(shape, dtype=dtype, device=device)
        for format_, batch in by_format.items():
            own = [keys[i] for i in batch]
            ranges = [(i * shape[1] + spans[i][0], i * shape[1] + spans[i][1]) for i in batch]
            if format_.dtype == dtype:
                flat, size = out.view(torch.uint8).flatten(), format_.token_bytes
                self._load(level, own, [flat[start * size : end * size] for start, end in ranges])
                continue
            counts = [end - start for start, end in ranges]
            packed = torch.empty(
                (sum(counts), format_.token_bytes), dtype=torch.uint8, device=device
            )
            self._load(level, own, [part.flatten() for part in packed.split(counts)])
            flat = out.view(-1, shape[2])
            tokens = format_.decode(packed, dtype).split(counts)
            for (start, end), part in zip(ranges, tokens, strict=True):
                flat[start:end] = part
        return out

    def drop(self, level: int, keys: Sequence[bytes] | None = None) -> None:
        """Forget these rows, or the whole level; their space is used again."""
        stored = self._levels.get(level, {})
        keys = list(stored) if keys is None else keys
        places = [stored.pop(key).place for key in keys if key in stored]
        if level in self._levels and not stored:
            del self._levels[level]
        if on_disk := [place for place in places if isinstance(place, DiskRow)]:
            self._disk.drop(on_disk)
        for place in places:
            if isinstance(place, Tensor):
                self._memory[place.device.type] -= place.numel()

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

    @property
    def error(self) -> CodecError | None:
        """What a lossy dtype changed in the rows written since `bind`; None where nothing was lost.

        Rows that an earlier process wrote to disk are not in it.
        """
        return self._meter.error

    def close(self) -> None:
        """Give all memory back and let another store have the folder. Rows on disk stay."""
        self._forget_all()
        self._fingerprint = None
        if self._disk is not None:
            self._disk.close()
            self._disk = None

    def _forget_all(self) -> None:
        self._levels.clear()
        self._memory = {"cuda": 0, "cpu": 0}
        self._meter = ErrorMeter()

    def _check(
        self,
        level: int,
        keys: Sequence[bytes],
        shape: tuple[int, ...],
        spans: Sequence[tuple[int, int]],
    ) -> None:
        if self._fingerprint is None:
            raise RuntimeError("bind the store to a fingerprint first")
        if level < 0:
            raise ValueError(f"level must not be negative, got {level}")
        if len(shape) != 3 or not len(keys) == len(spans) == shape[0]:
            raise ValueError(f"{len(keys)} keys and {len(spans)} spans for rows of {tuple(shape)}")
        if any(len(key) != KEY_BYTES for key in keys):
            raise ValueError(f"keys must be of {KEY_BYTES} bytes")
        if not all(0 <= start <= end <= shape[1] for start, end in spans):
            raise ValueError(f"spans must lie within {shape[1]} tokens, got {list(spans)}")

    def _homes(
        self, sizes: Mapping[bytes, int], device: torch.device
    ) -> dict[bytes, torch.device | None]:
        """The device in whose memory each row goes, None for the disk, for which there is room.

        Args:
            sizes: bytes of each row.
            device: of the activations.
        """
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

    def _fitting(
        self, format_: RowFormat, values: Tensor, packed: Tensor, counts: Sequence[int]
    ) -> list[bool]:
        """Measure what encoding changed; which rows of `counts` tokens the format can hold."""
        measured = self._meter.measure(format_, values, packed)  # (3, N)
        fits = measured.isfinite().all(dim=0)
        rows = [bool(part.all()) for part in fits.split(counts)]
        if not all(rows):
            text = f"rows with values that {format_.dtype} cannot hold, or NaN, are not stored"
            self._warn("unfit", text)
            whole = torch.tensor(rows, device=fits.device).repeat_interleave(
                torch.tensor(counts, device=fits.device)
            )
            measured = measured[:, whole]
        self._meter.add(measured)
        return rows

    def _load(self, level: int, keys: Sequence[bytes], targets: list[Tensor]) -> None:
        """Copy the bytes of rows to `targets`, (n,) uint8 of one device."""
        device = targets[0].device
        places = [self._levels[level][key].place for key in keys]
        far = [i for i, p in enumerate(places) if isinstance(p, DiskRow) or p.device != device]
        near = sorted(set(range(len(places))).difference(far))
        if near:
            torch._foreach_copy_([targets[i] for i in near], [places[i] for i in near])
        if not far:
            return
        ends = [targets[i] for i in far]
        if device.type == "cuda":  # by way of memory that the GPU reads itself: nothing waits
            sizes = [end.numel() for end in ends]
            staged = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=True)
            parts = list(staged.split(sizes))
        else:
            parts = ends
        for i, part in zip(far, parts, strict=True):
            place = places[i]
            if isinstance(place, Tensor):
                part.copy_(place)
            elif not self._disk.read(place, memoryview(part.numpy())):
                self.drop(level, [keys[i]])
                raise KeyError(f"row {keys[i].hex()} of level {level} is damaged")
        if device.type == "cuda":
            # torch gives pinned memory out again after the copy from it
            torch._foreach_copy_(ends, staged.to(device, non_blocking=True).split(sizes))

    def _warn(self, kind: str, text: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            self.warnings.append(text)
            warnings.warn(text, stacklevel=3)


def _copies(contents: Sequence[Tensor]) -> list[Tensor]:
    """Tensors of their own with the same bytes; none where there is no memory for them."""
    try:
        copies = [torch.empty_like(content) for content in contents]
    except (RuntimeError, MemoryError):  # RuntimeError: torch's OutOfMemoryError among others
        return []
    if copies:
        torch._foreach_copy_(copies, list(contents))
    return copies
