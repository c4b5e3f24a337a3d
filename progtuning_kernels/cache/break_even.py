"""Decides whether reading boundary activations is cheaper than computing them."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

# Reading may cost this share of computing at most: above it a step gains less than timing scatters.
_MAX_SHARE = 0.9
_SAMPLES = 4  # of both, before anything is decided; the first forward of a process is always slow
_MISSES_WITHOUT_HIT = 200_000  # rows; augmentation makes every sample new


class Stopwatch:
    """Milliseconds of wall time, or between CUDA events, which are read once they have passed."""

    def __init__(self, device_type: str) -> None:
        self._on_gpu = device_type == "cuda"
        self._pending: deque[tuple[Any, Any, Callable[[float], None]]] = deque()

    def now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def stop(self, started: Any, receive: Callable[[float], None]) -> None:
        """Hand the milliseconds since `started` to `receive`, now or at a later `poll`."""
        ended = self.now()
        if self._on_gpu:
            self._pending.append((started, ended, receive))
        else:
            receive((ended - started) * 1e3)

    def poll(self) -> None:
        while self._pending and self._pending[0][1].query():
            started, ended, receive = self._pending.popleft()
            receive(started.elapsed_time(ended))


@dataclass
class BreakEven:
    """What one stage has counted, in rows, and measured, in milliseconds a row."""

    hits: int = 0  # rows found
    misses: int = 0
    refused: int = 0  # rows for which the store had no room
    _prefix: deque[float] = field(default_factory=lambda: deque(maxlen=64))
    _read: deque[float] = field(default_factory=lambda: deque(maxlen=64))

    @property
    def wants_reads(self) -> bool:
        """Whether a read for its time alone is worth making."""
        return len(self._read) < _SAMPLES

    def add_prefix(self, ms: float, rows: int) -> None:
        self._prefix.append(ms / rows)

    def add_read(self, ms: float, rows: int) -> None:
        self._read.append(ms / rows)

    @property
    def prefix_ms(self) -> float | None:
        """Median cost of computing one row's boundary activations."""
        return statistics.median(self._prefix) if self._prefix else None

    @property
    def read_ms(self) -> float | None:
        """Median cost of recognising one row and reading its boundary activations."""
        return statistics.median(self._read) if self._read else None

    def verdict(self, rows: int) -> str | None:
        """Why the cache, which holds `rows`, does not pay in this stage; None while it may."""
        if min(len(self._prefix), len(self._read)) >= _SAMPLES:
            if self.read_ms > _MAX_SHARE * self.prefix_ms:
                return (
                    f"reading a row takes {self.read_ms:.3f} ms, computing it "
                    f"{self.prefix_ms:.3f} ms"
                )
        if self.hits:
            return None
        # of a data set that is more than twice the budget, most rows of a batch are never there
        if self.refused and self.misses > 2 * rows:
            return f"the budget holds {rows:,} rows, and {self.misses:,} others came without a hit"
        if self.misses > _MISSES_WITHOUT_HIT:
            return f"{self.misses:,} rows came and none came again (augmentation?)"
        return None
