"""`PrefixCache`: how much to keep of the prefix's outputs, where, and in which precision."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Literal, get_args

import torch

from ..text_table import Table, as_html, as_text
from .row_store import RowStore, StoreDevice, free_cpu_bytes, stored_dtype

_DTYPES = (None, torch.float32, torch.bfloat16, torch.float16)


@dataclass(eq=False)
class PrefixCache:
    """Keeps what the frozen prefix computes for a sample, so that later epochs read it instead.

    Units below the boundary are a fixed function of the sample (frozen, in eval mode). Their
    outputs, the boundary activations, are stored row by row without padding, and a batch whose rows
    are all there runs neither embeddings nor prefix blocks. Samples are recognised by content; the
    data loader needs nothing.

    Args:
        max_bytes: budget over all tiers; what does not fit is computed as before.
        device: where rows are kept: "cuda", "cpu", "disk", or "auto" for the fastest that has room:
            up to a quarter of the free GPU memory if the activations are there, then up to half of
            the free CPU memory, then `path`.
        dtype: precision of stored rows: None keeps that of the activations (losses and weights are
            then those of a run without cache), or `torch.bfloat16`, half the bytes, 0.2 % error.
        path: folder on disk, whose rows a later run with the same prefix weights finds again.

    Raises:
        ValueError: `max_bytes` is not a positive int, unknown device or dtype, "disk" without a
            path, "cuda" without a GPU; from `patch_model`, if it serves another patched model.

    Example:
        ```python
        handle = patch_model(model, ProgressiveSchedule(2, 8), cache=PrefixCache(1 << 30))
        ```
    """

    max_bytes: int
    _: KW_ONLY
    device: StoreDevice = "auto"
    dtype: torch.dtype | None = None
    path: str | os.PathLike[str] | None = None
    _in_use: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        max_bytes, device = self.max_bytes, self.device
        if not isinstance(max_bytes, int) or max_bytes < 1:
            raise ValueError(f"max_bytes must be a number of bytes, 1 or more, got {max_bytes!r}")
        if device not in get_args(StoreDevice):
            raise ValueError(f"device must be one of {get_args(StoreDevice)}, got {device!r}")
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype must be one of {_DTYPES}, got {self.dtype!r}")
        if device == "disk" and self.path is None:
            raise ValueError("device='disk' needs a path")
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device='cuda' needs a GPU")

    def row_bytes(self, tokens: int, width: int, dtype: torch.dtype) -> int:
        """Bytes that one row of boundary activations takes.

        Args:
            tokens: real tokens of the row.
            width: channels of the hidden states, C.
            dtype: of the hidden states, floating.

        Raises:
            TypeError: no floating dtype.
        """
        return tokens * width * stored_dtype(self.dtype, dtype).itemsize

    def open(self) -> RowStore:
        """The store, for one patched model at a time.

        Raises:
            ValueError: it serves another patched model.
        """
        if self._in_use:
            raise ValueError("this PrefixCache serves another patched model: make one per model")
        store = RowStore(self.max_bytes, device=self.device, dtype=self.dtype, path=self.path)
        self._in_use = True
        return store

    def close(self, store: RowStore) -> None:
        """Give a store's memory back; rows on disk stay.

        Args:
            store: what `open` has returned.
        """
        store.close()
        self._in_use = False


def automatic_cache() -> PrefixCache:
    """A quarter of the CPU memory that is free now."""
    return PrefixCache(max(1, free_cpu_bytes() // 4))


@dataclass(frozen=True)
class CacheReport:
    """What the cache did in the stage at hand. `print(report)` shows it as a table.

    Attributes:
        state: "on", "off" (it would not pay) or "bypassed" (it cannot be used in this stage).
        reason: why it is not on; "" where it is.
        level: block whose input is stored.
        rows: number of stored rows by level.
        nbytes: bytes in use.
        nbytes_by_tier: the same by "cuda", "cpu" and "disk".
        hits: rows of training forwards that were there.
        misses: rows of training forwards that were not.
        served_steps: forwards that ran without the prefix.
        prefix_ms: median cost of computing one row, in milliseconds; None before it is measured.
        read_ms: the same of recognising and reading one row.
        bypasses: reasons for which single forwards ran without it, with their numbers.
        warnings: what went wrong, a sentence each.
    """

    state: Literal["on", "off", "bypassed"]
    reason: str
    level: int
    rows: Mapping[int, int]
    nbytes: int
    nbytes_by_tier: Mapping[str, int]
    hits: int
    misses: int
    served_steps: int
    prefix_ms: float | None
    read_ms: float | None
    bypasses: Mapping[str, int] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def summary(self) -> str:
        """One line."""
        if self.state != "on":
            return f"cache: {self.state} ({self.reason})"
        return (
            f"cache: on at block {self.level}, {sum(self.rows.values()):,} rows, "
            f"{self.nbytes:,} bytes; {self.hits:,} hits, {self.misses:,} misses, "
            f"{self.served_steps:,} forwards without prefix"
        )

    def __str__(self) -> str:
        return as_text([self._table()])

    def _repr_html_(self) -> str:
        return as_html([self._table()])

    def _table(self) -> Table:
        def ms(value: float | None) -> str:
            return "-" if value is None else f"{value:.4f}"

        lines = [
            ("state", self.state + (f": {self.reason}" if self.reason else "")),
            ("level", str(self.level)),
            *((f"rows at block {level}", f"{n:,}") for level, n in self.rows.items()),
            *((f"bytes ({tier})", f"{n:,}") for tier, n in self.nbytes_by_tier.items() if n),
            ("hits (rows)", f"{self.hits:,}"),
            ("misses (rows)", f"{self.misses:,}"),
            ("served forwards", f"{self.served_steps:,}"),
            ("prefix (ms/row)", ms(self.prefix_ms)),
            ("read (ms/row)", ms(self.read_ms)),
            *((f"bypassed {n:,} times", reason) for reason, n in self.bypasses.items()),
            *(("warning", text) for text in self.warnings),
        ]
        return Table(lines, left=(0, 1), head=False)
