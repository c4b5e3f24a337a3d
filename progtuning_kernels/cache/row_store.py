"""`RowStore`: boundary activations by level and key, in GPU memory, CPU memory and on disk.

A *row* is what the frozen prefix made of one sample: (tokens, C), without padding. Rows are bytes
to every tier (`slabs.py`, `disk.py`); `row_codec.py` knows what they mean.

Nothing is evicted to make room. Every epoch reads every sample once; a store with room for a tenth
of them that evicts the least recently used finds next to none, one that keeps what came first a
tenth. Room comes from `drop` and `bind`.
"""

from __future__ import annotations

import os
import warnings
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from .disk import DiskTier, DiskUnavailable, StoredRow
from .row_codec import CodecError, ErrorMeter, RowFormat, StoredDtype, row_format
from .slabs import SlabTier, aligned, free_cpu_bytes, free_gpu_bytes

StoreDevice = Literal["auto", "cuda", "cpu", "disk"]

KEY_BYTES = 16
_GPU_SHARE, _CPU_SHARE = 0.25, 0.5  # of free memory, where the caller leaves the choice to us
_PREFETCHED = 2  # batches whose copies on the GPU are held; they are not part of the budget
_STORED = (None, torch.float32, torch.bfloat16, torch.float16, "8bit")

Key = tuple[int, bytes]  # level and sample


@dataclass(slots=True)
class _Row:
    format: RowFormat
    tokens: int
    tier: SlabTier | DiskTier
    address: int
    on_disk: StoredRow | None = None  # with its checksum

    @property
    def nbytes(self) -> int:
        return self.tokens * self.format.token_bytes

    @property
    def space(self) -> int:
        return aligned(self.nbytes)


class RowStore:
    """Rows of boundary activations by (level, key), under one byte budget over all tiers.

    For one thread. A fork (a data loader's worker) finds no row on disk and writes none.

    Args:
        max_bytes: budget over all tiers. Memory is taken in slabs of up to 64 MiB, which are within
            it; the index is not (250 bytes of Python objects a row, 48 on disk).
        device: "cuda", "cpu", "disk": only there. "auto": up to a quarter of the free GPU memory if
            the activations are on a GPU, then up to half of the free CPU memory, then disk if there
            is a `path`. CPU memory is pinned if the activations are on a GPU.
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
        self._memory: dict[torch.device, SlabTier] = {}
        self._disk: DiskTier | None = None
        self._meter = ErrorMeter()
        self._warned: set[str] = set()
        self._reader: torch.device | None = None  # the GPU that rows were last read to
        self._ahead: deque[dict[Key, tuple[Tensor, torch.cuda.Event]]] = deque(maxlen=_PREFETCHED)

    def bind(self, fingerprint: str) -> None:
        """Say which function the prefix is; rows of any other one are dropped.

        Call it before the first read or write, and whenever weights of the prefix have changed. On
        disk, rows that were stored under this fingerprint are found again, all others are replaced.
        """
        if fingerprint == self._fingerprint:
            return
        self._levels.clear()
        self._memory.clear()
        self._ahead.clear()
        self._meter = ErrorMeter()
        self._fingerprint = fingerprint
        if self._path is None:
            return
        try:
            if self._disk is None:
                name = str(self._dtype or "own").removeprefix("torch.")
                self._disk = DiskTier(self._path, name, aligned=aligned, warn=self._warn)
            for row in self._disk.bind(fingerprint, self._max_bytes):
                found = _Row(row.format, row.tokens, self._disk, row.offset, row)
                self._levels.setdefault(row.level, {})[row.key] = found
        except DiskUnavailable as error:
            if self._disk is not None:
                self._disk.close()
            self._warn("unavailable", f"rows are kept in memory, not in {self._path}: {error}")
            self._disk = self._path = None

    def contains(self, level: int, keys: Sequence[bytes]) -> list[bool]:
        """Whether `read` will find each row; the first time, one on disk is read and checked."""
        stored = self._levels.get(level, {})
        damaged = [
            key
            for key in keys
            if key in stored
            and (row := stored[key].on_disk) is not None
            and not self._disk.intact(row)
        ]
        self.drop(level, damaged)
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
        tiers = self._tiers(hidden.device)
        new: dict[bytes, _Row] = {}
        parts = []  # hidden states of the rows in `new`
        # longest first: of 5,000 rows that move to another level within a full store, one finds no
        # hole, where 8 do not in the order of the batch
        for i in sorted(range(len(keys)), key=lambda i: spans[i][0] - spans[i][1]):
            key, (start, end) = keys[i], spans[i]
            if key in stored or key in new:
                continue
            if (row := self._place(level, key, format_, end - start, tiers)) is not None:
                new[key] = row
                parts.append(hidden[i, start:end])
        if not new:
            return 0
        tokens = torch.cat(parts)  # (N, C), a copy that nobody writes to
        packed = format_.encode(tokens)
        contents = dict(zip(new, packed.split([len(part) for part in parts]), strict=True))
        if format_.dtype != hidden.dtype:
            self._drop_unfit(new, format_, tokens, packed)
        self._fill(new, contents)
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

        32 rows of 64 tokens and 384 channels, wanted in float32, take 0.41 ms from CPU memory (a
        copy of their 3 MiB: 0.26 ms), 0.64 ms where they are stored as bfloat16 or 8 bits, and
        1.3 ms, checksums included, from a file that the kernel holds in memory; on one thread.

        Args:
            level, keys, spans: as in `write`; a row may lie elsewhere in its batch than it did.
            shape: (B, T, C).

        Returns:
            (B, T, C) of `dtype` on `device`, ready for the current stream.

        Raises:
            KeyError: a row is not there, or does not have the length and width asked for, or is
                damaged (which `contains` would have found).
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
        if device.type == "cuda":
            self._reader = device
        out = torch.zeros(shape, dtype=dtype, device=device)
        for format_, batch in by_format.items():
            rows = {i: stored[keys[i]] for i in batch}
            ranges = [(i * shape[1] + spans[i][0], i * shape[1] + spans[i][1]) for i in batch]
            if format_.dtype == dtype:
                flat, size = out.view(torch.uint8).flatten(), format_.token_bytes
                targets = [flat[start * size : end * size] for start, end in ranges]
                self._load(level, [keys[i] for i in batch], list(rows.values()), targets)
                continue
            counts = [row.tokens for row in rows.values()]
            packed = torch.empty(
                (sum(counts), format_.token_bytes), dtype=torch.uint8, device=device
            )
            targets = [part.flatten() for part in packed.split(counts)]
            self._load(level, [keys[i] for i in batch], list(rows.values()), targets)
            flat = out.view(-1, shape[2])
            tokens = format_.decode(packed, dtype).split(counts)
            for (start, end), part in zip(ranges, tokens, strict=True):
                flat[start:end] = part
        return out

    def drop(self, level: int, keys: Sequence[bytes] | None = None) -> None:
        """Forget these rows, or the whole level; their space is used again."""
        stored = self._levels.get(level, {})
        keys = list(stored) if keys is None else keys
        gone = {key: stored.pop(key) for key in keys if key in stored}
        if level in self._levels and not stored:
            del self._levels[level]
        for batch in self._ahead:
            for key in gone:
                batch.pop((level, key), None)
        if on_disk := [row.on_disk for row in gone.values() if row.on_disk is not None]:
            self._disk.drop(on_disk)
        for row in gone.values():
            if row.on_disk is None:
                row.tier.give(row.address, row.space)

    def prefetch(self, level: int, keys: Sequence[bytes]) -> None:
        """A hint that these rows are read soon.

        Rows on disk are read ahead by the kernel; rows in CPU memory are copied, beside the
        computation, to the GPU that the last read was for. Rows that are not there are passed over.
        """
        stored = self._levels.get(level, {})
        rows = {key: stored[key] for key in keys if key in stored}
        for row in rows.values():
            if row.on_disk is not None:
                self._disk.page_in(row.on_disk)
        memory = self._memory.get(torch.device("cpu"))
        ahead = [key for key, row in rows.items() if row.tier is memory]
        if self._reader is None or not ahead:
            return
        addresses = [rows[key].address for key in ahead]
        sizes = [rows[key].nbytes for key in ahead]
        try:
            copies, done = memory.prefetch(addresses, sizes, self._reader)
        except torch.OutOfMemoryError:
            return
        self._ahead.append({(level, k): (c, done) for k, c in zip(ahead, copies, strict=True)})

    def levels(self) -> tuple[int, ...]:
        """Levels that have rows, ascending."""
        return tuple(sorted(self._levels))

    def rows(self, level: int) -> int:
        """Number of rows at a level."""
        return len(self._levels.get(level, {}))

    @property
    def nbytes(self) -> int:
        """Bytes that rows take up over all tiers, each a multiple of 64; at most `max_bytes`."""
        return sum(self.nbytes_by_tier.values())

    @property
    def nbytes_by_tier(self) -> dict[str, int]:
        """The same by "cuda", "cpu" and "disk"."""
        used = {"cuda": 0, "cpu": 0, "disk": self._disk.used if self._disk else 0}
        for tier in self._memory.values():
            used[tier.device.type] += tier.used
        return used

    @property
    def error(self) -> CodecError | None:
        """What a lossy dtype changed in the rows written since `bind`; None where nothing was lost.

        Rows that an earlier process wrote to disk are not in it.
        """
        return self._meter.error

    def close(self) -> None:
        """Give all memory back and let another store have the folder. Rows on disk stay."""
        self._levels.clear()
        self._memory.clear()
        self._ahead.clear()
        self._fingerprint = None
        if self._disk is not None:
            self._disk.close()
            self._disk = None

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

    def _tiers(self, device: torch.device) -> list[SlabTier | DiskTier]:
        """Where rows of activations on `device` may go, in order of preference."""
        tiers: list[SlabTier | DiskTier] = []
        on_gpu, choice = device.type == "cuda", self._device
        if choice == "cuda" or (choice == "auto" and on_gpu):
            gpu = device if on_gpu else torch.device("cuda", torch.cuda.current_device())
            share = _GPU_SHARE if choice == "auto" else None
            tiers.append(self._memory_tier(gpu, pinned=False, share=share))
        if choice in ("auto", "cpu") or (choice == "disk" and self._disk is None):
            share = None if choice == "cpu" else _CPU_SHARE
            tiers.append(self._memory_tier(torch.device("cpu"), pinned=on_gpu, share=share))
        if self._disk is not None:
            tiers.append(self._disk)
        return tiers

    def _memory_tier(self, device: torch.device, *, pinned: bool, share: float | None) -> SlabTier:
        if device not in self._memory:
            ask = free_gpu_bytes if device.type == "cuda" else free_cpu_bytes
            self._memory[device] = SlabTier(device, pinned=pinned, share=share, free_bytes=ask)
        return self._memory[device]

    def _place(
        self,
        level: int,
        key: bytes,
        format_: RowFormat,
        tokens: int,
        tiers: Sequence[SlabTier | DiskTier],
    ) -> _Row | None:
        space = aligned(tokens * format_.token_bytes)
        for tier in tiers:
            held = sum(memory.allocated for memory in self._memory.values())
            held += self._disk.allocated if self._disk is not None else 0
            address = tier.take(space, self._max_bytes - held)
            if address is not None:
                on_disk = None
                if tier is self._disk:
                    on_disk = StoredRow(level, key, format_, tokens, address)
                return _Row(format_, tokens, tier, address, on_disk)
        return None

    def _drop_unfit(
        self, new: dict[bytes, _Row], format_: RowFormat, tokens: Tensor, packed: Tensor
    ) -> None:
        """Measure what encoding changed; take rows out of `new` that it cannot hold."""
        measured = self._meter.measure(format_, tokens, packed)  # (3, N)
        fits = measured.isfinite().all(dim=0)
        if not bool(fits.all()):
            counts = [row.tokens for row in new.values()]
            for key, fit in zip(list(new), fits.split(counts), strict=True):
                if not bool(fit.all()):
                    fit.zero_()
                    row = new.pop(key)
                    row.tier.give(row.address, row.space)
            text = f"rows with values that {format_.dtype} cannot hold, or NaN, are not stored"
            self._warn("unfit", text)
            measured = measured[:, fits]
        self._meter.add(measured)

    def _fill(self, new: dict[bytes, _Row], contents: dict[bytes, Tensor]) -> None:
        """Copy rows to where they were placed; take those out of `new` that the disk refuses."""
        for tier in self._memory.values():
            if keys := [key for key, row in new.items() if row.tier is tier]:
                sources = [contents[key].flatten() for key in keys]
                tier.fill([new[key].address for key in keys], sources)
        if keys := [key for key, row in new.items() if row.on_disk is not None]:
            sources = [memoryview(contents[key].flatten().cpu().numpy()) for key in keys]
            written = self._disk.append([new[key].on_disk for key in keys], sources)
            for key, row in zip(keys, written or [None] * len(keys), strict=True):
                if row is not None:
                    new[key].on_disk = row
                else:
                    self._disk.give(new[key].address, new.pop(key).space)

    def _load(self, level: int, keys: list[bytes], rows: list[_Row], targets: list[Tensor]) -> None:
        """Copy the bytes of rows to `targets`, (n,) uint8 of one device."""
        jobs: dict[SlabTier, tuple[list[int], list[Tensor]]] = {}
        for key, row, target in zip(keys, rows, targets, strict=True):
            if row.on_disk is not None:
                self._load_from_disk(level, key, row.on_disk, target)
            elif (copy := self._prefetched((level, key), target.device)) is not None:
                target.copy_(copy)
            else:
                addresses, waiting = jobs.setdefault(row.tier, ([], []))
                addresses.append(row.address)
                waiting.append(target)
        for tier, (addresses, waiting) in jobs.items():
            tier.copy_to(addresses, waiting)

    def _load_from_disk(self, level: int, key: bytes, row: StoredRow, target: Tensor) -> None:
        buffer = target
        if target.is_cuda:  # torch gives pinned memory out again after the copies from it
            buffer = torch.empty(target.shape, dtype=torch.uint8, device="cpu", pin_memory=True)
        if not self._disk.read(row, memoryview(buffer.numpy())):
            self.drop(level, [key])
            raise KeyError(f"row {key.hex()} of level {level} is damaged")
        if buffer is not target:
            target.copy_(buffer, non_blocking=True)

    def _prefetched(self, key: Key, device: torch.device) -> Tensor | None:
        """The copy that `prefetch` made on `device`, fit for the current stream."""
        for batch in self._ahead:
            if key in batch and batch[key][0].device == device:
                copy, done = batch.pop(key)
                stream = torch.cuda.current_stream(device)
                stream.wait_event(done)
                copy.record_stream(stream)
                return copy
        return None

    def _warn(self, kind: str, text: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            self.warnings.append(text)
            warnings.warn(text, stacklevel=3)
